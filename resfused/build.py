"""``python -m resfused.build``: compiles the kernels for this CPU ahead of the first call that wants them."""

from __future__ import annotations

import sys

from .kernels import cpu


def main() -> int:
    try:
        paths = [cpu.built(library) for library in cpu.LIBRARIES]
    except cpu.UnavailableError as error:
        print(f"resfused: the kernels for this CPU cannot be had: {error}", file=sys.stderr)
        return 1
    print(*paths, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
