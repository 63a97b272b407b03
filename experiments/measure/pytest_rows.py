"""A pytest plugin that writes the outcome of each test immediately, so that aborted runs have results.

    python -m pytest -p experiments.measure.pytest_rows --rows=FILE

appends a line of JSON to FILE for each test: its name, its outcome (passed, skipped or failed), its duration
in seconds, and the reason if it was skipped or failed.
"""

import json
from pathlib import Path

import pytest

_MESSAGE_CHARACTERS = 400


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --rows."""
    parser.addoption("--rows", help="File that each test's outcome is appended to.")


def pytest_configure(config: pytest.Config) -> None:
    """Register the plugin in the process that receives all reports, not in workers of pytest-xdist."""
    if config.getoption("rows") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Rows(Path(config.getoption("rows"))))


class _Rows:
    def __init__(self, path: Path):
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self._write(report, report.duration)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if not report.passed:
            self._write(report, 0.0)

    def _write(self, report: pytest.TestReport | pytest.CollectReport, seconds: float) -> None:
        row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(seconds, 2)}
        if report.skipped and isinstance(report.longrepr, tuple):
            row["why"] = report.longrepr[2].removeprefix("Skipped: ")
        elif not report.passed:
            crash = getattr(report.longrepr, "reprcrash", None)
            row["why"] = (crash.message if crash else str(report.longrepr))[:_MESSAGE_CHARACTERS]
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
