import json
import math

import jax
import numpy as np
import pytest
import scipy.sparse
from small_models import make_model

from sparse_xmc import Trainer, TrainingConfig, fit
from sparse_xmc.data import Dataset
from sparse_xmc.data.batches import Batches
from sparse_xmc.evaluation import evaluate
from sparse_xmc.train import Callback, Checkpoints, GradientDensity, Progress, RecordFile, Stopped

pytestmark = pytest.mark.usefixtures("standard_promotion")


def make_dataset(size=40, seed=0):
    rng = np.random.default_rng(seed)
    features, labels = rng.normal(size=(size, 12)).astype(np.float32), rng.random((size, 30)) < 0.1
    return Dataset(features, scipy.sparse.csr_array(labels))


def new_trainer(**options):
    options = {"batch_size": 8, "epochs": 3, "schedule": "linear", "rewire_interval": 4} | options
    return Trainer(make_model(dropout=0.2), TrainingConfig(**options), seed=1)


class Log(Callback):
    """Record all calls, and raise KeyboardInterrupt in step number `last`."""

    def __init__(self, last=None):
        self.events, self._steps, self._last = [], 0, last

    def on_epoch_start(self, trainer, batches, epoch):
        self.events.append(("start", epoch, batches.steps_per_epoch))

    def on_step(self, trainer, loss):
        self._steps += 1
        if self._steps == self._last:
            raise KeyboardInterrupt
        self.events.append(("step", trainer.step))

    def on_epoch_end(self, trainer, batches, records):
        self.events.append(("end", len(records)))


def arrays(trainer):
    return [np.asarray(a) for a in jax.tree.leaves((trainer.state["params"], trainer.state["moments"]))]


def test_fit_matches_epochs_of_trainer():
    trainer, other, log, train = new_trainer(), new_trainer(), Log(), make_dataset()
    records = fit(trainer, train, callbacks=[log])
    expected = []
    for epoch in range(3):
        expected += [("start", epoch, 5), *(("step", 5 * epoch + i) for i in range(1, 6)), ("end", epoch + 1)]
    assert log.events == expected
    assert [r["epoch"] for r in records] == [1, 2, 3]
    assert [r["learning_rate"] for r in records] == pytest.approx([1e-3, 1e-3 * 2 / 3, 1e-3 / 3])
    batches = Batches(train, 8)
    for epoch in range(3):
        rates = [1e-3 * (1 - (5 * epoch + i) / 15) for i in range(5)]
        losses = [float(loss) for loss in other.epoch(batches, epoch, rates.__getitem__)]
        assert records[epoch]["loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    for a, b in zip(arrays(trainer), arrays(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_validation_is_recorded():
    trainer, validation = new_trainer(epochs=2), make_dataset(seed=5)
    records = fit(trainer, make_dataset(), validation)
    metrics = evaluate(trainer.model, validation, batch_size=8)
    assert {name: records[-1][name] for name in metrics} == metrics


@pytest.mark.bit_for_bit
@pytest.mark.parametrize(("schedule", "stopped_after"), [("linear", 7), ("plateau", 10), ("plateau", 13)])
def test_interrupted_run_resumes_to_same_result(tmp_path, capsys, schedule, stopped_after):
    train, validation = make_dataset(), make_dataset(seed=5)
    options = {"checkpoint_minutes": 0.0}
    whole = new_trainer(schedule=schedule, epochs=4)
    with Checkpoints(tmp_path / "whole") as checkpoints:
        expected = fit(whole, train, validation, checkpoints=checkpoints, **options)
    with Checkpoints(tmp_path / "stopped") as checkpoints, pytest.raises(KeyboardInterrupt):
        fit(
            new_trainer(schedule=schedule, epochs=4),
            *(train, validation),
            checkpoints=checkpoints,
            callbacks=[RecordFile(tmp_path / "records"), Log(last=stopped_after)],
            **options,
        )
    trainer, callbacks = (
        new_trainer(schedule=schedule, epochs=4),
        [RecordFile(tmp_path / "records"), Progress()],
    )
    with Checkpoints(tmp_path / "stopped") as checkpoints:
        records = fit(trainer, train, validation, checkpoints=checkpoints, callbacks=callbacks, **options)
    # Each step ends with a checkpoint, but the last step was interrupted before its checkpoint.
    epochs, steps = divmod(stopped_after - 1, 5)
    where = f"step {steps} of epoch {epochs + 1}" if steps else f"epoch {epochs}"
    assert f"going on after {where}\n" in capsys.readouterr().out
    assert [json.loads(line) for line in (tmp_path / "records").read_text().splitlines()] == records

    def timeless(records):
        return [{name: r[name] for name in r if name != "seconds"} for r in records]

    assert timeless(records) == timeless(expected)
    for a, b in zip(arrays(trainer), arrays(whole), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("change", [{"epochs": 4}, {"learning_rate": 5e-3}, {"seed": 2}, {"loss": "bce"}])
def test_checkpoint_of_other_run_raises(tmp_path, change):
    with Checkpoints(tmp_path) as checkpoints:
        fit(new_trainer(), make_dataset(), checkpoints=checkpoints, checkpoint_minutes=0.0)
    trainer = new_trainer(**{name: value for name, value in change.items() if name != "seed"})
    trainer.seed = change.get("seed", trainer.seed)
    (name,) = change
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match=f"is of a run with .*{name}"):
        fit(trainer, make_dataset(), checkpoints=checkpoints)


def test_plateau_ends_with_best_weights(tmp_path):
    validation, seen = make_dataset(seed=5), {}

    class Keep(Callback):
        def on_epoch_end(self, trainer, batches, records):
            seen[records[-1]["epoch"]] = np.array(trainer.model.head.output.kernel[...])

    trainer = new_trainer(schedule="plateau", epochs=30, learning_rate=0.03)
    with Checkpoints(tmp_path) as checkpoints:
        records = fit(trainer, make_dataset(), validation, checkpoints=checkpoints, callbacks=[Keep()])
    best = max(r["p@3"] for r in records)
    first = next(r for r in records if r["p@3"] > best - 5e-5)
    assert len(records) < 30  # training stopped early
    assert len(records) - first["epoch"] >= 4
    np.testing.assert_array_equal(trainer.model.head.output.kernel[...], seen[first["epoch"]])


def test_resume_with_lost_best_weights_warns_before_training(tmp_path, caplog):
    train, validation = make_dataset(), make_dataset(seed=5)
    options = {"schedule": "plateau", "epochs": 6, "learning_rate": 0.03}
    saving = {"checkpoint_minutes": 0.0, "callbacks": [Log(last=12)]}  # it stops in the third epoch
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(KeyboardInterrupt):
        fit(new_trainer(**options), train, validation, checkpoints=checkpoints, **saving)
    for file in (tmp_path / "best").glob("*.json"):
        file.write_text("{}")
    trainer, log = new_trainer(**options), Log()
    with Checkpoints(tmp_path) as checkpoints:
        records = fit(trainer, train, validation, checkpoints=checkpoints, callbacks=[log])
    assert "best: the best weights so far are lost" in caplog.text
    assert log.events[0] == ("start", 2, 5)
    # Training ends with the best weights of the remaining epochs.
    best = max(records[2:], key=lambda record: record["p@3"])
    assert evaluate(trainer.model, validation, batch_size=8)["p@3"] == pytest.approx(best["p@3"], abs=5e-5)


def test_plateau_without_validation_or_checkpoints_raises(tmp_path):
    for options in ({}, {"validation": make_dataset()}):
        with pytest.raises(
            ValueError, match="'plateau' ends with the weights of the best epoch: give validation"
        ):
            fit(new_trainer(schedule="plateau"), make_dataset(), **options)


def test_non_finite_loss_raises():
    train = make_dataset()
    features = train.features.copy()
    features[17] = np.nan
    log = Log()
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step \d of epoch 1"):
        fit(new_trainer(), Dataset(features, train.labels), callbacks=[log])
    assert ("end", 1) not in log.events


def test_record_file_has_one_line_per_epoch(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text("of an earlier run\n")
    callbacks = [GradientDensity(batches=2), RecordFile(path)]
    records = fit(new_trainer(), make_dataset(), callbacks=callbacks)
    assert [json.loads(line) for line in path.read_text().splitlines()] == records
    assert all(0 < r["gradient_density"] <= 1 for r in records)


def test_progress_prints_one_line_per_epoch(capsys):
    records = fit(new_trainer(epochs=2), make_dataset(), make_dataset(seed=5), callbacks=[Progress()])
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"epoch   1  loss {records[0]['loss']:.3e}  validation P@1/3/5 ")
    assert f"{100 * records[1]['p@1']:.2f}/{100 * records[1]['p@3']:.2f}" in second
    fit(new_trainer(epochs=1), make_dataset(), callbacks=[Progress()])
    assert "validation" not in capsys.readouterr().out
    assert math.isfinite(records[0]["seconds"])


@pytest.mark.bit_for_bit
def test_should_stop_saves_a_checkpoint_to_resume_from(tmp_path):
    whole = new_trainer(epochs=3)
    expected = fit(whole, make_dataset())
    trainer = new_trainer(epochs=3)
    for at in (3, 10, 11):  # within an epoch, at the end of one, and after the first step of the next
        with Checkpoints(tmp_path) as checkpoints, pytest.raises(Stopped) as stopped:
            fit(
                trainer,
                make_dataset(),
                checkpoints=checkpoints,
                should_stop=lambda t=trainer, at=at: t.step == at,
            )
        epoch, step = divmod(at - 1, 5)
        assert (stopped.value.epoch, stopped.value.step) == (epoch + 1, step + 1)
        assert (
            str(stopped.value)
            == f"stopped after step {step + 1} of epoch {epoch + 1}; saved in {tmp_path}/latest"
        )
        trainer = new_trainer(epochs=3)
    with Checkpoints(tmp_path) as checkpoints:
        records = fit(trainer, make_dataset(), checkpoints=checkpoints)
    assert [r["loss"] for r in records] == [r["loss"] for r in expected]
    for a, b in zip(arrays(trainer), arrays(whole), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(Stopped, match="nothing was saved"):
        fit(new_trainer(), make_dataset(), should_stop=lambda: True)


def test_non_finite_arrays_are_named_and_not_saved(tmp_path):
    train = make_dataset()
    features = train.features.copy()
    features[17, 3] = np.inf
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(FloatingPointError, match=r"Not finite are the inputs of points 17$"):
            fit(
                new_trainer(),
                Dataset(features, train.labels),
                checkpoints=checkpoints,
                checkpoint_minutes=0.0,
            )
        # The state of the last checkpoint is finite.
        trainer = new_trainer()
        checkpoints.restore_latest(trainer)
        assert trainer.array_not_finite() is None
    with pytest.raises(FloatingPointError, match=r"The inputs are finite: is the learning rate too high\?"):
        fit(new_trainer(learning_rate=1e30), train)
    trainer = new_trainer()
    kernel = trainer.state["params"]["head"]["output"]["kernel"]
    kernel.set_value(kernel[...].at[2, 1].set(np.nan))
    assert trainer.array_not_finite() == "params.head.output.kernel.value"
