"""The BatchNorms of ResNet-18 and ResNet-50 at 224x224, each with the addition and the ReLU behind it.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016; a bottleneck's stride lies in its 3x3
convolution, as in torchvision.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

NORM_RELU = "norm+relu"
NORM_ADD_RELU = "norm+add+relu"
NORM_ADD_NORM_RELU = "norm+add(norm)+relu"
FORMS = (NORM_RELU, NORM_ADD_RELU, NORM_ADD_NORM_RELU)


@dataclass(frozen=True)
class Node:
    """``count`` equal nodes of one form, on activations of shape (N, channels, height, width).

    ``forked``: the output enters both the next block's first convolution and its shortcut, and so has two gradients.
    """

    form: str
    channels: int
    height: int
    width: int
    count: int
    forked: bool = False

    @property
    def norms(self) -> int:
        """BatchNorms in one node."""
        return 2 if self.form == NORM_ADD_NORM_RELU else 1

    @property
    def elements(self) -> int:
        """Elements of one activation of one node, per image."""
        return self.channels * self.height * self.width


@dataclass(frozen=True)
class Network:
    nodes: list[Node]
    pooled_elements: int
    """Elements per image of what leaves the stem's max-pool: it is forked too, and no node makes it."""


def resnet18() -> Network:
    return _network((2, 2, 2, 2), bottleneck=False)


def resnet50() -> Network:
    return _network((3, 4, 6, 3), bottleneck=True)


def resnet50_nodes() -> list[Node]:
    """53 norms: 33 norm+relu (the stem among them), 12 identity tails, 4 projection tails of two norms."""
    return resnet50().nodes


def _network(depths: tuple[int, ...], bottleneck: bool) -> Network:
    """The nodes in the order of the forward pass, equal ones together, from the number of blocks of each stage."""
    nodes = Counter([(NORM_RELU, 64, 112, False)])
    # What leaves the stem's max-pool.
    channels, size = 64, 56
    pooled_elements = channels * size * size
    for stage, depth in enumerate(depths):
        inner = 64 << stage
        outer = inner * 4 if bottleneck else inner
        for block in range(depth):
            if bottleneck:
                nodes[NORM_RELU, inner, size, False] += 1
            if stage > 0 and block == 0:
                size //= 2
            nodes[NORM_RELU, inner, size, False] += 1
            # Only a stage's first block changes the shape; that of a basic ResNet's first stage does not.
            projected = block == 0 and channels != outer
            ends = stage == len(depths) - 1 and block == depth - 1
            nodes[NORM_ADD_NORM_RELU if projected else NORM_ADD_RELU, outer, size, not ends] += 1
            channels = outer
    found = [Node(form, channels, size, size, count, forked) for (form, channels, size, forked), count in nodes.items()]
    return Network(found, pooled_elements)


NETWORKS: dict[str, Callable[[], Network]] = {"resnet18": resnet18, "resnet50": resnet50}
