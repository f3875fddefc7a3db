"""Describes the machine, and checks that what was carried fits it: ``python -m bench.gpu.probe --carried FOLDER``."""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

from adapterkern.files import write_json
from bench.gpu import carried

TOOLS = ("nvcc", "gcc", "ncu", "compute-sanitizer", "nvidia-smi")


def main(argv: list[str]) -> int:
    """Print the description, and copy the carried extension to where Python finds it."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.probe", description=__doc__)
    parser.add_argument("--carried", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true", help="run on a CPU")
    args = parser.parse_args(argv)
    start = time.monotonic()
    extension = carried.place_extension(args.carried)

    import torch

    from adapterkern.cli import doctor
    from bench.measure import machine

    device = torch.device("cpu" if args.rehearse else "cuda")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            print("torch.cuda.is_available() is False: no step can run")
            return 1
        device = torch.device("cuda", torch.cuda.current_device())
        torch.ones(1, device=device).item()
    cache = Path(os.environ["TRITON_CACHE_DIR"])
    manifest = args.carried / carried.MANIFEST
    found = {
        **machine(device),
        "prepared": json.loads(manifest.read_text()) if manifest.is_file() else None,
        "extension": extension,
        "tools": {name: shutil.which(name) for name in TOOLS},
        "carried_kernels": len(list(cache.glob(f"*/{carried.GROUP}*"))),
        "warnings": carried.mismatches(args.carried),
        "seconds": round(time.monotonic() - start, 1),
    }
    print("\n".join([*doctor.diagnosis(), *(f"{key}: {value}" for key, value in found.items())]))
    write_json(args.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
