import json
import subprocess

from sparse_xmc.cli import environment


def test_description_is_complete_and_json_serializable():
    description = json.loads(json.dumps(environment.describe()))
    assert {"python", "jax", "numpy"} <= description["versions"].keys()
    assert description["cpu"]
    assert description["threads"] >= 1
    assert description["memory_bytes"] > 0


def test_commit_is_read_from_git(monkeypatch):
    monkeypatch.setattr(
        subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, stdout="abc123\n")
    )
    assert environment.describe()["commit"] == "abc123"


def test_commit_is_unknown_outside_of_git(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment.describe()["commit"] == "unknown"
