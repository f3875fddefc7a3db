"""Which implementation runs, and that it is logged once."""

import importlib.util
import logging
import subprocess
import sys
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path

import pytest
import torch

from adapterkern.ops import choice, native

HERE = "avx2, the best of avx2; small inputs run as eager PyTorch"
NOT_SHOWN = "no card has shown it right and faster (ADAPTERKERN_KERNELS=cluster tries it)"
GPU = f"it is a GPU; no kernels by clusters: {NOT_SHOWN}"


@pytest.fixture
def _undecided() -> Iterator[None]:
    choice.runs_triton.cache_clear()
    yield
    choice.runs_triton.cache_clear()


@pytest.mark.parametrize(
    ("device", "dtype", "interpreted", "triton", "expected"),
    [
        ("cpu", torch.float32, False, True, ("native CPU kernels", HERE)),
        ("cpu", torch.float32, True, True, ("Triton kernels in the interpreter", "TRITON_INTERPRET=1 is set")),
        ("cpu", torch.float64, True, True, ("closed form in PyTorch operations", "the kernels have no fp64")),
        ("cuda:0", torch.bfloat16, False, True, ("Triton kernels", GPU)),
        ("cuda", torch.bfloat16, False, False, ("closed form in PyTorch operations", "triton is not installed")),
        ("cuda", torch.float64, False, True, ("closed form in PyTorch operations", "the kernels have no fp64")),
    ],
)
@pytest.mark.usefixtures("_undecided")
def test_the_choice_and_its_log_line(
    device: str,
    dtype: torch.dtype,
    interpreted: bool,
    triton: bool,
    expected: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name in ("ADAPTERKERN_FUSED", "ADAPTERKERN_KERNELS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(choice, "INTERPRETED", interpreted)
    monkeypatch.setattr(native, "instruction_set", lambda: ("avx2", "the best of avx2"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if triton else None)
    assert choice.backend(device, dtype) == expected
    kind = torch.device(device).type
    with caplog.at_level(logging.INFO, "adapterkern.ops.choice"):
        for _ in range(2):
            assert choice.runs_triton(kind, dtype) == expected[0].startswith("Triton")
    name, reason = expected
    assert [r.message for r in caplog.records] == [f"fused adapters on {kind} in {dtype} run as {name}: {reason}"]


@pytest.mark.parametrize(
    ("asked", "proven", "capacity", "expected"),
    [
        (None, {}, (15, ""), (False, NOT_SHOWN)),
        (None, {"a card": "a-card/x.json"}, (15, ""), (True, "bench/results/a-card/x.json")),
        (None, {"a card": "a-card/x.json"}, (0, "no driver"), (False, "backward: no driver")),
        (None, {"another card": "another-card/x.json"}, (15, ""), (False, NOT_SHOWN)),
        ("triton", {"a card": "a-card/x.json"}, (15, ""), (False, "ADAPTERKERN_KERNELS=triton is set")),
        ("cluster", {}, (15, ""), (True, "ADAPTERKERN_KERNELS=cluster is set")),
        ("cluster", {}, (0, "no driver"), (False, "backward: no driver")),
    ],
)
def test_where_kernels_run_by_clusters(
    asked: str | None,
    proven: dict[str, str],
    capacity: tuple[int, str],
    expected: tuple[bool, str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if asked is not None:
        monkeypatch.setenv("ADAPTERKERN_KERNELS", asked)
    monkeypatch.setattr(choice, "CLUSTERS_PROVEN", proven)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")

    def runs_at_once(kernel: IntEnum, *_: object) -> tuple[int, str]:
        return capacity if kernel.name == "BACKWARD" else (15, "")

    monkeypatch.setattr("adapterkern.ops.kernels.clusters.capacity", runs_at_once)
    device = torch.device("cuda", 0)
    assert choice.clusters(device) == expected
    choice.runs_clusters.cache_clear()
    for _ in range(2):
        assert choice.runs_clusters(device) == expected[0]
    choice.runs_clusters.cache_clear()
    in_vain = ["ADAPTERKERN_KERNELS=cluster: the Triton kernels run: backward: no driver"]
    assert [r.message for r in caplog.records] == (in_vain if asked == "cluster" and not expected[0] else [])


def test_a_proven_card_is_looked_for_only_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ADAPTERKERN_KERNELS", raising=False)
    monkeypatch.setattr(choice, "CLUSTERS_PROVEN", {"a card": "a-card/x.json"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choice.clusters(torch.device("cuda", 0)) == (False, NOT_SHOWN)


def test_no_card_is_said_to_be_proven_without_its_results() -> None:
    results = Path(__file__).parents[2] / "bench" / "results"
    assert all((results / file).is_file() for file in choice.CLUSTERS_PROVEN.values())


def test_the_environment_turns_fused_adapters_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTERKERN_FUSED", "0")
    assert choice.backend("cuda", torch.float64) == ("eager PyTorch", "ADAPTERKERN_FUSED=0 is set")


def test_another_word_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTERKERN_FUSED", "no")
    with pytest.raises(ValueError, match=r"^ADAPTERKERN_FUSED: expected 0 or 1, got 'no'$"):
        choice.backend("cpu")


def test_another_generation_of_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTERKERN_KERNELS", "clusters")
    with pytest.raises(ValueError, match=r"^ADAPTERKERN_KERNELS: expected triton or cluster, got 'clusters'$"):
        choice.backend("cuda", torch.bfloat16)


def test_without_kernels_the_closed_form_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "INTERPRETED", False)
    monkeypatch.setattr(native, "instruction_set", lambda: (None, "the extension is not built"))
    reason = "the extension is not built; small inputs run as eager PyTorch"
    assert choice.backend("cpu") == ("closed form in PyTorch operations", reason)


class Extension:
    """In place of the extension: what it says of this machine and its build."""

    LEFT_OUT_BECAUSE = "its compiler does not know them"
    PreparedAdapter = None

    def __init__(self, *found: str, left_out: tuple[str, ...] = ()) -> None:
        self.instruction_sets = lambda: list(found)
        self.left_out = lambda: list(left_out)


NO_SUCH = "this CPU has no such instructions"
NOT_PERMITTED = "the operating system does not let this process use them"
AVX512 = "avx2 fma f16c avx512f avx512bw avx512vl avx512dq"
OLD = Extension("avx2", "avx512", left_out=("avx512_bf16", "amx"))  # an older compiler's


@pytest.mark.parametrize(
    ("extension", "flags", "expected"),
    [
        (OLD, f"{AVX512} avx512_bf16 amx_tile amx_bf16", dict.fromkeys(("avx512_bf16", "amx"), OLD.LEFT_OUT_BECAUSE)),
        (OLD, f"{AVX512} avx512_bf16", {"avx512_bf16": OLD.LEFT_OUT_BECAUSE, "amx": NO_SUCH}),
        (OLD, AVX512, dict.fromkeys(("avx512_bf16", "amx"), NO_SUCH)),
        (OLD, f"{AVX512} amx_tile amx_bf16", dict.fromkeys(("avx512_bf16", "amx"), NO_SUCH)),  # amx needs both
        (Extension("avx2"), "avx2 fma f16c", dict.fromkeys(("avx512", "avx512_bf16", "amx"), NO_SUCH)),
        (
            Extension("avx2", "avx512", "avx512_bf16"),
            f"{AVX512} avx512_bf16 amx_tile amx_bf16",
            {"amx": NOT_PERMITTED},
        ),
        (Extension("avx2", "avx512", "avx512_bf16", "amx"), AVX512, {}),  # as with emulated tiles
        (Extension(left_out=("avx2", "amx")), "", {"avx2": OLD.LEFT_OUT_BECAUSE, "amx": OLD.LEFT_OUT_BECAUSE}),
        (None, AVX512, {}),
    ],
)
def test_why_an_instruction_set_is_missing(
    extension: Extension | None, flags: str, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_C", extension)
    monkeypatch.setattr(native, "cpuinfo", {"flags": flags}.get)
    found = native.missing()
    assert {isa: why for isa, why in found.items() if flags or isa in expected} == expected


def test_what_linux_says_of_the_first_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_CPUINFO", tmp_path / "cpuinfo")
    assert native.cpuinfo("flags") == ""
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: A CPU: 2\n\nprocessor\t: 1\nmodel name\t: other\n")
    assert native.cpuinfo("model name") == "A CPU: 2"
    assert native.cpuinfo("flags") == ""


@pytest.mark.parametrize(
    ("extension", "asked", "expected"),
    [
        (Extension("avx2", "avx512"), None, ("avx512", "the best of avx2, avx512")),
        (Extension("avx2", "avx512"), "", ("avx512", "the best of avx2, avx512")),
        (Extension("avx2", "avx512"), "avx2", ("avx2", "ADAPTERKERN_CPU_ISA=avx2 is set")),
        (Extension("avx2", "avx512"), "none", (None, "ADAPTERKERN_CPU_ISA=none is set")),
        (Extension(), None, (None, "no instruction set with kernels is in both this machine and this build")),
        (None, None, (None, "it is missing")),
        (None, "none", (None, "ADAPTERKERN_CPU_ISA=none is set")),
        (Extension("avx2"), "foo", "ADAPTERKERN_CPU_ISA: expected one of avx2, none, got 'foo'$"),
        (Extension("avx2"), "amx", f"ADAPTERKERN_CPU_ISA: expected one of avx2, none, got 'amx': {NO_SUCH}$"),
        (None, "avx2", r"ADAPTERKERN_CPU_ISA: expected one of none \(it is missing\), got 'avx2'"),
    ],
)
def test_the_instruction_set(
    extension: Extension | None,
    asked: str | None,
    expected: tuple[str | None, str] | str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "_C", extension)
    monkeypatch.setattr(native, "cpuinfo", {"flags": "avx2 fma f16c"}.get)
    monkeypatch.setattr(native, "MISSING", "" if extension else "it is missing")
    monkeypatch.delenv("ADAPTERKERN_CPU_ISA", raising=False)
    if asked is not None:
        monkeypatch.setenv("ADAPTERKERN_CPU_ISA", asked)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            native.instruction_set.__wrapped__()
    else:
        assert native.instruction_set.__wrapped__() == expected


def test_an_extension_of_an_older_version() -> None:
    """A checkout that was not built again."""
    code = (
        "import sys, types; sys.modules['adapterkern._C'] = types.ModuleType('adapterkern._C')\n"
        "from adapterkern.ops import native; print(native.instruction_set(), native.left_out())\n"
        "from adapterkern import optim; print(optim.backend('cpu'))\n"
        "from adapterkern.ops.kernels import clusters; print(clusters.capacity(clusters.Pass.FORWARD, 64, 4096, None))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    why = "the extension adapterkern._C is older than this package: install adapterkern again"
    assert done.stdout == f"{(None, why)} {([], '')}\n{('torch fused AdamW', why)}\n{(0, why)}\n"


@pytest.mark.parametrize(
    ("shape", "r", "dtype", "with_grad", "expected"),
    [
        ((16, 4096), 64, torch.bfloat16, False, False),
        ((15, 4096), 64, torch.bfloat16, False, True),
        ((4, 32, 576), 64, torch.bfloat16, True, False),
        ((127, 576), 64, torch.bfloat16, True, True),
        ((512, 4096), 256, torch.float16, True, False),
        ((511, 4096), 256, torch.float16, True, True),
        ((128, 576), 64, torch.float32, False, False),
        ((2048, 576), 16, torch.float32, False, True),  # too little work per row
        ((64, 4096), 64, torch.float32, True, False),
        ((63, 4096), 64, torch.float32, True, True),
        ((255, 4096), 256, torch.float32, True, True),
        ((0, 576), 64, torch.float32, False, True),
    ],
)
def test_where_eager_is_the_faster_one_beside_the_cpu_kernels(
    shape: tuple[int, ...],
    r: int,
    dtype: torch.dtype,
    with_grad: bool,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choice, "INTERPRETED", False)
    monkeypatch.setattr(choice, "runs_native", lambda kind, dtype: True)
    assert choice.prefers_eager(torch.empty(shape, dtype=dtype), r, with_grad) is expected
    assert not choice.prefers_eager(torch.empty(shape, dtype=dtype, device="meta"), r, with_grad)
