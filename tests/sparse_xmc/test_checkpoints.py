import dataclasses
import re
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import scipy.sparse
from flax import nnx
from small_models import config_of, make_model

from sparse_xmc import RewireConfig, Trainer, TrainingConfig
from sparse_xmc.data import Dataset
from sparse_xmc.data.batches import Batches
from sparse_xmc.data.files import read_sealed_json, write_sealed_json
from sparse_xmc.heads import HEADS
from sparse_xmc.train import Checkpoints

RATE = 1e-2

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture
def batches():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(40, 12)).astype(np.float32), rng.random((40, 30)) < 0.1
    return Batches(Dataset(features, scipy.sparse.csr_array(labels)), 8)


def new_trainer(seed=0, kind="fixed_fan_in", fused=None):
    options = TrainingConfig(batch_size=8, rewire=RewireConfig(fraction=0.3), rewire_interval=3)
    model = make_model(kind, seed=seed, penultimate=16, fan_in=4, dropout=0.3)
    return Trainer(model, options, seed=1, fused=fused)


def train(trainer, batches, epochs):
    """Train for the given epochs of 5 steps; return the losses of all steps."""
    return [float(loss) for epoch in epochs for loss in trainer.epoch(batches, epoch, lambda step: RATE)]


def values(state):
    """Return all arrays of a state as NumPy arrays."""
    is_key = jax.dtypes.prng_key
    return [
        np.asarray(jax.random.key_data(a) if jax.dtypes.issubdtype(a.dtype, is_key) else a)
        for a in jax.tree.leaves(state)
    ]


def assert_equal(state, other):
    for a, b in zip(values(state), values(other), strict=True):
        np.testing.assert_array_equal(a, b, strict=True)


@pytest.mark.usefixtures("x64")
@pytest.mark.bit_for_bit
@pytest.mark.parametrize("kind", HEADS)
def test_restored_run_continues_bit_for_bit(tmp_path, batches, kind):
    trainer = new_trainer(kind=kind)
    train(trainer, batches, [0, 1])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save_latest(trainer, {"epochs": 2, "best": 0.1})
    expected = train(trainer, batches, [2, 3])

    # As in a new process: another initial state and a new Checkpoints object.
    restored = new_trainer(seed=7, kind=kind)
    assert Checkpoints(tmp_path).restore_latest(restored) == {"epochs": 2, "best": 0.1}
    assert restored.step == 10
    assert train(restored, batches, [2, 3]) == expected
    assert_equal(restored.state, trainer.state)


@pytest.mark.parametrize("kind", HEADS)
def test_checkpoint_of_fused_steps_continues_with_optax_steps(tmp_path, batches, kind):
    trainer = new_trainer(kind=kind, fused=True)
    train(trainer, batches, [0])
    Checkpoints(tmp_path).save_latest(trainer, {})
    other = new_trainer(seed=7, kind=kind, fused=False)
    Checkpoints(tmp_path).restore_latest(other)
    np.testing.assert_allclose(train(other, batches, [1]), train(trainer, batches, [1]), rtol=1e-4)


def test_losses_depend_on_dropout_and_rewiring(batches):
    # The comparison of a restored run relies on this: the restored state affects dropout and rewiring.
    trainer, other = new_trainer(), new_trainer()
    train(trainer, batches, [0, 1])
    before = np.array(trainer.model.head.output.indices[...])
    losses = train(trainer, batches, [2])
    assert np.any(before != trainer.model.head.output.indices[...])
    train(other, batches, [0, 1])
    for path, leaf in nnx.to_flat_state(other.state["other"]):
        if path[-1] == "count":
            leaf[...] = leaf[...] + 1
    assert train(other, batches, [2]) != losses


def test_save_latest_keeps_two_checkpoints(tmp_path, batches):
    trainer, checkpoints = new_trainer(), Checkpoints(tmp_path)
    for epoch in range(3):
        train(trainer, batches, [epoch])
        checkpoints.save_latest(trainer, {"epochs": epoch + 1})
    checkpoints.save_latest(trainer, {"epochs": "saved at this step already"})
    restored = new_trainer()
    assert Checkpoints(tmp_path).restore_latest(restored) == {"epochs": 3}
    assert_equal(restored.state, trainer.state)
    assert {path.name for path in (tmp_path / "latest").iterdir()} == {"10", "10.json", "15", "15.json"}


def test_restore_latest_without_checkpoints_returns_none(tmp_path):
    trainer = new_trainer()
    assert Checkpoints(tmp_path / "new").restore_latest(trainer) is None
    assert_equal(trainer.state, new_trainer().state)
    assert trainer.step == 0


def test_half_written_checkpoint_is_ignored(tmp_path, batches):
    trainer = new_trainer()
    train(trainer, batches, [0])
    Checkpoints(tmp_path).save_latest(trainer, {"epochs": 1})
    saved = tmp_path / "latest" / "5"
    half = tmp_path / "latest" / "10.orbax-checkpoint-tmp"  # Orbax writes here and then renames
    (half / "state").mkdir(parents=True)
    (half / "state" / "d").write_bytes(b"half")
    restored = new_trainer(seed=7)
    assert Checkpoints(tmp_path).restore_latest(restored) == {"epochs": 1}
    assert_equal(restored.state, trainer.state)
    assert saved.is_dir()
    # It does not prevent a new checkpoint of that step.
    train(restored, batches, [1])
    Checkpoints(tmp_path).save_latest(restored, {"epochs": 2})
    assert Checkpoints(tmp_path).restore_latest(new_trainer()) == {"epochs": 2}


def test_next_save_removes_only_leftovers_of_killed_processes(tmp_path, batches):
    trainer = new_trainer()
    train(trainer, batches, [0])
    latest = tmp_path / "latest"
    for name in ("3/state", "4.orbax-checkpoint-tmp/state", "mine"):
        (latest / name).mkdir(parents=True)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore_latest(new_trainer()) is None
    assert {path.name for path in latest.iterdir()} == {"3", "4.orbax-checkpoint-tmp", "mine"}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save_latest(trainer, {})
    assert {path.name for path in latest.iterdir()} == {"5", "5.json", "mine"}


def test_restore_frees_old_state_first(tmp_path, batches, monkeypatch):
    trainer = new_trainer()
    train(trainer, batches, [0])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save_latest(trainer, {})
        checkpoints.save_best(trainer)
        restored, restore = new_trainer(), ocp.Checkpointer.restore

        def watch(*arguments, **options):
            arrays = jax.tree.leaves((restored.state["params"], restored.state["other"]))
            assert not any(isinstance(array, jax.Array) for array in arrays)
            return restore(*arguments, **options)

        monkeypatch.setattr(ocp.Checkpointer, "restore", watch)
        checkpoints.restore_latest(restored)
        checkpoints.restore_best(restored)
    assert_equal(restored.state, trainer.state)


def test_restore_best_restores_weights_but_not_moments(tmp_path, batches):
    trainer, checkpoints = new_trainer(), Checkpoints(tmp_path)
    for epoch in range(2):  # the second is better than the first
        train(trainer, batches, [epoch])
        checkpoints.save_best(trainer)
    best = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(trainer.model, nnx.Not(nnx.RngState))))
    train(trainer, batches, [2, 3])
    moments = values(trainer.state["moments"])
    checkpoints.restore_best(trainer)
    after = nnx.to_pure_dict(nnx.state(trainer.model, nnx.Not(nnx.RngState)))
    jax.tree.map(np.testing.assert_array_equal, after, best)
    for a, b in zip(values(trainer.state["moments"]), moments, strict=True):
        np.testing.assert_array_equal(a, b)
    train(trainer, batches, [4])  # the restored arrays can be trained on


def save_twice(directory, batches):
    """Save checkpoints after 5 and 10 steps; return the trainer."""
    trainer = new_trainer()
    with Checkpoints(directory) as checkpoints:
        for epoch in range(2):
            train(trainer, batches, [epoch])
            checkpoints.save_latest(trainer, {"epochs": epoch + 1})
    return trainer


def largest_file(directory):
    return max(
        (path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_bit, "has changed"),
        (truncate, "has changed"),
        (lambda path: path.unlink(), "is missing"),
        (lambda path: (path.parent / "more").write_bytes(b"more"), "more is new"),
    ],
)
def test_damaged_checkpoint_is_skipped(tmp_path, batches, caplog, damage, message):
    save_twice(tmp_path, batches)
    damage(largest_file(tmp_path / "latest" / "10"))
    restored = new_trainer(seed=7)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore_latest(restored) == {"epochs": 1}
    assert restored.step == 5
    (warning,) = caplog.messages
    assert "latest/10 is damaged" in warning
    assert message in warning
    # The run continues and writes the same checkpoint again.
    train(restored, batches, [1])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save_latest(restored, {"epochs": 2})
        assert checkpoints.restore_latest(new_trainer()) == {"epochs": 2}


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content.replace('"num_labels": 30', '"num_labels": 31'),
        lambda content: content.replace("files", "fi1es"),
        lambda content: content.replace("sha256", "sha255"),
        lambda content: content[:-1],
        lambda content: "[" * 20_000,
        lambda content: "[]",
        lambda content: "3",
        lambda content: "",
        lambda content: content + "\udcff",
    ],
)
def test_checkpoint_with_damaged_record_is_skipped(tmp_path, batches, caplog, damage):
    save_twice(tmp_path, batches)
    record = tmp_path / "latest" / "10.json"
    damaged = damage(record.read_text())
    assert damaged != record.read_text()
    record.write_bytes(damaged.encode(errors="surrogateescape"))
    restored = new_trainer(seed=7)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore_latest(restored) == {"epochs": 1}
    (warning,) = caplog.messages
    assert re.search(r"latest/10 is damaged \(\S+/latest/10\.json: damaged: ", warning)


def test_checkpoint_with_incomplete_record_is_skipped(tmp_path, batches, caplog):
    save_twice(tmp_path, batches)
    record = tmp_path / "latest" / "10.json"
    fields = read_sealed_json(record)
    del fields["files"]
    write_sealed_json(record, fields)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore_latest(new_trainer()) == {"epochs": 1}
    assert "10.json: expected a field 'files', got none" in caplog.text


@pytest.mark.parametrize("name", ["lr=[1,2]", "a\\b", "a*b", "a?b", "{a,b}", "ä [b]/c"])
def test_directory_names_with_special_characters(tmp_path, batches, name):
    Checkpoints(tmp_path / "a-b").save_latest(new_trainer(kind="dense"), {"epochs": "of another"})
    trainer = save_twice(tmp_path / name, batches)
    restored = new_trainer(seed=7)
    with Checkpoints(tmp_path / name) as checkpoints:
        checkpoints.save_best(trainer)
        assert checkpoints.restore_latest(restored) == {"epochs": 2}
        assert_equal(restored.state, trainer.state)
        checkpoints.restore_best(restored)
    assert_equal(restored.state, trainer.state)
    assert {path.name for path in (tmp_path / name / "latest").iterdir()} == {"5", "5.json", "10", "10.json"}


def test_symlinks_are_replaced_not_followed(tmp_path, batches):
    outside, latest = tmp_path / "outside", tmp_path / "checkpoints" / "latest"
    (outside / "state").mkdir(parents=True)
    (outside / "file").write_text("mine")
    latest.mkdir(parents=True)
    for name in ("10", "10.orbax-checkpoint-tmp", "1"):
        (latest / name).symlink_to(outside)
    for name in (".10.json.partial", ".5.json.partial"):
        (latest / name).symlink_to(outside / "file")
    trainer = save_twice(tmp_path / "checkpoints", batches)
    assert sorted(path.name for path in outside.rglob("*")) == ["file", "state"]
    assert (outside / "file").read_text() == "mine"
    restored = new_trainer(seed=7)
    assert Checkpoints(tmp_path / "checkpoints").restore_latest(restored) == {"epochs": 2}
    assert_equal(restored.state, trainer.state)


@pytest.mark.parametrize("damage", [lambda best: flip_bit(largest_file(best / "1")), shutil.rmtree])
def test_lost_best_weights_are_replaced_by_latest_weights(tmp_path, batches, caplog, damage):
    trainer = new_trainer()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save_best(trainer)
        assert not checkpoints.replace_lost_best(trainer)
    assert not caplog.messages
    damage(tmp_path / "best")
    train(trainer, batches, [0])
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.replace_lost_best(trainer)
        assert caplog.messages[-1].endswith("those of the latest checkpoint take their place")
        restored = new_trainer(seed=7)
        checkpoints.restore_best(restored)
    assert_equal(restored.state["params"], trainer.state["params"])


def test_checkpoint_without_record_is_ignored(tmp_path, batches, caplog):
    save_twice(tmp_path, batches)
    (tmp_path / "latest" / "10.json").unlink()
    (tmp_path / "latest" / "a folder of someone else").mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore_latest(new_trainer()) == {"epochs": 1}
    assert not caplog.messages


def test_only_damaged_checkpoints_raise(tmp_path, batches):
    save_twice(tmp_path, batches)
    flip_bit(largest_file(tmp_path / "latest" / "5"))
    (tmp_path / "latest" / "10.json").write_text("{")
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match="all checkpoints are damaged"):
        checkpoints.restore_latest(new_trainer())


def test_restore_of_lost_or_damaged_best_weights_raises(tmp_path, batches):
    trainer = new_trainer()
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(FileNotFoundError, match="best: no weights were saved"):
            checkpoints.restore_best(trainer)
        checkpoints.save_best(trainer)
        flip_bit(largest_file(tmp_path / "best" / "1"))
        with pytest.raises(ValueError, match=r"best: all checkpoints are damaged: .* has changed"):
            checkpoints.restore_best(trainer)


def test_failed_save_keeps_earlier_checkpoints(tmp_path, batches, monkeypatch):
    trainer = save_twice(tmp_path, batches)

    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    train(trainer, batches, [2])
    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(ocp.Checkpointer, "save", fail)
        with pytest.raises(OSError, match=r"latest/15: .* No space left on device; checkpoint 10 is still"):
            checkpoints.save_latest(trainer, {"epochs": 3})
        assert checkpoints.restore_latest(new_trainer()) == {"epochs": 2}


@pytest.mark.parametrize("kind", ["dense", "unstructured"])
def test_checkpoint_of_other_sizes_raises(tmp_path, kind):
    ours, other = (
        Trainer(make_model(kind, fan_in=fan_in, penultimate=penultimate), TrainingConfig(batch_size=8))
        for fan_in, penultimate in ((4, 16), (3, 12))
    )
    if kind == "dense":
        config = config_of(kind)
        other = Trainer(
            dataclasses.replace(config, num_features=9).make(rngs=nnx.Rngs(0)), TrainingConfig(batch_size=8)
        )
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save_latest(ours, {})
        with pytest.raises(ValueError, match=r"not the weights of such a model: .*, expected "):
            checkpoints.restore_latest(other)
