import json
import subprocess
import sys

import pytest


def test_program_trains_and_writes_report(tmp_path):
    path = tmp_path / "claim.json"
    sizes = ["--labels=1000", "--features=12", "--penultimate=40", "--fan_in=4", "--steps=3"]
    command = [sys.executable, "-m", "experiments.measure.gpu_claim", *sizes, f"--json={path}"]
    subprocess.run(command, check=True, capture_output=True)
    report = json.loads(path.read_text())
    assert len(report["losses"]) == 3
    assert report["losses"][-1] < report["losses"][0]
    assert report["seconds_per_epoch"] == pytest.approx(report["seconds_per_step"] * 490_449 / 32)
    assert report["paper"] == {"memory_bytes": 1.45e9, "seconds_per_epoch": 271}
