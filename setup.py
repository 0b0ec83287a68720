"""Build the kernels of csrc where that is possible; the package works without them.

BVPO_USE_CPP=0 leaves the CPU kernels out, BVPO_USE_CUDA=0 the CUDA kernels. BVPO_SANITIZE=1 builds
the CPU kernels with the address and undefined-behaviour sanitizers (`make asan`).
"""

import os
import sys
from pathlib import Path

from setuptools import setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
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
    flags = ["-O3", "-g0", "-std=c++20", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wall",
             "-Wno-psabi", "-Wno-unknown-pragmas"]  # fmt: skip
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


def extensions():
    if os.environ.get("BVPO_USE_CPP") == "0":
        say("BVPO_USE_CPP=0: the C++ kernels are not built; the other backends work")
        return []
    if BuildExtension is None:
        say("torch is not importable here (use --no-build-isolation): no C++ kernels are built")
        return []
    return [cpu_extension()]


def optional_build():
    """BuildExtension that drops an extension which fails to compile instead of failing."""

    class OptionalBuild(BuildExtension):
        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:
                reason = str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)
                say(f"the C++ kernels could not be built ({reason}); the other backends work")
                self.extensions = []  # a new list: the distribution keeps its own

    return OptionalBuild


modules = extensions()
setup(ext_modules=modules, cmdclass={"build_ext": optional_build()} if modules else {})
