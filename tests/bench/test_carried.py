"""What is carried to a GPU: compiled kernels that are found elsewhere, versions that do not fit, old kernels."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import before
from bench.gpu import carried

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_a_cache_that_cannot_be_read_is_an_empty_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cache.tar.xz").write_bytes(b"no archive")
    assert carried.unpack_cache(tmp_path / "cache.tar.xz", tmp_path / "cache") == 0
    assert "cannot be unpacked" in capsys.readouterr().out
    (tmp_path / carried.MANIFEST).write_text("{")
    assert "cannot be read" in carried.mismatches(tmp_path)[0]


def test_a_packed_cache_finds_its_files_where_it_is_unpacked(tmp_path: Path) -> None:
    made = tmp_path / "made" / "KEY"
    made.mkdir(parents=True)
    for name in ("k.json", "k.cubin", "k.ptx", "k.source"):
        (made / name).write_text(name)
    (made / "__grp__k.json").write_text(json.dumps({"child_paths": {p.name: str(p) for p in made.glob("k.*")}}))
    (tmp_path / "made" / "OTHER").mkdir()
    (tmp_path / "made" / "OTHER" / "launcher.so").write_bytes(b"so")
    carried.pack_cache(tmp_path / "made", tmp_path / "cache.tar.xz")
    there = tmp_path / "there"
    assert carried.unpack_cache(tmp_path / "cache.tar.xz", there) == 1
    group = json.loads((there / "KEY" / "__grp__k.json").read_text())["child_paths"]
    assert group == {name: str(there / "KEY" / name) for name in ("k.json", "k.cubin")}
    assert all(Path(path).read_text() == name for name, path in group.items())
    assert (there / "OTHER" / "launcher.so").read_bytes() == b"so"
    assert not (there / "KEY" / "k.ptx").exists()


def test_a_carried_variant_is_found_by_another_process_elsewhere(tmp_path: Path) -> None:
    """Compiled in one folder, unpacked in another, found by a copy of the project in a third: nothing is compiled."""

    def warm(root: Path, cache: Path) -> dict[str, Any]:
        report = tmp_path / "warm.json"
        command = [sys.executable, "-m", "bench.gpu.warm", "second", "--only", "1", "--json", str(report)]
        environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0", "PYTHONPATH": str(root)}
        done = subprocess.run(command, cwd=root, env=environment, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(report.read_text())

    assert {"hits": 0, "misses": 1, "launchers": 1}.items() <= warm(ROOT, tmp_path / "made").items()
    carried.pack_cache(tmp_path / "made", tmp_path / "cache.tar.xz")
    carried.unpack_cache(tmp_path / "cache.tar.xz", tmp_path / "there")
    shutil.rmtree(tmp_path / "made")
    elsewhere = tmp_path / "elsewhere"
    for package in ("adapterkern", "bench"):
        shutil.copytree(ROOT / package, elsewhere / package, ignore=shutil.ignore_patterns("results", "*.so"))
    assert {"hits": 1, "misses": 0, "launchers": 0}.items() <= warm(elsewhere, tmp_path / "there").items()


CRASHING = """
import os
from types import SimpleNamespace
from bench.gpu import warm

def compiled(i):
    if i == 1:
        os.abort()
    return i, False, True, ""

warm._compile, warm._load_libcuda = compiled, lambda folder: None
kernel = SimpleNamespace(fn=lambda: None)
done = warm.warm([SimpleNamespace(kernel=kernel, optional=i == 1) for i in range(4)], 2)
assert done["misses"] == 4 and done["launchers"] == 3, done
assert [(f["error"], f["optional"]) for f in done["failed"]] == [("the compiler crashed", True)], done
"""


def test_a_compiler_that_crashes_costs_one_variant() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", CRASHING], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


LISTED = """
import torch
from bench.gpu import variants
from tests.ops import test_gpu
torch.cuda.is_available = lambda: True  # a GPU that nothing may touch
marks = [m.args for m in test_gpu.test_shapes.pytestmark if m.name == "parametrize"]
shapes = next(values for names, values in marks if names == ("T", "d", "r"))
assert set(shapes) == set(variants.TEST_SHAPES), set(shapes) ^ set(variants.TEST_SHAPES)
first, second = (variants.compilations(variants.of_call(c, ["slice_tiles=16,64,8,1"])) for c in ("first", "second"))
kernels = {c.kernel.fn.__name__ for c in first if not c.optional}
print(len(first), len(second), sum(c.optional for c in second), *sorted(kernels))
again = variants.compilations(variants.of_call("first", ["slice_tiles=16,64,8,1"]))
assert [(c.kernel, c.signature) for c in again] == [(c.kernel, c.signature) for c in first]
"""


def test_what_is_compiled_beforehand_covers_the_tests_shapes_and_the_candidates() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", LISTED], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second, optional, *kernels = done.stdout.split()
    assert int(first) > 100
    assert int(second) > int(optional) > 20
    assert {"forward_kernel", "slice_kernel", "hidden_kernel", "_prepare_kernel"} <= set(kernels)


def test_a_folder_made_for_another_triton_gets_a_warning(tmp_path: Path) -> None:
    assert "nothing was prepared" in carried.mismatches(tmp_path)[0]
    here = carried.versions()
    (tmp_path / carried.MANIFEST).write_text(json.dumps(here))
    assert carried.mismatches(tmp_path) == []
    (tmp_path / carried.MANIFEST).write_text(json.dumps(here | {"triton": "0.1"}))
    (warning,) = carried.mismatches(tmp_path)
    assert "prepared for triton 0.1" in warning
    assert "the cache is useless" in warning


def test_no_old_kernels_are_a_missing_variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(before.VARIABLE, str(tmp_path))
    monkeypatch.delitem(sys.modules, before.PACKAGE, raising=False)
    assert before.launch() is None
    assert before.COMMIT in before.missing()
