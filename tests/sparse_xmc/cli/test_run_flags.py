"""Tests of the flags of `sparse-xmc run`."""

import experiments  # noqa: F401  registers its heads before the flags are defined
from sparse_xmc.cli import run_flags


def test_every_flag_has_a_help_text():
    # A setting without a line under `Attributes` has no help text, or only the sentences added to it.
    missing = [flag.name for flag in run_flags.own_flags() if flag.help.startswith((" ", "(no help"))]
    assert not missing
