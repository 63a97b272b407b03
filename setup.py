"""Builds the native modules, and says where packages are; everything else is in pyproject.toml."""

import concurrent.futures
import functools
import glob
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sysconfig

import jaxlib
import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

JAXLIB_HEADERS = f"{jaxlib.__path__[0]}/include"
# Python's own flags have -g; debug information would be 15 of 16 MB, and holds paths of the build machine.
FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Werror", "-Wno-psabi", "-pthread"]

# One binary serves every machine: kernels.cc is compiled once per entry, and isa.cc picks at run time.
ISA_FLAGS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma"]
    ISA_FLAGS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]


# CUDA: on, off, or auto, which is on where nvcc is found. Devices that are not listed run code of their own
# generation, or else PTX. XLA_OPS_CUDA_ARCHITECTURES=90 builds for one of them, in a fraction of the time.
USE_CUDA = os.environ.get("XLA_OPS_CUDA", "auto")
CUDA_ARCHITECTURES = os.environ.get("XLA_OPS_CUDA_ARCHITECTURES", "75,80,86,89,90,100,120").split(",")
CUDA_PTX = 90
OLDEST_CUDA = (12, 1)  # the first with atomic additions of four floats
NVCC_FLAGS = ["-std=c++17", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v"]
NVCC_FLAGS += [f"-Xcompiler={flag}" for flag in ("-fPIC", *FLAGS[2:])]


@functools.cache
def find_nvcc():
    """The path of nvcc, or None where no CUDA module is to be built."""
    if USE_CUDA not in ("on", "off", "auto"):
        raise SystemExit(f"error: XLA_OPS_CUDA must be on, off or auto, got {USE_CUDA!r}")
    if USE_CUDA == "off":
        return None
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")
    if nvcc is None:
        if USE_CUDA == "on":
            raise SystemExit(
                f"error: XLA_OPS_CUDA=on, but nvcc was found neither in {home}/bin nor on the PATH. "
                "Install the CUDA toolkit, or set CUDA_HOME."
            )
        return None
    without = "Set XLA_OPS_CUDA=off to build for CPUs only, or CUDA_HOME for another toolkit."
    try:
        output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"error: {nvcc} does not run ({error}). {without}") from error
    release = re.search(r"release (\d+)\.(\d+)", output)
    if release is None or tuple(map(int, release.groups())) < OLDEST_CUDA:
        found = release.group(0) if release else output
        oldest = ".".join(map(str, OLDEST_CUDA))
        raise SystemExit(f"error: {nvcc} is of {found}; CUDA {oldest} or later is needed. {without}")
    return nvcc


class BuildExt(build_ext):
    """Builds the CPU module, whose kernels are compiled per instruction set, and the CUDA module."""

    def build_extensions(self):
        """Builds the extension modules, without the RPATH that some builds of Python add when they link."""
        for name in ("linker_so", "linker_so_cxx"):
            if command := getattr(self.compiler, name, None):
                setattr(self.compiler, name, [flag for flag in command if not flag.startswith("-Wl,-rpath")])
        super().build_extensions()

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
        if ext.name == "xla_ops._cuda":
            self.build_cuda(ext, compiler)
            return
        for isa, flags in ISA_FLAGS.items():
            ext.extra_objects += self.compiler.compile(
                ["xla_ops/csrc/cpu/kernels.cc"],
                output_dir=f"{self.build_temp}/{isa}",
                macros=[("XLA_OPS_ISA", isa)],
                extra_postargs=[*FLAGS, "-fno-math-errno", *flags],
                depends=ext.depends,
            )
        super().build_extension(ext)

    def build_cuda(self, ext, compiler):
        """Builds the CUDA module with nvcc; what ptxas says of each kernel is left for the tests to read."""
        nvcc = [find_nvcc(), "-ccbin", compiler]
        module = pathlib.Path(self.get_ext_fullpath(ext.name))
        if not self.force and not newer_group(ext.depends, str(module)):
            return
        known = subprocess.run([*nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
        architectures = [a for a in CUDA_ARCHITECTURES if f"compute_{a}\n" in known]
        code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
        code.append(f"-gencode=arch=compute_{CUDA_PTX},code=compute_{CUDA_PTX}")
        headers = [JAXLIB_HEADERS, pybind11.get_include(), sysconfig.get_path("include")]
        directory = pathlib.Path(self.build_temp) / "cuda"
        directory.mkdir(parents=True, exist_ok=True)
        module.parent.mkdir(parents=True, exist_ok=True)

        def run(*arguments):
            finished = subprocess.run([*nvcc, *arguments], capture_output=True, text=True)
            if finished.returncode != 0:
                output = finished.stdout + finished.stderr
                raise SystemExit(f"{output}\nerror: nvcc failed. XLA_OPS_CUDA=off builds for CPUs only.")
            return finished.stderr

        def compile_one(source):
            target = directory / f"{pathlib.Path(source).stem}.o"
            options = code if source.endswith(".cu") else [f"-isystem={path}" for path in headers]
            return target, run(*NVCC_FLAGS, *options, "-c", source, "-o", target)

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            objects, logs = zip(*pool.map(compile_one, ext.sources), strict=True)
        run("-shared", "-cudart=static", *objects, "-o", module)
        pathlib.Path("xla_ops/_cuda_resources.txt").write_text("".join(logs))


extensions = [
    Extension(
        "xla_ops._cpu",
        sources=sorted({*glob.glob("xla_ops/csrc/cpu/*.cc")} - {"xla_ops/csrc/cpu/kernels.cc"}),
        depends=glob.glob("xla_ops/csrc/*.h") + glob.glob("xla_ops/csrc/cpu/**/*.*", recursive=True),
        define_macros=[("XLA_OPS_X86_VARIANTS", None)] if len(ISA_FLAGS) > 1 else [],
        extra_compile_args=[*FLAGS, "-isystem", JAXLIB_HEADERS, "-isystem", pybind11.get_include()],
        extra_link_args=["-pthread"],
        language="c++",
    )
]
if find_nvcc() is not None:
    extensions.append(
        Extension(
            "xla_ops._cuda",
            sources=sorted(glob.glob("xla_ops/csrc/cuda/*.c[cu]")),
            depends=["setup.py", *glob.glob("xla_ops/csrc/*.h"), *glob.glob("xla_ops/csrc/cuda/*")],
        )
    )

# The programs are `sparse_xmc.experiments` where they are installed, so that users may have an `experiments`;
# in a clone they are `experiments` too.
PROGRAMS = [f"sparse_xmc.{package}" for package in find_packages(include=["experiments*"])]

setup(
    packages=[*find_packages(include=["xla_ops*", "sparse_xmc*"]), *PROGRAMS],
    package_dir={"sparse_xmc.experiments": "experiments"},
    ext_modules=extensions,
    cmdclass={"build_ext": BuildExt},
)
