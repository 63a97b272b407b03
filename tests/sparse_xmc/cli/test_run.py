"""Tests of `python -m experiments.run` on a tiny data set, run as a subprocess."""

import collections
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import kill_runs
import numpy as np
import pytest
import scipy.sparse

import experiments
from sparse_xmc import XMCClassifier
from sparse_xmc.data import Dataset, read_tsv, write_tsv, write_xmc_text
from sparse_xmc.saving import SavedModel

COMMAND = [sys.executable, "-m", "experiments.run"]
ROOT = Path(experiments.__file__).parents[1]
SMALL = ["--embedding=32", "--penultimate=64", "--fan_in=8", "--batch_size=4", "--learning_rate=0.01"]


def run(*flags):
    """Run the program until it ends, with or without an error; return the finished process."""
    return subprocess.run([*COMMAND, *flags], cwd=ROOT, capture_output=True, text=True)


def output_of(*flags):
    finished = run(*flags)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def error_of(*flags):
    finished = run(*flags)
    assert finished.returncode != 0
    return finished.stderr.splitlines()[-1]


def records(workdir):
    """Return the records of all epochs in metrics.jsonl, without their times."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def result(workdir):
    return json.loads((workdir / "result.json").read_text())


@pytest.fixture(scope="module")
def tsv(tmp_path_factory):
    """Return flags for 60 training and 20 test points, whose words are those of their labels and noise."""
    return kill_runs.write_points(tmp_path_factory.mktemp("tsv"))


@pytest.fixture(scope="module")
def finished(tsv, tmp_path_factory):
    """Return the working directory of a finished run, its flags and its output."""
    workdir = tmp_path_factory.mktemp("runs") / "first"
    flags = [*tsv, *SMALL, f"--workdir={workdir}", "--seed=4", "--epochs=8", "--rewire_interval=7"]
    flags += ["--validation_fraction=0.2", "--output_bound=none", "--checkpoint_minutes=0"]
    return workdir, flags, output_of(*flags)


def test_result_file_is_complete(finished):
    workdir, _, printed = finished
    report = result(workdir)
    assert report["name"] == "first"
    assert report["validated_on"] == "12 held-out training points"
    assert report["train_seconds"] > 0
    assert report["peak_memory_bytes"] > 0
    assert report["seed"] == 4
    assert report["model"]["num_labels"] == 12
    assert report["training"]["rewire_interval"] == 7
    assert {"versions", "cpu", "commit"} <= report["environment"].keys()
    # In float32: embedding [12, 32], penultimate layer [32, 64] + [64], kernel [12, 8], bias [12] and the
    # scale of the inputs. In uint16: indices [12, 8].
    assert report["model_bytes"] == 4 * (12 * 32 + 32 * 64 + 64 + 12 * 8 + 12 + 1) + 2 * 12 * 8
    for split in ("test", "train"):
        names = {f"{name}@{k}" for name in ("p", "ndcg", "recall", "psp", "psndcg") for k in (1, 3, 5)}
        assert report[split].keys() == names
    assert f"p@1       {100 * report['test']['p@1']:8.2f}" in printed
    assert report["test"]["recall@5"] > 0.7  # 5 random labels of 12 reach 0.42
    assert report["test_p@1_by_group"].keys() == {"head", "middle", "tail"}
    assert all(0 <= p <= 1 for p in report["test_p@1_by_group"].values())
    assert sum(report["labels_by_group"]) == 12


def test_data_and_model_sizes_are_printed_first(tsv, finished):
    _, _, printed = finished
    points, labels, frequent, words, memory, parameters = printed.splitlines()[:6]
    assert points == "60 training points, of which 12 for validation; 20 test points"
    assert (labels, words) == ("12 labels", "12 words")
    given = collections.Counter(
        name for names in read_tsv(tsv[0].removeprefix("--train="))[0] for name in names
    )
    most = sorted(given.items(), key=lambda item: (-item[1], item[0]))[:3]
    assert frequent == (
        f"{sum(given.values()) / 60:.2f} labels per training point on average; most frequent: "
        + ", ".join(f"{name} ({count})" for name, count in most)
    )
    assert memory.startswith("planned memory ")
    assert parameters == f"{12 * 32 + 32 * 64 + 64 + 12 * 8 + 12:,} parameters"


def test_wrong_separator_and_swapped_columns_warn(tmp_path):
    names = [["a", "b", "c"][: 1 + i % 3] for i in range(120)]
    texts = [f"point {i} has {' '.join(row)}" for i, row in enumerate(names)]
    wrong = {
        "separator": ([[";".join(row)] for row in names], texts, "label names contain ';', such as 'a;b'"),
        "columns": (
            [[text] for text in texts],
            [" ".join(row) for row in names],
            "are labels and texts swapped",
        ),
    }
    for name, (labels, point_texts, warning) in wrong.items():
        path = tmp_path / f"{name}.tsv"
        write_tsv(path, labels, point_texts)
        planned = run(f"--train={path}", f"--test={path}", f"--workdir={tmp_path / name}", "--plan")
        assert planned.returncode == 0, planned.stderr
        assert "UserWarning: " in planned.stderr
        assert warning in planned.stderr
    assert "1.00 labels per training point on average; most frequent: point 0 has a (1), " in planned.stdout


def test_epochs_are_recorded(finished):
    workdir, _, printed = finished
    epochs = records(workdir)
    assert [record["epoch"] for record in epochs] == list(range(1, result(workdir)["epochs"] + 1))
    assert epochs[-1]["loss"] < epochs[0]["loss"]
    assert all(f"epoch {record['epoch']:3d}  loss {record['loss']:.3e}" in printed for record in epochs)
    assert all({"learning_rate", "p@3"} <= record.keys() for record in epochs)
    densities = [record["gradient_density"] for record in epochs]
    assert 0 < densities[-1] < densities[0] <= 1
    for record, kept in zip(epochs, result(workdir)["history"], strict=True):
        assert kept.pop("seconds") > 0
        assert {"loss", "p@1", "gradient_density"} <= kept.keys()
        assert kept.items() <= record.items()


def test_saved_model_reproduces_test_metrics(finished, tsv):
    workdir, *_ = finished
    labels, texts = read_tsv(tsv[1].partition("=")[2])
    classifier = XMCClassifier.load(workdir)
    assert classifier.score(texts, labels) == pytest.approx(result(workdir)["test"]["p@1"])
    assert classifier.n_labels_ == 12
    assert classifier.classes_[3] == "label 03"


def test_existing_result_is_kept(finished):
    workdir, flags, _ = finished
    before = (workdir / "result.json").stat()
    assert "result.json: this run has finished. Choose another --workdir." in output_of(*flags)
    assert (workdir / "result.json").stat().st_mtime_ns == before.st_mtime_ns


def test_killed_run_resumes_to_same_result(finished, tmp_path):
    # The flags are read from flags.cfg of the finished run, so this also tests that flags.cfg is complete.
    first, *_ = finished
    flags = [f"--flagfile={first / 'flags.cfg'}", f"--workdir={tmp_path / 'first'}"]
    assert kill_runs.kill(flags, tmp_path / "first", 0.0, True, signal.SIGKILL)
    process, latest = kill_runs.start(flags), tmp_path / "first" / "checkpoints" / "latest"
    while not list(latest.glob("*.json")):  # until there is a complete checkpoint
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert not (tmp_path / "first" / "result.json").exists()
    assert "going on after " in kill_runs.finish(flags)
    assert kill_runs.outcome(tmp_path / "first") == kill_runs.outcome(first)


def test_dense_features_with_validation_on_test_points(tmp_path):
    rng = np.random.default_rng(0)
    flags = [f"--workdir={tmp_path / 'dense'}", "--validate_on_test", "--schedule=linear", "--epochs=2"]
    for name, size in (("train", 24), ("test", 9)):
        labels = scipy.sparse.csr_array(rng.random((size, 12)) < 0.2)
        features = rng.normal(size=(size, 10)).astype(np.float32)
        np.save(tmp_path / f"{name}.npy", features)
        write_xmc_text(tmp_path / f"{name}.txt", Dataset(features, labels))
        flags += [f"--{name}={tmp_path / name}.txt", f"--{name}_features={tmp_path / name}.npy"]
    printed = output_of(*SMALL, *flags)
    report = result(tmp_path / "dense")
    assert "validating on the test set, as in the paper" in printed
    assert report["validated_on"] == "test"
    assert report["model"]["bag_of_words"] is False
    assert report["model"]["num_features"] == 10
    epochs = records(tmp_path / "dense")
    # The learning rate at the start of epochs falls linearly, and the weights of the last epoch are kept.
    assert [record["learning_rate"] for record in epochs] == pytest.approx([0.01, 0.005])
    assert epochs[-1]["p@3"] == report["test"]["p@3"]


def test_run_with_other_flags_in_same_workdir_fails(tsv, tmp_path):
    (tmp_path / "flags.cfg").write_text("--seed=1\n")
    (tmp_path / "result.json").touch()
    error = error_of(*tsv, f"--workdir={tmp_path}", "--seed=2")
    assert "flags.cfg was written by a run with other flags" in error
    assert "--seed=1 --seed=2" in error
    assert (tmp_path / "flags.cfg").read_text() == "--seed=1\n"


def test_flags_of_run_are_compared_by_value(finished, tmp_path):
    first, flags, _ = finished
    lines = (first / "flags.cfg").read_text().splitlines()
    older = [line for line in lines if not line.startswith(("--encoder_dtype=", "--noencoder_remat"))]
    assert len(older) == len(lines) - 2
    (tmp_path / "flags.cfg").write_text("\n".join([*older, "--plan", "--mesh=label:2"]))
    (tmp_path / "result.json").write_text((first / "result.json").read_text())
    assert "this run has finished" in output_of(*flags, f"--workdir={tmp_path}")
    (tmp_path / "flags.cfg").write_text("--flag_of_another_version=1\n")
    error = error_of(*flags, f"--workdir={tmp_path}")
    assert "flags.cfg: not the flags of a run: Unknown command line flag 'flag_of_another_version'" in error


def test_plan_is_printed_in_directory_of_another_run(tsv, tmp_path):
    (tmp_path / "flags.cfg").write_text("--seed=1\n")
    (tmp_path / "checkpoints" / "latest").mkdir(parents=True)
    (tmp_path / "checkpoints" / "latest" / "1.json").touch()
    flags = [*tsv, *SMALL, f"--workdir={tmp_path}", "--seed=2"]
    assert "planned peak" in output_of(*flags, "--plan")
    assert (tmp_path / "flags.cfg").read_text() == "--seed=1\n"
    assert "was written by a run with other flags" in error_of(*flags)


def test_epochs_can_be_raised_with_plateau_schedule_only(finished, tmp_path):
    first, flags, _ = finished
    workdir = f"--workdir={tmp_path / 'run'}"
    output_of(*flags, workdir, "--checkpoint_minutes=60", "--epochs=2")
    assert "going on after epoch 2" in output_of(*flags, workdir, "--epochs=4")
    assert records(tmp_path / "run") == records(first)[:4]
    assert result(tmp_path / "run")["epochs"] == 4
    assert "was written by a run with other flags" in error_of(*flags, workdir, "--epochs=3")

    text = (first / "flags.cfg").read_text().replace("--schedule=plateau", "--schedule=linear")
    (tmp_path / "flags.cfg").write_text(text)
    (tmp_path / "result.json").touch()
    linear = [f"--flagfile={tmp_path / 'flags.cfg'}", f"--workdir={tmp_path}", "--epochs=9"]
    assert "it cannot be continued; choose another --workdir, or --init_from this one" in error_of(*linear)


def test_unused_flags_are_reported(tsv, tmp_path):
    printed = output_of(*tsv, *SMALL, "--head=dense", "--epochs=1", f"--workdir={tmp_path / 'run'}")
    assert "--head=dense does not use --fan_in, --penultimate" in printed
    assert result(tmp_path / "run")["model"]["head"] == {"kind": "dense", "output_bias": -1.0}


def test_help_lists_flags_of_settings():
    printed = run("--help").stdout
    for flag in ("--workdir", "--fan_in", "--head", "--rewire_growth", "--learning_rate", "--embedding"):
        assert f"  {flag}: " in printed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_run_after_a_step_and_same_command_resumes(tsv, tmp_path, number):
    workdir = tmp_path / "run"
    flags = [*tsv, *SMALL, f"--workdir={workdir}", "--epochs=100000", "--schedule=linear"]
    process = subprocess.Popen(
        [*COMMAND, *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("epoch   2 "):
            process.send_signal(number)
            break
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert "stopping after this step; send the signal again to stop immediately" in errors
    assert "Traceback" not in errors
    assert f"saved in {workdir}/checkpoints/latest; run the same command to resume" in printed

    again = subprocess.Popen([*COMMAND, *flags], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert any(line.startswith("going on after ") for line in again.stdout)
    again.kill()
    again.wait()
    again.stdout.close()


def test_workdir_with_brackets(tsv, tmp_path):
    workdir = tmp_path / "runs" / "lr=[1,2]"
    flags = [
        *tsv,
        *SMALL,
        f"--workdir={workdir}",
        "--epochs=8",
        "--schedule=linear",
        "--checkpoint_minutes=0",
    ]
    process = subprocess.Popen([*COMMAND, *flags], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("epoch   2 "):
            process.send_signal(signal.SIGTERM)
            break
    process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    printed = output_of(*flags)
    assert "going on after " in printed
    assert f"wrote {workdir / 'result.json'}" in printed
    (tmp_path / "texts.txt").write_text("word3 word5\n")
    predict = [sys.executable, "-m", "experiments.predict", f"--workdir={workdir}"]
    command = [*predict, f"--input={tmp_path / 'texts.txt'}", "--k=2"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(finished.stdout.split("\t")) == 4


def test_symlinks_in_workdir_are_not_followed(tsv, tmp_path):
    outside, workdir = tmp_path / "outside", tmp_path / "run"
    outside.write_text("mine")
    workdir.mkdir()
    names = ["flags.cfg", "metrics.jsonl", "result.json", "labels.txt", "label_statistics.npz"]
    for name in [*names, *(f".{name}.partial" for name in names)]:
        if name != "result.json":  # result.json marks a finished run
            (workdir / name).symlink_to(outside)
    flags = [*tsv, *SMALL, f"--workdir={workdir}", "--epochs=1", "--schedule=linear"]
    output_of(*flags)
    assert outside.read_text() == "mine"
    assert result(workdir)["epochs"] == 1
    (workdir / "result.json").unlink()
    (workdir / ".lock").unlink()
    (workdir / ".lock").symlink_to(outside)
    assert error_of(*flags) == f"error: {workdir / '.lock'}: Too many levels of symbolic links"
    assert outside.read_text() == "mine"


def test_second_run_in_same_workdir_fails(tsv, tmp_path):
    workdir = tmp_path / "run"
    flags = [*tsv, *SMALL, f"--workdir={workdir}", "--epochs=100000", "--schedule=linear"]
    first = subprocess.Popen([*COMMAND, *flags], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while not first.stdout.readline().startswith("epoch   1 "):
        assert first.poll() is None
    assert error_of(*flags).endswith("another run is using this directory; choose another --workdir")
    first.kill()
    first.wait()
    first.stdout.close()
    # A killed run without a checkpoint does not block a run with other flags.
    printed = output_of(*tsv, *SMALL, f"--workdir={workdir}", "--epochs=1", "--seed=9")
    assert "going on" not in printed


def test_resume_with_other_data_fails(tsv, tmp_path):
    train = tmp_path / "train.tsv"
    lines = Path(tsv[0].partition("=")[2]).read_text().splitlines()
    train.write_text("\n".join(lines) + "\n")
    workdir = tmp_path / "run"
    flags = [
        f"--train={train}",
        tsv[1],
        *SMALL,
        f"--workdir={workdir}",
        "--epochs=2",
        "--checkpoint_minutes=0",
    ]
    output_of(*flags)
    (workdir / "result.json").unlink()
    train.write_text("\n".join(lines[::-1]) + "\n")
    assert "the checkpoint is of a run with {'data': " in error_of(*flags)


def test_missing_file_fails(tmp_path):
    flags = ["--train=nowhere.txt", "--test=nowhere.txt", f"--workdir={tmp_path / 'run'}"]
    assert error_of(*flags) == "error: nowhere.txt: no such file"
    assert not (tmp_path / "run").exists()


def output_of_program(program, workdir, *flags, **options):
    """Return the output of a program that uses the saved model in `workdir`."""
    command = [sys.executable, "-m", f"experiments.{program}", f"--workdir={workdir}", *flags]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def error_of_program(program, workdir, *flags):
    """Return the last line of stderr of such a program, which must fail."""
    command = [sys.executable, "-m", f"experiments.{program}", f"--workdir={workdir}", *flags]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 1
    return finished.stderr.strip().splitlines()[-1]


def test_predict_for_new_texts(finished, tmp_path):
    workdir, *_ = finished
    (tmp_path / "texts.txt").write_text("word3 word3\nword7\u2028word7\n\n", encoding="utf-8")
    (tmp_path / "texts.tsv").write_text("label 01\tword3 word3\n\tword7\u2028word7\n\t\n", encoding="utf-8")
    printed = output_of_program("predict", workdir, "--k=2", f"--input={tmp_path / 'texts.txt'}")
    lines = [line.split("\t") for line in printed.splitlines()]
    assert len(lines) == 3
    assert all(len(line) == 4 and float(line[1]) >= float(line[3]) for line in lines)
    assert [line[0] for line in lines[:2]] == ["label 03", "label 07"]
    # The same texts in a .tsv, printed as JSON with probabilities above a threshold.
    flags = ["--k=12", "--format=jsonl", "--probabilities", "--threshold=0.5"]
    objects = output_of_program("predict", workdir, *flags, f"--input={tmp_path / 'texts.tsv'}").splitlines()
    assert len(objects) == 3
    calibration = SavedModel.load(workdir).calibration
    for found, line in zip(map(json.loads, objects), lines, strict=True):
        assert len(found["labels"]) == len(found["scores"]) == len(found["probabilities"]) < 12
        np.testing.assert_allclose(found["probabilities"], calibration(found["scores"]), rtol=1e-5)
        assert min(found["probabilities"], default=1) >= 0.5
        assert found["labels"][:2] == line[::2][: len(found["labels"])]
    assert output_of_program("predict", workdir, input="") == ""  # texts from standard input
    (tmp_path / "texts.tsv").write_text("label 01\tword3\nword7\n")
    error = error_of_program("predict", workdir, f"--input={tmp_path / 'texts.tsv'}")
    assert error.endswith("texts.tsv:2: expected 'label|label|...<TAB>text', got no tab in 'word7'")


def test_evaluate_reproduces_metrics_of_run(finished, tsv, tmp_path):
    workdir, *_ = finished
    output_of_program("evaluate", workdir, tsv[1], f"--json={tmp_path / 'found.json'}")
    found, expected = json.loads((tmp_path / "found.json").read_text()), result(workdir)
    assert found["metrics"] == pytest.approx(expected["test"])
    assert found["p@1 by group"] == pytest.approx(expected["test_p@1_by_group"])
    assert (found["points"], found["labels that the model does not know"]) == (20, 0)
    (tmp_path / "empty.tsv").write_text("")
    error = error_of_program("evaluate", workdir, f"--test={tmp_path / 'empty.tsv'}")
    assert error.endswith("empty.tsv: expected points, got none")


def test_model_card_shows_test_metrics(finished):
    workdir, *_ = finished
    card = (workdir / "README.md").read_text()
    assert "| labels | 12 |" in card
    assert f"| p@1 | {result(workdir)['test']['p@1']:.4f} |" in card
    assert "train.tsv" in card
