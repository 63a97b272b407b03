"""Start of the programs of `experiments`, with their flags, errors and exit status.

The exit status is 1 for an error and 2 for an error in the flags, each with a one-line message on standard
error; --verbosity=1 adds the traceback. It is 130 after Ctrl-C, and 141 if the reader of the output has
closed it, as in `| head`. Errors that are not caused by data, files, memory or the environment are defects of
the program, and are shown with their traceback.
"""

import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from absl import app, flags, logging

from . import flagfiles

_ERRORS = (ValueError, OSError, MemoryError, ArithmeticError, ImportError, RuntimeError)


def start(main: Callable[[], object]) -> None:
    """Run a program with the flags of the command line, with the errors described above."""
    app.run(lambda _: _run(main), flags_parser=_parse)


def _parse(arguments: list[str]) -> list[str]:
    """Parse all flags; end the program on an error, or after --help."""
    try:
        program, *others = flags.FLAGS([arguments[0], *flagfiles.expand(arguments[1:])])
    except (flags.Error, ValueError, OSError) as error:
        missing = re.findall(r"^flag (--\w+)=None: Flag .* other than None", str(error), re.MULTILINE)
        _refuse(f"required: {', '.join(missing)}" if missing else _text(error))
    except SystemExit:  # after --help
        sys.exit(0)
    if others:
        _refuse(f"expected flags only, got {' '.join(others)}")
    if not flags.FLAGS["verbosity"].present:
        # By default, JAX would report every missing backend, and Orbax every step of every save.
        logging.set_verbosity(logging.WARNING)
    return [program]


def _run(main: Callable[[], object]) -> object:
    """Run a program and return the exit status."""
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()
    except app.UsageError as error:
        _refuse(str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for output that is still buffered
        return 141
    except KeyboardInterrupt:
        return 130
    except _ERRORS as error:
        if flags.FLAGS.verbosity > 0:
            traceback.print_exc()
        print(f"error: {_text(error)}", file=sys.stderr)
        mesh = sys.modules.get("sparse_xmc.mesh")  # not imported here, as that would import JAX
        return 1 if mesh is None else mesh.exit_after_error(1)


def _refuse(message: str) -> NoReturn:
    print(f"error: {message} (--help lists the flags)", file=sys.stderr)
    sys.exit(2)


def _text(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__
