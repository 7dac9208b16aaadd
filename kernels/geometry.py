"""How an activation lies in memory, and tensors brought into a common layout."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

# A contiguous tensor is walked by columns where it has so many images, and planes that fill rows of a tile worse than
# this or are not made of whole 16 bytes in half precision. Not a larger plane, as each position has partial results.
COLUMNS_LEAST_IMAGES = 32
COLUMNS_LARGEST_PLANE = 1024
COLUMNS_MOST_FILLED = 0.9
COLUMNS_ROW = 64


class Geometry(NamedTuple):
    """An activation of shape (N, C, *spatial) as the kernels see it.

    channels_last: element (position, channel) lies at ``position * channels + channel``; one group.
    contiguous: element (group, channel, position) lies at ``(group * channels + channel) * positions + position``.

    A contiguous activation of many small planes is walked as a channels_last one, in which every position of every
    plane is a column of its own; ``plane`` neighbouring columns are then one channel. Else ``plane`` is 1.
    """

    channels_last: bool
    groups: int
    positions: int
    columns: int
    plane: int = 1

    @property
    def channels(self) -> int:
        return self.columns // self.plane

    @property
    def values(self) -> int:
        """Values per channel, M = N·H·W."""
        return self.groups * self.positions * self.plane

    @property
    def numel(self) -> int:
        return self.groups * self.positions * self.columns

    @property
    def inner(self) -> int:
        """Extent of the axis whose elements are neighbours in memory."""
        return self.columns if self.channels_last else self.positions

    @property
    def mask_numel(self) -> int:
        """Bytes of a bit mask with the inner axis packed by eight."""
        outer = self.groups * (self.positions if self.channels_last else self.columns)
        return outer * (-(-self.inner // 8))


def is_channels_last(x: Tensor) -> bool:
    """Whether the kernels should walk ``x`` channel by channel rather than plane by plane.

    A tensor can be both (C = 1, or one position): then the axis with more than one element is the inner one.
    """
    one_position = x.dim() == 2 or math.prod(x.shape[2:]) == 1
    return one_position or (not x.is_contiguous() and _strides_channels_last(x))


def walks_columns(images: int, plane: int) -> bool:
    """Whether a contiguous tensor's planes are too small to be walked one by one."""
    if images < COLUMNS_LEAST_IMAGES or plane > COLUMNS_LARGEST_PLANE:
        return False
    return plane % 8 != 0 or plane < COLUMNS_MOST_FILLED * COLUMNS_ROW * -(-plane // COLUMNS_ROW)


def geometry(x: Tensor) -> Geometry:
    """The geometry of a dense activation, as ``dense`` returns it."""
    g = plane_geometry(x)
    if not g.channels_last and walks_columns(g.groups, g.positions):
        return Geometry(True, 1, g.groups, g.columns * g.positions, g.positions)
    return g


def plane_geometry(x: Tensor) -> Geometry:
    """The same without columns, however small the planes."""
    batch, channels = x.shape[0], x.shape[1]
    spatial = x.numel() // max(batch * channels, 1)
    if is_channels_last(x):
        return Geometry(True, 1, batch * spatial, channels)
    return Geometry(False, batch, spatial, channels)


def dense(x: Tensor) -> Tensor:
    """``x`` itself where it is contiguous or channels_last, else a copy in the nearer of the two layouts."""
    if x.is_contiguous() or _strides_channels_last(x):
        return x
    if x.dim() > 2 and x.stride(1) == 1:
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x.contiguous()


def in_layout_of(x: Tensor, like: Tensor) -> Tensor:
    """``x`` itself where it already lies as the dense ``like`` does, else a copy that does."""
    matches = _strides_channels_last(x) if is_channels_last(like) else x.is_contiguous()
    return x if matches else torch.empty_like(like, dtype=x.dtype).copy_(x)


def with_strides(t: Tensor, strides: tuple[int, ...]) -> Tensor:
    """``t`` itself where it has these strides, which are dense, else a copy that does."""
    return t if t.stride() == strides else t.new_empty_strided(t.shape, strides).copy_(t)


def in_one_layout(x: Tensor, *others: Tensor | None) -> tuple[Geometry, Any]:
    """The plane geometry of ``x``, and all tensors: as they are where they lie densely in one layout, else copies."""
    strides = [None if t is None else t.stride() for t in others]
    g, ready = _lie(x.shape, x.stride(), *strides)
    if ready:
        return g, (x, *others)
    x = dense(x)
    return plane_geometry(x), (x, *(None if t is None else in_layout_of(t, x) for t in others))


@lru_cache(maxsize=4096)
def _lie(shape: torch.Size, *strides: tuple[int, ...] | None) -> tuple[Geometry, bool]:
    """Found once: the plane geometry of the first of such tensors, and whether all lie densely in its layout."""
    x, *others = (torch.empty_strided(shape, s, device="meta") for s in strides if s is not None)
    ready = dense(x) is x and all(in_layout_of(t, x) is t for t in others)
    return plane_geometry(x), ready


def _strides_channels_last(x: Tensor) -> bool:
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    if x.dim() == 5:
        return x.is_contiguous(memory_format=torch.channels_last_3d)
    return x.movedim(1, -1).is_contiguous()


def unpack_mask(mask: Tensor, like: Tensor) -> Tensor:
    """The booleans of a packed mask, in the shape of the activation ``like`` that it was made for."""
    return _unpack(mask, like, geometry(dense(like)))


def unpack_plane_mask(mask: Tensor, like: Tensor) -> Tensor:
    """The same of a mask in ``plane_geometry``."""
    return _unpack(mask, like, plane_geometry(dense(like)))


def _unpack(mask: Tensor, like: Tensor, g: Geometry) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    bits = (mask.view(-1, -(-g.inner // 8), 1) >> shifts & 1).flatten(1)[:, : g.inner].bool()
    if g.channels_last and g.plane == 1:
        batch, channels, *spatial = like.shape
        return bits.view(batch, *spatial, channels).movedim(-1, 1)
    return bits.view(like.shape)
