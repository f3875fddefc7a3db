"""``python -m bench <part> [options]``: each part is a module of this package with a ``main(argv)``."""

import importlib
import os
import sys

# part → what it prints, and the environment that has to be set before Triton is imported
PARTS = {
    "traffic": ("bytes and launches of the kernels and of eager PyTorch, no GPU needed", {"TRITON_INTERPRET": "1"}),
    "aot": ("registers, shared memory and tensor-core path of every kernel, no GPU needed", {}),
    "adapter": ("forward and backward times against PyTorch's, on a GPU", {}),
    "sweep": ("block sizes, timed on a GPU", {}),
}


def main() -> None:
    """Run the part that the first argument names."""
    if len(sys.argv) < 2 or sys.argv[1] not in PARTS:
        width = max(map(len, PARTS))
        sys.exit(
            "usage: python -m bench <part> [--help]\n"
            + "\n".join(f"  {p:<{width}}  {t}" for p, (t, _) in PARTS.items())
        )
    part = sys.argv[1]
    os.environ.update(PARTS[part][1])
    importlib.import_module(f"bench.{part}").main(sys.argv[2:])


main()
