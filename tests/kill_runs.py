"""Kill training runs at random moments and restart them until they finish; all must give the same results.

    python -m tests.kill_runs --minutes=60

The first run of each schedule is not interrupted; its results are the reference. Each of the other runs is
killed several times (by SIGKILL, sometimes by SIGTERM), at a random moment or shortly after a save has begun.
Before a restart, the record of its last checkpoint is sometimes damaged. Working directories have brackets in
their names, and contain symbolic links at the paths of output files. When a run has finished, its weights
must equal those of the reference bit for bit, its metrics and files must be the same, and the target of the
links must be unchanged. Otherwise the exit status is 1, and the directory is kept.
"""

import argparse
import contextlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from sparse_xmc.data import write_tsv
from sparse_xmc.saving import SavedModel

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "experiments.run"]
SETTINGS = ["--embedding=32", "--penultimate=64", "--fan_in=8", "--batch_size=4", "--learning_rate=0.01"]
SETTINGS += ["--output_bias=-1", "--rewire_interval=7", "--validation_fraction=0.2", "--checkpoint_minutes=0"]
SCHEDULES = ("plateau", "linear")


def write_points(directory: Path, seed: int = 0) -> list[str]:
    """Write 60 training and 20 test points; return the flags for them.

    A text has a word for each label of its point, and one random word.
    """
    rng = np.random.default_rng(seed)
    for name, size in (("train", 60), ("test", 20)):
        labels = [sorted(rng.choice(12, rng.integers(1, 4), replace=False)) for _ in range(size)]
        texts = [" ".join(f"word{i}" for i in [*row, *rng.integers(0, 12, 1)]) for row in labels]
        write_tsv(directory / f"{name}.tsv", [[f"label {i:02}" for i in row] for row in labels], texts)
    return [f"--train={directory / 'train.tsv'}", f"--test={directory / 'test.tsv'}"]


def start(flags: list[str]) -> subprocess.Popen:
    """Start a run; its output goes to a pipe."""
    return subprocess.Popen(
        [*COMMAND, *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(flags: list[str]) -> str:
    """Run the program to its end; return its output."""
    process = start(flags)
    printed, _ = process.communicate()
    if process.returncode != 0:
        raise AssertionError(f"exit status {process.returncode}: {printed}")
    return printed


def kill(flags: list[str], workdir: Path, seconds: float, in_save: bool, sig: signal.Signals) -> bool:
    """Start a run and send it a signal; return whether it was still running then.

    Args:
      flags: the flags of the run.
      workdir: its working directory.
      seconds: delay of the signal after the start, or after the start of the next save.
      in_save: whether to wait for the next save.
      sig: the signal.
    """
    process = start(flags)
    if in_save:
        latest = workdir / "checkpoints" / "latest"
        before = set(latest.glob("*"))
        while process.poll() is None and set(latest.glob("*")) <= before:
            time.sleep(0.001)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    was_running = process.poll() is None
    process.send_signal(sig)
    printed, _ = process.communicate()
    if process.returncode not in (0, -signal.SIGKILL, 128 + signal.SIGTERM, -signal.SIGTERM):
        raise AssertionError(f"exit status {process.returncode}: {printed}")
    return was_running


def outcome(workdir: Path) -> dict:
    """Return everything that must be reproducible: results and metrics without times, weights, file names."""
    result = json.loads((workdir / "result.json").read_text())
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    checkpoints = workdir / "checkpoints"
    return {
        **{name: result[name] for name in ("test", "train", "epochs", "model", "training")},
        "metrics": [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines],
        "weights": weights(workdir),
        "files": sorted(path.name for path in workdir.iterdir()),
        # A damaged record is kept until its checkpoint is deleted as too old.
        "latest": sorted(p.name for p in (checkpoints / "latest").iterdir() if p.suffix != ".damaged"),
        # Only their count: names are numbers of saves, and a save is repeated if the run was killed before
        # the next checkpoint in `latest`.
        "best": len([*(checkpoints / "best").iterdir()]),
    }


def weights(workdir: Path) -> dict[str, bytes]:
    """Return the bytes of every array of a saved model, by its path in the model's state."""
    model = SavedModel.load(workdir).model
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(model, nnx.Not(nnx.RngState)))
    return {jax.tree_util.keystr(path): np.asarray(array).tobytes() for path, array in leaves}


def link_files(workdir: Path) -> Path:
    """Put symbolic links at paths that a run writes; return their target, which must not change."""
    outside = workdir.with_name(f"{workdir.name} outside")
    outside.write_text("mine")
    workdir.mkdir()
    partial = [".flags.cfg.partial", ".metrics.jsonl.partial"]  # temporary names while a file is written
    for name in ("flags.cfg", "metrics.jsonl", "labels.txt", "label_statistics.npz", "model.json", *partial):
        (workdir / name).symlink_to(outside)
    return outside


def damage_record(workdir: Path, rng: random.Random) -> bool:
    """Flip a bit of the last checkpoint's record; return False if there is no earlier checkpoint."""
    records = sorted((workdir / "checkpoints" / "latest").glob("*.json"), key=lambda path: int(path.stem))
    if len(records) < 2:
        return False
    content = bytearray(records[-1].read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    records[-1].write_bytes(content)
    return True


def trial(flags: list[str], workdir: Path, seconds: float, kills: int, rng: random.Random) -> list[str]:
    """Kill a run up to `kills` times, then let it finish; return descriptions of all interventions."""
    done = []
    flags = [*flags, f"--workdir={workdir}"]
    for _ in range(kills):
        in_save, sig = rng.random() < 0.5, signal.SIGTERM if rng.random() < 0.2 else signal.SIGKILL
        after = rng.uniform(0, 0.05 if in_save else seconds)
        was_running = kill(flags, workdir, after, in_save, sig)
        done.append(f"{sig.name} {after:.3f} s {'into a save' if in_save else 'after the start'}")
        if not was_running:
            break
        if rng.random() < 0.3 and damage_record(workdir, rng):
            done.append("a record damaged")
    finish(flags)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument(
        "--seed", type=int, default=None, help="seed of the random moments (default: the time)"
    )
    arguments = parser.parse_args()
    seed = time.time_ns() if arguments.seed is None else arguments.seed
    rng, directory = random.Random(seed), Path(tempfile.mkdtemp(prefix="kill_runs_"))
    print(f"seed {seed}, {directory}", flush=True)
    data = write_points(directory)
    end, count, kills = time.monotonic() + 60 * arguments.minutes, 0, 0
    references = {}
    for schedule in SCHEDULES:
        flags = [*data, *SETTINGS, "--epochs=20", f"--schedule={schedule}"]
        started = time.monotonic()
        finish([*flags, f"--workdir={directory / schedule}"])
        references[schedule] = (flags, time.monotonic() - started, outcome(directory / schedule))
    while time.monotonic() < end:
        workdir = directory / f"run=[{count}]"
        outside = link_files(workdir)
        flags, seconds, expected = references[SCHEDULES[count % 2]]
        done = trial(flags, workdir, seconds, rng.randint(1, 6), rng)
        found = outcome(workdir)
        if different := [name for name in expected if found[name] != expected[name]]:
            sys.exit(f"{workdir}: {', '.join(different)} differ after {'; '.join(done)}")
        if outside.read_text() != "mine":
            sys.exit(f"{outside} was written to, through a link in {workdir}")
        shutil.rmtree(workdir)
        count, kills = count + 1, kills + len(done)
        print(f"{count} runs, {kills} kills, no differences; last run: {'; '.join(done)}", flush=True)
    shutil.rmtree(directory)


if __name__ == "__main__":
    main()
