"""``adapterkern doctor``: versions, devices, what runs where and why, and what to do about it."""

import argparse
import importlib.metadata
import os
import platform
import shutil

import torch

from adapterkern import extension, ops, optim
from adapterkern.cli import cores
from adapterkern.ops import native
from adapterkern.ops.choice import CLUSTERS
from adapterkern.training.parallel.extension import PATIENCE, locks

_PACKAGES = ("torch", "triton", "transformers", "accelerate", "safetensors", "gguf", "rich", "matplotlib", "numpy")
_TRAIN_EXTRA = _PACKAGES[2:]
_OPTIONAL = ("liger-kernel", "deepspeed", "bitsandbytes", "torchao", "trl")  # shown where they are installed
# Beginnings of the environment variables that say what runs, where, on how many threads, and how memory is kept
_VARIABLES = (
    *("ADAPTERKERN_", "TRITON_", "CUDA_VISIBLE_DEVICES", "CXX"),
    *("OMP_", "GOMP_", "KMP_", "MKL_", "ONEDNN_", "DNNL_", "ATEN_"),
    *("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"),
)
# Those of ours: of a run, then of the extension's build. Any other name of this kind is a slip of the pen.
_OURS = {
    *("ADAPTERKERN_API_KEY", "ADAPTERKERN_CACHE", "ADAPTERKERN_CPU_ISA", "ADAPTERKERN_EARLY_LAUNCH"),
    *("ADAPTERKERN_FUSED", "ADAPTERKERN_KERNELS", "ADAPTERKERN_TRACEBACK"),
    *("ADAPTERKERN_CUDA_ARCH", "ADAPTERKERN_CXXFLAGS", "ADAPTERKERN_REQUIRE_CUDA"),
}


def diagnosis() -> list[str]:
    """The lines that the command prints."""
    versions = {name: _version(name) for name in ("adapterkern", *_PACKAGES)} | {"torch": torch.__version__}
    lines = ["versions", f"  {'python':13} {platform.python_version()} on {platform.system()} {platform.machine()}"]
    lines += [f"  {name:13} {version or 'not installed'}" for name, version in versions.items()]
    lines += [f"  {name:13} {version}" for name in _OPTIONAL if (version := _version(name))]

    lines.append(f"  {'C++ compiler':13} {_compiler() or 'none found'} (for --compile)")

    threads, usable = torch.get_num_threads(), cores.usable_cores()
    on = f"{cores.counted(threads, 'thread')} on {cores.counted(usable, 'core')}"
    name = native.cpuinfo("model name") or platform.processor() or platform.machine()
    lines.append("devices")
    lines.append(f"  cpu           {name}, {on}, {torch.backends.cpu.get_cpu_capability()}")
    devices = ["cpu"]
    for index in range(torch.cuda.device_count()):
        devices.append(f"cuda:{index}")
        properties = torch.cuda.get_device_properties(index)
        lines.append(
            f"  cuda:{index}        {properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
        )
    if len(devices) == 1:
        lines.append(f"  no CUDA       {_why_no_cuda()}")

    missing: dict[str, list[str]] = {}
    for isa, why in native.missing().items():
        missing.setdefault(why, []).append(isa)
    elsewhere = [f"  {'on a GPU':13} {_on_a_gpu()}"] if len(devices) == 1 else []
    elsewhere += [f"  {'left out':13} {', '.join(isas)}: {why}" for why, isas in missing.items()]
    for title, backend, more in (("fused adapter", ops.backend, elsewhere), ("ClippedAdamW", optim.backend, [])):
        lines.append(title)
        for device in devices:
            name, reason = backend(torch.device(device))
            lines.append(f"  {device:13} {name}: {reason}")
        lines += more

    settings = [f"  {name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)]
    lines += ["environment", *(settings or ["  nothing set"])]
    advice = _advice(versions) + _lock_advice()
    advice += cores.advice(threads, usable, os.getloadavg()[0])
    return [*lines, "what to do", *(f"  {line}" for line in advice or ["nothing: all is there"])]


def _on_a_gpu() -> str:
    """What would run on one, where there is none."""
    built, _ = extension.load()
    if ops.kernels_asked() == "cluster" and built is not None and built.cluster_columns(0, 64):
        return f"{CLUSTERS}: ADAPTERKERN_KERNELS=cluster is set; a card shows whether it has room for them"
    name, reason = ops.backend(torch.device("cuda", 0))
    return f"{name}: {reason}"


def _lock_advice() -> list[str]:
    return [
        f"{path} is {age / 60:.0f} min old: if no process is compiling an extension now, one was killed while it did; "
        "delete the file, or DeepSpeed waits for it for ever"
        for path, age in locks().items()
        if age > PATIENCE
    ]


def _compiler() -> str | None:
    """The C++ compiler that torch.compile takes on a CPU; None if it finds none."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # takes a second to import

    try:
        return get_cpp_compiler()
    except Exception:  # of torch's own, or of the compiler that does not run
        return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return "this torch is built for CPUs only"
    if shutil.which("nvidia-smi") is None:
        return f"torch is built for CUDA {torch.version.cuda}, but no NVIDIA driver is installed"
    return f"torch is built for CUDA {torch.version.cuda}, but finds no device (see nvidia-smi)"


def _advice(versions: dict[str, str | None]) -> list[str]:
    advice = [
        f"{name} is set and nothing reads it: expected one of {', '.join(sorted(_OURS))}"
        for name in sorted(os.environ)
        if name.startswith("ADAPTERKERN_") and name not in _OURS
    ]
    if missing := [name for name in _TRAIN_EXTRA if versions[name] is None]:
        advice.append(f"for training: pip install 'adapterkern[train]' (missing: {', '.join(missing)})")
    if versions["triton"] is None and torch.cuda.is_available():
        advice.append("for the GPU kernels: pip install triton, in the version that your torch names")
    if native.MISSING:
        advice.append(
            "for the CPU kernels and ClippedAdamW's: install adapterkern again, from its source and with a C++ "
            "compiler (for example: apt-get install g++, then pip install --force-reinstall --no-deps .)"
        )
    why_not, (not_built, because) = native.missing(), native.left_out()
    left_out = [isa for isa in not_built if why_not.get(isa) == because]
    if left_out and platform.machine().lower() in ("x86_64", "amd64"):
        advice.append(f"for the adapter's kernels in {', '.join(left_out)}: install adapterkern with a newer compiler")
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") and torch.version.cuda is None:
            advice.append("there is an NVIDIA driver: install a CUDA build of torch to use it")
        else:
            advice.append("without a GPU everything runs on the CPU")
    return advice


NAME, SUMMARY, HELP = "doctor", "what is installed, what will run where, and why", ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(arguments: argparse.Namespace) -> int:
    print("\n".join(diagnosis()))
    return 0
