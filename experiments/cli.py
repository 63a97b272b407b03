"""The console command: `sparse-xmc run --flagfile=X` runs `python -m experiments.run --flagfile=X`."""

import importlib.metadata
import runpy
import sys

COMMANDS = {
    "run": "train and evaluate a classifier",
    "predict": "labels for new points, by a trained one",
    "evaluate": "its metrics on other points",
    "plan": "the memory that training would take",
    "prepare": "the files of a public data set",
    "sweep": "the runs of a table",
    "tables": "render the results of a sweep",
    "benchmark": "time ops and training steps",
}


def main() -> None:
    """Run the module of a command with its flags."""
    command, *arguments = sys.argv[1:] or [""]
    if command in ("--help", "-h", "help"):
        print(_usage())
    elif command == "--version":
        print(importlib.metadata.version("sparse-xmc"))
    elif command in COMMANDS:
        sys.argv[1:] = arguments
        runpy.run_module(f"{__package__}.{command}", run_name="__main__", alter_sys=True)
    else:
        reason = f"error: {command}: no such command\n\n" if command else ""
        print(f"{reason}{_usage()}", file=sys.stderr)
        sys.exit(2)


def _usage() -> str:
    lines = [f"  {name:10s}{what}\n" for name, what in COMMANDS.items()]
    return f"sparse-xmc COMMAND [--FLAG=VALUE ...]\n\n{''.join(lines)}\nCOMMAND --help lists its flags."


if __name__ == "__main__":
    main()
