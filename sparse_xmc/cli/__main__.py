"""The console command: `sparse-xmc run --flagfile=X` runs `sparse_xmc/cli/run.py` with this flag."""

import importlib.metadata
import runpy
import sys

COMMANDS = {
    "run": "train and evaluate a classifier",
    "predict": "predict labels of new points with a saved model",
    "evaluate": "compute the metrics of a saved model on other points",
    "plan": "print the memory that training would take",
}
# Programs of the repository that are not in a wheel.
REPRODUCTION = ("prepare", "sweep", "tables", "benchmark")


def main() -> None:
    """Run the program of a command with its flags."""
    command, *arguments = sys.argv[1:] or [""]
    if command in ("--help", "-h", "help"):
        print(_usage())
    elif command == "--version":
        print(importlib.metadata.version("sparse-xmc"))
    elif command in COMMANDS:
        sys.argv[1:] = arguments
        runpy.run_module(f"sparse_xmc.cli.{command}", run_name="__main__", alter_sys=True)
    elif command in REPRODUCTION:
        sys.exit(f"error: {command}: run python -m experiments.{command} in a clone of the repository")
    else:
        reason = f"error: {command}: no such command\n\n" if command else ""
        print(f"{reason}{_usage()}", file=sys.stderr)
        sys.exit(2)


def _usage() -> str:
    lines = [f"  {name:10s}{text}\n" for name, text in COMMANDS.items()]
    return f"sparse-xmc COMMAND [--FLAG=VALUE ...]\n\n{''.join(lines)}\nCOMMAND --help lists its flags."


if __name__ == "__main__":
    main()
