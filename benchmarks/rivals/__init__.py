"""Other libraries' fused BatchNorm, each behind the functions of ``resfused.reference``.

None of them is installed with resfused. A rival is made where it can be imported and finds a CUDA GPU, and refuses with
``Unsupported`` what it has no kernel for: that too is a result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rivals.library import Library, Unavailable, Unsupported

__all__ = ["RIVALS", "Unavailable", "Unsupported", "available"]


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


def available(names: Iterable[str] = tuple(RIVALS)) -> tuple[dict[str, object], dict[str, str]]:
    """The rivals of these names that could be made, and for each of the others the reason. ValueError: no such name."""
    names = list(names)
    if unknown := [name for name in names if name not in RIVALS]:
        raise ValueError(f"names must be among {', '.join(RIVALS)}; got {', '.join(unknown)}")
    made: dict[str, object] = {}
    reasons: dict[str, str] = {}
    for name in names:
        try:
            made[name] = RIVALS[name]()
        except Unavailable as error:
            reasons[name] = str(error)
    return made, reasons
