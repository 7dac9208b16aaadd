"""Other libraries' fused BatchNorm, each behind the functions of ``resfused.reference``.

None of them is installed with resfused. A rival is made where it can be imported and finds a CUDA GPU, and refuses with
``Unsupported`` what it has no kernel for: that too is a result.
"""

from __future__ import annotations

from collections.abc import Callable

from rivals.library import Library, Unavailable, Unsupported

__all__ = ["RIVALS", "Unavailable", "Unsupported"]


def _cudnn_graph() -> Library:
    from rivals.cudnn_graph import CudnnGraph

    return CudnnGraph()


def _apex_groupbn() -> Library:
    from rivals.apex_groupbn import ApexGroupBN

    return ApexGroupBN()


def _attorch() -> Library:
    from rivals.attorch_batch_norm import Attorch

    return Attorch()


RIVALS: dict[str, Callable[[], object]] = {
    "cuDNN graph": _cudnn_graph,
    "apex groupbn": _apex_groupbn,
    "attorch": _attorch,
}
