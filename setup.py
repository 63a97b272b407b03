"""Builds the native modules; everything else about the package is in pyproject.toml."""

import glob
import pathlib
import platform
import shutil
import sysconfig

import jaxlib
import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

JAXLIB_HEADERS = f"{jaxlib.__path__[0]}/include"
FLAGS = ["-std=c++17", "-O3", "-fvisibility=hidden", "-Wall", "-Werror", "-Wno-psabi", "-pthread"]

# One binary serves every machine: kernels.cc is compiled once per entry, and isa.cc picks at run time.
ISA_FLAGS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma"]
    ISA_FLAGS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]


class BuildExt(build_ext):
    """Compiles kernels.cc per instruction set before the rest of the CPU module."""

    def build_extension(self, ext):
        """Builds one extension module."""
        compiler = self.compiler.compiler_cxx[0]
        if shutil.which(compiler) is None:
            raise SystemExit(
                f"error: the C++ compiler {compiler!r} was not found. Install one (Debian, Ubuntu: apt-get "
                "install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install), or set CXX."
            )
        if not (pathlib.Path(sysconfig.get_path("include")) / "Python.h").exists():
            raise SystemExit(
                "error: Python.h was not found. Install Python's headers (Debian, Ubuntu: apt-get install "
                "python3-dev; Fedora: dnf install python3-devel)."
            )
        for isa, flags in ISA_FLAGS.items():
            ext.extra_objects += self.compiler.compile(
                ["xla_ops/csrc/cpu/kernels.cc"],
                output_dir=f"{self.build_temp}/{isa}",
                macros=[("XLA_OPS_ISA", isa)],
                extra_postargs=[*FLAGS, "-fno-math-errno", *flags],
                depends=ext.depends,
            )
        super().build_extension(ext)


setup(
    ext_modules=[
        Extension(
            "xla_ops._cpu",
            sources=sorted({*glob.glob("xla_ops/csrc/cpu/*.cc")} - {"xla_ops/csrc/cpu/kernels.cc"}),
            depends=glob.glob("xla_ops/csrc/cpu/*"),
            define_macros=[("XLA_OPS_X86_VARIANTS", None)] if len(ISA_FLAGS) > 1 else [],
            extra_compile_args=[*FLAGS, "-isystem", JAXLIB_HEADERS, "-isystem", pybind11.get_include()],
            extra_link_args=["-pthread"],
            language="c++",
        )
    ],
    cmdclass={"build_ext": BuildExt},
)
