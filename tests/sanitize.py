"""Run the tests of the ops with a CPU module that g++ builds with sanitizers.

    python tests/sanitize.py address      # AddressSanitizer and UndefinedBehaviorSanitizer
    python tests/sanitize.py thread       # ThreadSanitizer
    python tests/sanitize.py thread tests/xla_ops/test_fan_in_loss.py -k bias

Further arguments are passed to pytest; by default it runs the tests that call the CPU kernels. Everything is
built in a temporary directory; the installed module is not changed. Reports of the sanitizers are printed.
The exit status is 1 if there is a report, or if a test fails.

XLA and Python are not built with sanitizers. Therefore AddressSanitizer sees their allocations, but not their
accesses. ThreadSanitizer would not see the synchronisation of XLA's threads; `xla_ops/visible_threads.h`
replaces them.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ["dense_step", "fan_in_loss", "fan_in_matmul", "fan_in_step", "fan_in_top_k", "kth_smallest"]
TESTS += ["sparse_inputs", "native", "sharding", "transformations"]

# The compiler gets these after the flags of setup.py. Python's own flags include -fwrapv, with which signed
# overflow is not reported; here it is a fault.
FLAGS = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-wrapv"]
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread", f"-include{ROOT / 'tests/xla_ops/visible_threads.h'}"],
}
RUNTIMES = {"address": ["libasan.so", "libubsan.so"], "thread": ["libtsan.so"]}
# Stops if the tests would use another module than the one that was built.
PLUGIN = """
from pathlib import Path

def pytest_collection_finish():
    from xla_ops import _cpu

    assert Path(_cpu.__file__).parents[1] == Path(__file__).parents[1], _cpu.__file__
"""
# ThreadSanitizer ignores the allocations of these libraries, because it does not see how they hand memory
# over from one thread to another.
NOT_INSTRUMENTED = ["libjax_common.so", "_multiarray_umath"]


def build(sanitizer: str, tree: Path) -> None:
    """Copy xla_ops, the tests and the packages that they need to `tree`, and build the CPU module there."""
    unwanted = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("xla_ops", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=unwanted)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    (tree / "tests" / "sanitized.py").write_text(PLUGIN)
    compiler = tree / "compiler"
    compiler.write_text(f'#!/bin/sh\nexec g++ "$@" {" ".join([*FLAGS, *SANITIZERS[sanitizer]])}\n')
    compiler.chmod(0o755)
    environment = os.environ | {"CXX": str(compiler), "XLA_OPS_CUDA": "off"}
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        tree / "built",
        tree,
    ]
    subprocess.run(install, env=environment, check=True)
    for module in (tree / "built" / "xla_ops").glob("_cpu*"):
        shutil.copy(module, tree / "xla_ops")
    shutil.copytree(ROOT / "sparse_xmc", tree / "sparse_xmc", ignore=unwanted)  # one test needs a layer of it


def runtime(library: str) -> str:
    """Return the path of a runtime library of g++."""
    command = ["g++", f"-print-file-name={library}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("sanitizer", choices=list(SANITIZERS))
    parser.add_argument("pytest", nargs=argparse.REMAINDER, help="arguments of pytest")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        tree, reports_directory = Path(name) / "tree", Path(name) / "reports"
        reports_directory.mkdir()
        build(arguments.sanitizer, tree)
        suppressions = tree / "suppressions"
        suppressions.write_text("".join(f"called_from_lib:{library}\n" for library in NOT_INSTRUMENTED))
        options = f"log_path={reports_directory / 'report'}:"
        environment = os.environ | {
            "PYTHONPATH": str(tree / "tests"),
            "LD_PRELOAD": " ".join(runtime(library) for library in RUNTIMES[arguments.sanitizer]),
            "ASAN_OPTIONS": options + "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            # No reports about locks, because it sees only some of XLA's.
            "TSAN_OPTIONS": options
            + f"report_mutex_bugs=0:detect_deadlocks=0:report_thread_leaks=0:suppressions={suppressions}",
        }
        tests = arguments.pytest or [f"tests/xla_ops/test_{name}.py" for name in TESTS]
        command = [sys.executable, "-m", "pytest", "-s", "-p", "sanitized", *tests]
        status = subprocess.run(command, cwd=tree, env=environment).returncode
        reports = sorted(reports_directory.iterdir())
        for report in reports:
            print(report.read_text(errors="replace"))
    fault = bool(reports or status)
    print(f"{arguments.sanitizer}: {'faults, see above' if fault else 'no faults'}")
    return int(fault)


if __name__ == "__main__":
    sys.exit(main())
