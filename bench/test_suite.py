"""``pytest bench``: the quick cases, each variant timed by pytest-benchmark on its own.

For a look while developing, e.g. ``pytest bench -k optimizer``. Published figures come from ``python -m bench``, where
the variants of a case take turns.
"""

from typing import Any

import pytest
import torch

from bench import engine
from bench.cases import COPY, Case

DEVICE = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
PLAN = [
    pytest.param(case, name, id=f"{case.part}: {case.name}: {name}")
    for part in engine.TIMED
    for case, names in engine.part_cases(part, DEVICE, quick=True)
    for name in (*names, *[COPY] * (case.floor_bytes > 0))
]


@pytest.mark.parametrize(("case", "name"), PLAN)
def test_time(case: Case, name: str, benchmark: Any) -> None:
    variant = next(v for v in engine.build(case, DEVICE, [name] * (name != COPY), None) if v.name == name)
    if variant.missing:
        (pytest.fail if variant.failed else pytest.skip)(variant.missing)
    run = variant.run
    assert run is not None

    def until_done() -> None:
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{case.part}: {case.name}"
    benchmark.extra_info.update(variant.info, error=variant.error, budget=variant.budget)
    benchmark(until_done)
    if variant.error is not None and variant.budget is not None:
        assert variant.error <= variant.budget
