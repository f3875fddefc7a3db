"""The timed steps: which cases and variants of ``python -m bench`` they run, the main figures first.

``python -m bench.gpu.measured adapter|optimizer|step|cost|ab --json FILE``
"""

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PARTS = ("adapter", "optimizer", "step", "cost", "ab")
SMALL = (64, 128, 16, "bfloat16")  # T, d, r, dtype of a rehearsal
Plan = Sequence[tuple[Any, Sequence[str]]]


def plan(part: str, device: Any, rehearse: bool, tiles: Sequence[str]) -> Plan:
    """(case, its variants), in the order of measurement."""
    plans = {"adapter": _adapter, "optimizer": _optimizer, "step": _step, "cost": _cost, "ab": _ab}
    return plans[part](device, rehearse, tiles)


def _adapter(device: Any, rehearse: bool, tiles: Sequence[str]) -> Plan:
    from bench.adapter import BARE, BEFORE, CLUSTERS, PASSES, ROWS, adapter_case

    T, d, r, dtype = SMALL if rehearse else (8192, 4096, 64, "bfloat16")
    main = [adapter_case(T, d, r, dtype, pass_) for pass_ in ("both", "forward", "backward")]
    assert {c.shape["pass"] for c in main} == set(PASSES)
    ways = ("eager autocast", "eager pure", "ours", BARE, CLUSTERS, BEFORE)
    cases: list[tuple[Any, Sequence[str]]] = [(c, [w for w in ways if w != CLUSTERS or _forwards(c)]) for c in main]
    # separate cases: compiling may take longer than everything else
    compiled = main[1:2] if rehearse else main
    cases += [(_beside(c), ("eager autocast", "torch.compile", "ours")) for c in compiled]
    # first the shapes just over a wave of tiles, where the earlier kernels were much slower
    for rows in (70,) if rehearse else sorted(ROWS, key=lambda T: T not in (4225, 8449)):
        passes = ("forward", "backward")[: 1 if rehearse else 2]
        made = [adapter_case(rows, d, r, dtype, p) for p in passes]
        cases += [(c, ("ours", BARE, *([CLUSTERS] if _forwards(c) else []), BEFORE)) for c in made]
    return cases


def _forwards(case: Any) -> bool:
    return case.shape["pass"] != "backward"


def _beside(case: Any) -> Any:
    return dataclasses.replace(case, name=f"{case.name}, beside torch.compile")


def _optimizer(device: Any, rehearse: bool, tiles: Sequence[str]) -> Plan:
    from bench import optimizer

    ways = ("clip + AdamW fused", "clip + AdamW foreach", "AdamW fused, clip as grad_scale", "ours")
    return [(optimizer.set_case("1 adapter" if rehearse else "16 adapters, LLaMA-7B"), ways)]


def _step(device: Any, rehearse: bool, tiles: Sequence[str]) -> Plan:
    from bench.step import EAGER, FROZEN, LLAMA_7B, LORA, NORMED, OURS, OURS_LIGER, step_case

    shape = (64, 128, 2, 4, 2, 256) if rehearse else LLAMA_7B
    sites = tuple(range(1, shape[2], 2))
    dtype = "float32" if rehearse else "bfloat16"
    # On a CPU, Liger's modules run the original code, so there is nothing to compare.
    ways = [FROZEN, EAGER, OURS, NORMED, *([] if rehearse else [OURS_LIGER]), LORA]
    batches = {"LLaMA-7B": (4, 1024), "LLaMA-7B as LitGPT": (1, 1304)}
    if rehearse:
        batches = {"tiny LLaMA": (2, 8), "tiny LLaMA as LitGPT": (1, 24)}
    return [
        (step_case(f"{name}, every 2nd layer adapted", shape, sites, batch, device, dtype, classify=False), ways)
        for name, batch in batches.items()
    ]


def _cost(device: Any, rehearse: bool, tiles: Sequence[str]) -> Plan:
    from bench import cost

    return [(case, cost.names(case, device)) for case in cost.cases(device, rehearse)]


def _ab(device: Any, rehearse: bool, tiles: Sequence[str]) -> Plan:
    from bench.adapter import BARE, BEFORE, adapter_case

    T, d, r, dtype = SMALL if rehearse else (8192, 4096, 64, "bfloat16")
    names = (BARE, *(f"{BARE} [{t}]" for t in tiles), BEFORE)
    if rehearse:
        return [(adapter_case(T, d, r, dtype, "backward"), names)]
    return [(adapter_case(t, d, r, dtype, pass_), names) for t in (T, 2048) for pass_ in ("forward", "backward")]


def main(argv: list[str]) -> int:
    """Measure one part's plan into one file, which is written after every case."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.measured", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60.0, help="start no further case after this time")
    parser.add_argument("--ab", nargs="*", default=[], metavar="TABLE=TILES")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on the CPU")
    args = parser.parse_args(argv)
    begin = time.monotonic()
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")

    import torch

    from bench import engine

    device = torch.device("cpu") if args.rehearse else torch.device("cuda", 0)
    options = engine.Options(
        parts=(args.part,), device=device, quick=args.rehearse, json=args.json, peer_python=None,
        plan=plan(args.part, device, args.rehearse, args.ab),
        case_seconds=0.01 if args.rehearse else {"step": 8.0, "cost": 6.0}.get(args.part, 2.0),
        case_rounds=2 if args.rehearse else None,
        roofs=args.part == "adapter" and not args.rehearse,
        launches=False,
        deadline=begin + args.seconds,
    )  # fmt: skip
    return int(engine.run(options))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
