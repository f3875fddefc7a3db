"""Fills a Triton cache for sm_90, on all cores, with or without a GPU, through Triton's own compile path.

A launch finds its variant by a key made of the kernel's source and line, signature, options, and the bytes of Triton's
installation; no path is part of it. Besides the code, Triton 3.6 compiles a launcher in C per signature into the same
cache; where no driver is installed, a stub of libcuda lets it link.
"""

import argparse
import contextlib
import ctypes
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.compiler import ASTSource

from bench.gpu.carried import CALLS
from bench.gpu.variants import TARGET, Compilation, compilations, of_call

_work: Sequence[Compilation] = ()  # inherited by the forked workers


def warm(work: Sequence[Compilation], processes: int) -> dict[str, Any]:
    """Compile what the cache lacks; returns counts of hits and misses, and the failures with their reasons."""
    global _work
    _work = work
    start = time.monotonic()
    done: dict[str, Any] = {"variants": len(work), "hits": 0, "misses": 0, "launchers": 0, "failed": []}
    with tempfile.TemporaryDirectory() as folder:
        _load_libcuda(Path(folder))
        for i, hit, launcher, error in _compiled(processes):
            done["hits" if hit else "misses"] += 1
            done["launchers"] += launcher
            if error:
                name = work[i].kernel.fn.__name__
                done["failed"].append({"kernel": name, "error": error, "optional": work[i].optional})
    os.environ.pop("TRITON_LIBCUDA_PATH", None)
    return done | {"seconds": round(time.monotonic() - start, 1)}


def _compiled(processes: int) -> Iterator[tuple[int, bool, bool, str]]:
    """The results of ``_compile`` in order of completion. A crash of the compiler costs only its own variant."""
    context = multiprocessing.get_context("fork")
    left = dict.fromkeys(range(len(_work)))
    with ProcessPoolExecutor(processes, mp_context=context) as pool, contextlib.suppress(BrokenProcessPool):
        for job in as_completed([pool.submit(_compile, i) for i in left]):
            result = job.result()
            del left[result[0]]
            yield result
    for i in left:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            try:
                yield pool.submit(_compile, i).result()
            except BrokenProcessPool:
                yield i, False, False, "the compiler crashed"


def _compile(i: int) -> tuple[int, bool, bool, str]:
    """Compile one variant and its launcher: (i, whether it was cached, whether the launcher was compiled, error)."""
    w = _work[i]
    hits = []
    knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    try:
        source = ASTSource(w.kernel, w.signature, w.constants, w.attributes)
        kernel = triton.compile(source, target=TARGET, options=w.options)
        return i, hits[0], _make_launcher(kernel), ""
    except Exception as error:
        return i, False, False, f"{type(error).__name__}: {str(error)[:500]}"


def _make_launcher(kernel: Any) -> bool:
    """Make the launcher of ``kernel``; returns whether the C compiler ran."""
    made = []
    compile_c = nvidia.compile_module_from_src.__globals__["_build"]

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(args)
        return compile_c(*args, **kwargs)

    nvidia.compile_module_from_src.__globals__["_build"] = counted
    try:
        nvidia.CudaUtils()
        if hasattr(nvidia, "make_launcher"):  # later versions launch every signature with one module
            nvidia.CudaLauncher(kernel.src, kernel.metadata)
    finally:
        nvidia.compile_module_from_src.__globals__["_build"] = compile_c
    return bool(made)


def _load_libcuda(folder: Path) -> None:
    """Where no driver is installed, load a stub that has every function that Triton's modules name, to link with."""
    try:
        ctypes.CDLL("libcuda.so.1", ctypes.RTLD_GLOBAL)
        return
    except OSError:
        pass  # no driver
    texts = [(Path(nvidia.__file__).parent / name).read_text() for name in ("driver.c", "driver.py")]
    names = sorted({name for text in texts for name in re.findall(r"\bcu[A-Z]\w+", text)})
    source, library = folder / "libcuda.c", folder / "libcuda.so.1"
    source.write_text("".join(f"int {name}(void) {{ return 999; }}\n" for name in names))
    flags = ["-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([os.environ.get("CC", "gcc"), *flags, "-o", str(library), str(source)], check=True)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)  # where the linker looks


def main(argv: list[str]) -> int:
    """``python -m bench.gpu.warm first|second|cost``: compile what the cache lacks, and print what it had."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.warm", description=main.__doc__)
    parser.add_argument("call", choices=CALLS)
    parser.add_argument("--ab", nargs="*", default=[], metavar="TABLE=TILES")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", type=int, help="compile at most this many variants")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the workers are forked, and nothing here launches
    start = time.monotonic()
    work = compilations(of_call(args.call, args.ab))[: args.only]
    listed = round(time.monotonic() - start, 1)
    done = warm(work, args.processes) | {"listed_in": listed}
    for failure in done["failed"]:
        print(f"{failure['kernel']}: {failure['error']}" + (" (a candidate)" if failure["optional"] else ""))
    print(", ".join(f"{k} {v}" for k, v in done.items() if k != "failed"), f"failed {len(done['failed'])}", sep=", ")
    if args.json:
        args.json.write_text(json.dumps(done, indent=1))
    return int(any(not f["optional"] for f in done["failed"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
