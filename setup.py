"""Build the kernels of csrc where that is possible; the package works without them.

BVPO_USE_CPP=0 leaves the CPU kernels out, BVPO_USE_CUDA=0 the CUDA kernels. BVPO_SANITIZE=1 builds
the CPU kernels with the address and undefined-behaviour sanitizers (`make asan`).
"""

import os
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError:  # build isolation without torch: a pure-Python wheel
    BuildExtension = None

ROOT = Path(__file__).parent


def say(message):
    """One line per build: pip also runs this file once to ask for the metadata."""
    if not {"egg_info", "dist_info"} & set(sys.argv):
        print(f"bvpo_kernels: {message}", file=sys.stderr)


def cpu_extension():
    """csrc/cpu for any x86-64 or ARM machine: wider instructions are chosen at run time."""
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "cpu").glob("*.cpp"))
    flags = ["-O3", "-g0", "-std=c++20", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
    flags += ["-Wall", "-Wno-psabi", "-Wno-unknown-pragmas"]
    link = ["-fopenmp"]
    if os.environ.get("BVPO_SANITIZE") == "1":
        flags += ["-O1", "-g", "-fsanitize=address,undefined", "-fno-omit-frame-pointer"]
        link += ["-fsanitize=address,undefined"]
    return CppExtension(
        "bvpo_kernels._cpu",
        sources,
        extra_compile_args={"cxx": flags},
        extra_link_args=link,
    )


def cuda_extension():
    """csrc/cuda on LibTorch's stable ABI: one binary for torch 2.11 and later."""
    sources = sorted(
        str(p.relative_to(ROOT))
        for pattern in ("*.cpp", "*.cu")
        for p in (ROOT / "csrc" / "cuda").glob(pattern)
    )
    flags = ["-O3", "-std=c++20"]
    return CUDAExtension(
        "bvpo_kernels._cuda", sources, extra_compile_args={"cxx": flags, "nvcc": flags}
    )


def wants_cuda():
    if os.environ.get("BVPO_USE_CUDA") == "0":
        say("BVPO_USE_CUDA=0: the CUDA kernels are not built; the other backends work")
        return False
    return bool(torch.version.cuda and CUDA_HOME)


def extensions():
    if BuildExtension is None:
        say("torch is not importable here (use --no-build-isolation): no C++ kernels are built")
        return []
    modules = []
    if os.environ.get("BVPO_USE_CPP") == "0":
        say("BVPO_USE_CPP=0: the C++ kernels are not built; the other backends work")
    else:
        modules.append(cpu_extension())
    if wants_cuda():
        modules.append(cuda_extension())
    return modules


def optional_build():
    """BuildExtension that drops each extension which fails to compile instead of failing."""

    class OptionalBuild(BuildExtension):
        def build_extensions(self):
            wanted, built = self.extensions, []
            for extension in wanted:
                self.extensions = [extension]  # a new list: the distribution keeps its own
                try:
                    super().build_extensions()
                    built.append(extension)
                except Exception as error:
                    lines = str(error).strip().splitlines() or [repr(error)]
                    language = "CUDA" if extension.name.endswith("_cuda") else "C++"
                    say(
                        f"the {language} kernels could not be built ({lines[-1]}); "
                        "the other backends work"
                    )
            self.extensions = built

    return OptionalBuild


modules = extensions()
setup(ext_modules=modules, cmdclass={"build_ext": optional_build()} if modules else {})
