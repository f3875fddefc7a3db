"""What a bare machine lacks, in one folder, which ``prepare`` makes where there is git and no GPU.

old/kernels      the kernels of the commit to compare with
lib/_C*.so       the extension for this interpreter
site/            liger-kernel, which is pure Python
cache.tar.xz     compiled kernels and launchers for sm_90
manifest.json    versions and commits
"""

import importlib.metadata
import json
import lzma
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

from adapterkern.files import replacing, write_json
from bench import before

ROOT = before.ROOT
CALLS = ("first", "second", "cost")  # that launch kernels on the machine
CACHE, MANIFEST = "cache.tar.xz", "manifest.json"
GROUP = "__grp__"


def versions() -> dict[str, str | None]:
    """The versions that compiled code depends on."""
    found: dict[str, str | None] = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in ("torch", "triton"):
        try:
            found[name] = importlib.metadata.version(name).partition("+")[0]  # without the build
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def mismatches(folder: Path) -> list[str]:
    """What in the folder was made for other versions than this machine's, and the consequence."""
    path = folder / MANIFEST
    if not path.is_file():
        return [f"no {MANIFEST} in {folder.name}/: nothing was prepared, so everything is compiled here"]
    try:
        made = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        return [f"{MANIFEST} in {folder.name}/ cannot be read, so the folder's contents are unknown: {error}"]
    here = versions()
    costs = {"triton": "the cache is useless", "python": "neither the extension nor the launchers load"}
    return [
        f"prepared for {name} {made.get(name)}, and this is {version}: {costs.get(name, 'nothing depends on it')}"
        for name, version in here.items()
        if made.get(name) != version
    ]


def environment(folder: Path, cache: Path) -> dict[str, str]:
    """The environment variables with which a process finds what was carried."""
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = os.pathsep.join(p for p in (str(ROOT), str(folder / "site"), *inherited) if p)
    return {"PYTHONPATH": path, before.VARIABLE: str(folder / "old"), "TRITON_CACHE_DIR": str(cache)}


def pack_cache(cache: Path, archive: Path) -> int:
    """Pack what a launch reads of a Triton cache, with group files that name no folder; returns the archive's bytes."""
    with replacing(archive) as temporary, tarfile.open(temporary, "w:xz", preset=9) as tar:
        for path in sorted(cache.glob("*/*")):
            if path.name.startswith(GROUP):
                _add(tar, path, _group(path, ""))
            elif path.suffix in (".json", ".cubin", ".so"):
                _add(tar, path, path.read_bytes())
    return archive.stat().st_size


def unpack_cache(archive: Path, cache: Path) -> int:
    """Unpack, and rewrite the group files to name the files' new paths; returns the number of kernels.

    An archive that cannot be read completely leaves an empty cache: everything is then compiled.
    """
    cache.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(cache, filter="data")
    except (OSError, EOFError, lzma.LZMAError, tarfile.TarError) as error:
        print(f"warning: {archive.name} cannot be unpacked, so everything is compiled here: {error}", flush=True)
        for path in cache.iterdir():
            shutil.rmtree(path)
    groups = list(cache.glob(f"*/{GROUP}*"))
    for path in groups:
        path.write_bytes(_group(path, f"{path.parent}{os.sep}"))
    return len(groups)


def _group(path: Path, prefix: str) -> bytes:
    """A group file's new content: the children that a launch reads, with ``prefix`` before their names."""
    names = [n for n in json.loads(path.read_text())["child_paths"] if n.endswith((".json", ".cubin"))]
    return json.dumps({"child_paths": {name: prefix + name for name in names}}).encode()


def _add(tar: tarfile.TarFile, path: Path, content: bytes) -> None:
    member = tarfile.TarInfo(f"{path.parent.name}/{path.name}")
    member.size, member.mode = len(content), 0o755 if path.suffix == ".so" else 0o644
    tar.addfile(member, BytesIO(content))


LOADING = """
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
module_from_spec(PathFinder.find_spec("_C", ["adapterkern"]))
"""


def extension_loads() -> bool:
    """Whether ``adapterkern._C`` exists and loads; checked without torch, whose first import is slow."""
    done = subprocess.run([sys.executable, "-c", LOADING], cwd=ROOT, capture_output=True, check=False)
    return done.returncode == 0


def place_extension(folder: Path) -> str:
    """Copy the carried ``adapterkern._C`` into place if none loads; returns a line that says what was done."""
    if extension_loads():
        return "adapterkern._C is there and loads"
    carried = list((folder / "lib").glob("_C*.so"))
    try:
        for path in carried:
            shutil.copy2(path, ROOT / "adapterkern" / path.name)
    except OSError as error:
        return f"the carried adapterkern._C finds no place: {error}"
    if carried and extension_loads():
        return "the carried adapterkern._C loads"
    for path in carried:
        (ROOT / "adapterkern" / path.name).unlink()
    return "adapterkern._C does not load" if carried else "no adapterkern._C was carried"


# prepare


def prepare(folder: Path, old: str, parts: list[str], processes: int) -> int:
    """Fill ``folder``; a part that fails does not stop the others. Returns the exit status."""
    folder.mkdir(parents=True, exist_ok=True)
    made: dict[str, Any] = {"commit": _head(), **versions(), "machine": platform.machine()}
    if (folder / MANIFEST).is_file():
        made = json.loads((folder / MANIFEST).read_text()) | made
    todo: dict[str, Callable[[], Any]] = {
        "old": lambda: _old(folder, old),
        "extension": lambda: _extension(folder / "lib"),
        "liger": lambda: _liger(folder / "site"),
        "cache": lambda: _cache(folder, processes),
    }
    failed = 0
    for name in parts:
        start = time.monotonic()
        try:
            made[name] = todo[name]()
            print(f"{name}: {made[name]}, {time.monotonic() - start:.0f} s", flush=True)
        except Exception as error:
            failed = 1
            output = getattr(error, "stderr", None) or b""
            print(f"{name}: failed: {error}\n{output.decode(errors='replace')[-2000:]}", flush=True)
    write_json(folder / MANIFEST, made)
    return failed


PARTS = ("old", "extension", "liger", "cache")


def _head() -> str | None:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def _old(folder: Path, commit: str) -> str:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        found = before.extract(commit, Path(name) / "old")
        shutil.rmtree(folder / "old", ignore_errors=True)
        (Path(name) / "old").rename(folder / "old")
    return found


def _extension(folder: Path) -> str:
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", name, "--build-temp", name]
        more = {"ADAPTERKERN_REQUIRE_CUDA": "1", "ADAPTERKERN_CUDA_ARCH": "90"}
        subprocess.run(command, cwd=ROOT, env={**os.environ, **more}, check=True, capture_output=True)
        (library,) = Path(name).glob("adapterkern/_C*.so")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        shutil.copy2(library, folder)
        return f"{library.name}, {library.stat().st_size} bytes"


def _liger(folder: Path) -> str:
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        made = Path(name) / "site"
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-compile",
            "--target",
            str(made),
        ]
        subprocess.run([*command, "-c", "constraints.txt", "liger-kernel"], cwd=ROOT, check=True, capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    return next(path.name for path in folder.glob("liger_kernel-*"))


def _cache(folder: Path, processes: int) -> str:
    """Compile what the archive lacks and pack the cache again; the first time takes minutes."""
    with tempfile.TemporaryDirectory() as name:
        cache = Path(name)
        if (folder / CACHE).is_file():
            unpack_cache(folder / CACHE, cache)
        said, failed = [], []
        for call in CALLS:
            report = cache / f"{call}.json"
            options = ["--processes", str(processes), "--json", str(report)]
            command = [sys.executable, "-m", "bench.gpu.warm", call, *options]
            found = {**os.environ, **environment(folder, cache), "TRITON_INTERPRET": "0"}
            done = subprocess.run(command, cwd=ROOT, env=found, check=False, capture_output=True, text=True)
            if not report.is_file():
                raise RuntimeError(f"{call}: exit {done.returncode}\n{done.stderr[-2000:]}")
            made = json.loads(report.read_text())
            said.append(f"{call}: {made['variants']} variants, {made['hits']} there, in {made['seconds']} s")
            candidates = sum(f["optional"] for f in made["failed"])
            said += [f"{candidates} candidates do not compile"] * bool(candidates)
            failed += [f"{f['kernel']}: {f['error']}" for f in made["failed"] if not f["optional"]]
        said.append(f"{pack_cache(cache, folder / CACHE) / 2**20:.1f} MiB packed")
        if failed:  # what compiled is packed in any case
            raise RuntimeError("\n".join(["; ".join(said), *failed]))
        return "; ".join(said)
