"""A network whose blocks are computed again in the backward, by ``torch.utils.checkpoint``."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from workloads.detection import Detector


def checkpointed(network: nn.Module) -> nn.Module:
    """The network itself. Its blocks: the outermost modules whose classes are none of PyTorch's; of a detector those of
    its network for features.

    Raises: RuntimeError where it has none.
    """
    body = network.body if isinstance(network, Detector) else network
    blocks = [block for child in body.children() for block in _blocks(child)]
    if not blocks:
        raise RuntimeError("there are no blocks to be checkpointed in it")
    for block in blocks:
        vars(block)["forward"] = _Again(block)
    return network


def _blocks(module: nn.Module) -> list[nn.Module]:
    if not type(module).__module__.startswith("torch."):
        return [module] if any(True for _ in module.parameters()) else []
    return [block for child in module.children() for block in _blocks(child)]


class _Again:
    def __init__(self, block: nn.Module):
        self.block = block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(type(self.block).forward, self.block, *args, use_reentrant=False, **kwargs)
