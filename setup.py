"""Builds adapterkern._C: the CPU twin always, the adapter's CPU kernels for the instruction sets that the compiler
knows, and the CUDA kernels if nvcc is found.

The sources include no torch header: the build needs a C++17 compiler, pybind11 and ninja, but no torch, and the module
works with every version of it. ninja compiles the files in parallel, and only those that have changed.

    ADAPTERKERN_CUDA_ARCH="90;100"   compile for these architectures; default: all generations >= sm_80
    ADAPTERKERN_REQUIRE_CUDA=1       a missing or failing toolkit is an error instead of a warning
    ADAPTERKERN_CXXFLAGS             more flags for the C++ sources and the linker, for tests
    CXX, CUDA_HOME                   the compiler and the toolkit to use
"""

import os
import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path

import ninja
import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

HERE = Path(__file__).resolve().parent
# No contraction and no reassociation: see csrc/clipped_adamw.h. Square roots are vectorized only without errno.
CXX_FLAGS = "-std=c++17 -O3 -fno-math-errno -fno-trapping-math -ffp-contract=off -fPIC -fvisibility=hidden -Wall"
NVCC_FLAGS = "-std=c++17 -O3 --threads 0 -Xptxas -v -Xcompiler -fPIC,-fvisibility=hidden"
OPTIMIZER_FLAGS = "-fmad=false"
# Architectures with the clusters that csrc/adapter_cluster_forward.h is written for. Their code runs on no other.
CLUSTER_ARCHITECTURES = (90, 100)
# The adapter's kernels for a CPU, once per instruction set (csrc/adapter_cpu.h); one that the compiler does not know is
# left out. Contraction is what the products are made of. gcc 12 warns of its own intrinsics; clang lacks some warnings.
_AVX512 = "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512"
INSTRUCTION_SETS = {
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": _AVX512,
    "avx512bf16": f"{_AVX512} -mavx512bf16",
    "amx": f"{_AVX512} -mavx512bf16 -mamx-tile -mamx-bf16",
}
KERNEL_FLAGS = (
    "-ffp-contract=fast -Wno-unknown-warning-option -Wno-psabi -Wno-ignored-attributes -Wno-maybe-uninitialized "
    "-Wno-uninitialized"
)
BUILD_NINJA = """\
ninja_required_version = 1.5
rule cxx
  command = {cxx} {cxx_flags} $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule nvcc
  command = {nvcc} {nvcc_flags} $flags -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {link} $in -o $out
{edges}
build {target}: link {objects}
"""


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME if set, else of the search path, else of the default location; None if it is not there."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        candidates = [Path(home) / "bin" / "nvcc"]
    else:
        on_path = shutil.which("nvcc")
        candidates = [Path(on_path)] if on_path else []
        candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((nvcc for nvcc in candidates if nvcc.is_file()), None)


def architectures(nvcc: Path) -> list[int]:
    """The architectures to compile for. One per generation is enough: code for sm_X.0 runs on sm_X.Y."""
    chosen = os.environ.get("ADAPTERKERN_CUDA_ARCH")
    if chosen:
        try:
            return sorted({int(arch) for arch in chosen.split(";")})
        except ValueError:
            raise ValueError(f"ADAPTERKERN_CUDA_ARCH: expected integers such as '80;90', got {chosen!r}") from None
    listed = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout
    known = sorted(int(line.removeprefix("compute_")) for line in listed.split())
    oldest = {arch // 10: arch for arch in reversed(known)}
    found = sorted(arch for arch in oldest.values() if arch >= 80)
    if not found:
        raise CompileError(f"{nvcc} knows no architecture >= sm_80")
    return found


class BuildWithNinja(build_ext):
    """Builds the extension with ninja. If the CUDA build fails, the extension is built without CUDA kernels."""

    def build_extension(self, ext: Extension) -> None:
        cxx = shutil.which((os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()[0])
        cxx = cxx or shutil.which("c++")
        if cxx is None:
            raise CompileError(
                "adapterkern compiles its optimizer on install and found no C++ compiler: expected one in CXX or on "
                "the search path (for example: apt-get install g++)"
            )
        require_cuda = os.environ.get("ADAPTERKERN_REQUIRE_CUDA") == "1"
        nvcc = find_nvcc()
        try:
            if nvcc is None:
                raise CompileError("nvcc was found neither in CUDA_HOME nor on the search path")
            self.ninja(ext, cxx, nvcc)
        except (CompileError, subprocess.CalledProcessError) as error:
            if require_cuda:
                raise CompileError(f"ADAPTERKERN_REQUIRE_CUDA=1, and the CUDA build failed: {error}") from error
            self.warn(f"{'*' * 80}\nadapterkern is built WITHOUT CUDA kernels: {error}\n{'*' * 80}")
            self.ninja(ext, cxx, None)

    def instruction_sets(self, cxx: str, flags: str) -> dict[str, str]:
        """Those of this architecture that the compiler and the assembler know, with their flags."""
        if platform.machine().lower() not in ("x86_64", "amd64"):
            return {}
        known = {}
        for name, own in INSTRUCTION_SETS.items():
            source, probe = HERE / f"csrc/adapter_cpu_{name}.cpp", Path(self.build_temp).resolve() / f"{name}.probe"
            asked = subprocess.run(
                [cxx, *f"{flags} {KERNEL_FLAGS} {own} -O0 -c".split(), source, "-o", probe],
                capture_output=True,
                text=True,
            )
            probe.unlink(missing_ok=True)
            if asked.returncode == 0:
                known[name] = own
            else:
                self.warn(f"no adapter kernels for {name}: {cxx} does not compile them ({asked.stderr.strip()[:200]})")
        return known

    def ninja(self, ext: Extension, cxx: str, nvcc: Path | None) -> None:
        """Write build.ninja and run it. The flags are part of each command, so changing them rebuilds."""
        more = os.environ.get("ADAPTERKERN_CXXFLAGS", "")
        flags = f"{CXX_FLAGS} -I{sysconfig.get_path('include')} -I{pybind11.get_include()} {more}"
        link = f"{cxx} -shared -pthread {more}"
        nvcc_flags = ""
        own_flags: dict[str, str] = {}  # of a source, by its name
        if nvcc:
            flags += " -DADAPTERKERN_WITH_CUDA"
            known = architectures(nvcc)
            code = [f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in known]
            code.append(f"-gencode arch=compute_{known[-1]},code=compute_{known[-1]}")
            nvcc_flags = f"-ccbin {cxx} {NVCC_FLAGS}"
            own_flags["clipped_adamw_cuda"] = f"{OPTIMIZER_FLAGS} {' '.join(code)}"
            if clusters := [arch for arch in known if arch in CLUSTER_ARCHITECTURES]:
                flags += " -DADAPTERKERN_WITH_CLUSTERS"
                code = [f"-gencode arch=compute_{arch}a,code=sm_{arch}a" for arch in clusters]
                own_flags["adapter_cluster"] = " ".join(code)
            # Linked by nvcc, which finds its own libraries. The runtime is static and hidden: the module loads without
            # a driver, and beside a torch with another version of the runtime.
            link = f"{nvcc} -ccbin {cxx} -shared -cudart static -Xlinker --exclude-libs,ALL,-s -Xcompiler -pthread"
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        kernels = self.instruction_sets(cxx, flags)
        # Of the one source that reads them: what the compiler knows costs no other source a build.
        own_flags["adapter_cpu"] = " ".join(f"-DAK_WITH_{name.upper()}" for name in kernels)
        own_flags |= {f"adapter_cpu_{name}": f"{KERNEL_FLAGS} {own}" for name, own in kernels.items()}
        sources = [HERE / source for source in ext.sources]
        sources = [source for source in sources if source.suffix != ".cu" or source.stem in own_flags]
        sources += [HERE / f"csrc/adapter_cpu_{name}.cpp" for name in kernels]
        edges = []
        for source in sources:
            edges.append(f"build {source.name}.o: {'nvcc' if source.suffix == '.cu' else 'cxx'} {source}")
            if source.stem in own_flags:
                edges.append(f"  flags = {own_flags[source.stem]}")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(
            BUILD_NINJA.format(
                cxx=cxx,
                cxx_flags=flags,
                nvcc=nvcc,
                nvcc_flags=nvcc_flags,
                link=link,
                edges="\n".join(edges),
                target=target,
                objects=" ".join(f"{s.name}.o" for s in sources),
            )
        )
        subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", build, *(["-v"] if self.verbose > 1 else [])], check=True)


setup(
    ext_modules=[
        Extension(
            "adapterkern._C",
            [
                *("csrc/bindings.cpp", "csrc/clipped_adamw_cpu.cpp", "csrc/clipped_adamw_cuda.cu"),
                *("csrc/adapter_bindings.cpp", "csrc/adapter_cpu.cpp"),
                *("csrc/cluster_bindings.cpp", "csrc/adapter_cluster.cu"),
            ],
            depends=sorted(f"csrc/{p.name}" for p in HERE.glob("csrc/*") if p.suffix == ".h" or "_cpu_" in p.name),
        )
    ],
    cmdclass={"build_ext": BuildWithNinja},
)
