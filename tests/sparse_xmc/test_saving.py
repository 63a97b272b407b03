import concurrent.futures
import contextlib
import dataclasses
import errno
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from small_models import config_of, make_inputs, make_model

from experiments.unstructured import UnstructuredLinear
from sparse_xmc import saving, weights
from sparse_xmc.data import LabelEncoder, TextEncoder
from sparse_xmc.heads import HEADS
from sparse_xmc.inputs import InputEncoder
from sparse_xmc.layers import FixedFanInLinear
from sparse_xmc.metrics import LabelStatistics
from sparse_xmc.saving import SavedModel, load_weights, save_weights
from sparse_xmc.weights import write_weights

WORDS = InputEncoder(TextEncoder([f"word{i}" for i in range(12)], np.ones(12, np.float32)))
NAMES = LabelEncoder([f"label {i}" for i in range(30)])


def assert_equal(model, other):
    for a, b in zip(
        *(jax.tree.leaves(nnx.state(m, nnx.Not(nnx.RngKey))) for m in (model, other)), strict=True
    ):
        np.testing.assert_array_equal(a, b, strict=True)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("bag_of_words", [False, True])
def test_save_and_load_round_trip(tmp_path, kind, bag_of_words):
    config = config_of(kind, bag_of_words=bag_of_words)
    SavedModel(config, make_model(kind, bag_of_words=bag_of_words, seed=4), WORDS, NAMES).save(tmp_path)
    model = make_model(kind, bag_of_words=bag_of_words, seed=3)
    SavedModel(config, model).save(tmp_path)  # replaces the first model
    loaded = SavedModel.load(tmp_path)
    assert loaded.config == config
    assert loaded.inputs is loaded.label_encoder is None
    assert_equal(loaded.model, model)
    inputs = make_inputs(bag_of_words=bag_of_words)
    np.testing.assert_array_equal(loaded.model(inputs), model(inputs))


@pytest.mark.usefixtures("x64")
def test_text_and_label_encoders_round_trip(tmp_path):
    SavedModel(config_of(bag_of_words=True), make_model(bag_of_words=True), WORDS, NAMES).save(tmp_path)
    loaded = SavedModel.load(tmp_path)
    assert loaded.label_encoder.names == NAMES.names
    np.testing.assert_array_equal(
        loaded.inputs(["word3 word7"]).features.toarray(), WORDS(["word3 word7"]).features.toarray()
    )


@pytest.mark.parametrize("part", ["model.json", "model"])
def test_missing_part_raises(tmp_path, part):
    SavedModel(config_of(), make_model()).save(tmp_path)
    (tmp_path / part).rename(tmp_path / "elsewhere")
    with pytest.raises(
        FileNotFoundError, match=rf"{part}: not there; is this the directory of a saved model\?"
    ):
        SavedModel.load(tmp_path)


def test_inconsistent_parts_raise(tmp_path, monkeypatch):
    SavedModel(config_of(bag_of_words=True), make_model(bag_of_words=True), WORDS, NAMES).save(tmp_path)
    monkeypatch.setattr(saving, "check_files", lambda *arguments: None)  # else checksums fail first
    LabelEncoder(NAMES.names[1:]).save(tmp_path / "labels.txt")
    with pytest.raises(ValueError, match=r"labels\.txt: has 29 labels, but the model 30"):
        SavedModel.load(tmp_path)
    NAMES.save(tmp_path / "labels.txt")
    config = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps(config | {"num_features": 13}))
    with pytest.raises(ValueError, match=r"text_encoder\.json: has 12 words, but the model 13"):
        SavedModel.load(tmp_path)
    for text in ("{", "[" * 20_000):
        (tmp_path / "model.json").write_text(text)
        with pytest.raises(ValueError, match=r"model\.json: not the configuration of a classifier"):
            SavedModel.load(tmp_path)
    for rows in (29, "30"):
        (tmp_path / "model.json").write_text(json.dumps(config | {"label_rows": rows}))
        with pytest.raises(ValueError, match=rf"model\.json: label_rows must be .*, 30, got {rows!r}"):
            SavedModel.load(tmp_path)


@pytest.mark.parametrize(
    ("weights", "groups", "message"),
    [
        (np.ones(29), np.zeros(29, np.int8), "has 29 labels, but the model 30"),
        (np.ones(30), np.zeros(29, np.int8), r"groups must be int8 \[L\], got int8 \[29\]"),
        (
            np.ones((30, 2)),
            np.zeros(30, np.int8),
            r"inv_propensities must be float64 \[L\], got .* \[30, 2\]",
        ),
        (np.ones(()), np.zeros(1, np.int8), r"inv_propensities must be float64 \[L\], got float64 \[\]"),
        (np.ones(30, np.float32), np.zeros(30, np.int8), "inv_propensities must be float64"),
        (np.r_[np.ones(29), np.nan], np.zeros(30, np.int8), "must be finite, got nan of label 29"),
        (np.ones(30), np.r_[np.zeros(2), 3, np.zeros(27)].astype(np.int8), r"in 0\.\.2, got 3 of label 2"),
    ],
)
def test_invalid_label_statistics_raise(tmp_path, weights, groups, message):
    statistics = LabelStatistics(weights, groups)
    SavedModel(config_of(), make_model(), label_statistics=statistics).save(tmp_path)  # with right checksums
    with pytest.raises(ValueError, match=rf"label_statistics\.npz: .*{message}"):
        SavedModel.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PK", b"\x93NUMPY", b"not a file of NumPy"])
def test_malformed_label_statistics_file_raises(tmp_path, content):
    (tmp_path / "file.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"file\.npz: not the statistics of labels"):
        LabelStatistics.load(tmp_path / "file.npz")


@pytest.mark.parametrize("name", ["lr=[1,2]", "a\\b", "a*b", "a?b", "{a,b}", "ä [b]/c"])
def test_directory_names_with_special_characters(tmp_path, name):
    other = tmp_path / "a-b"  # the patterns "a*b" and "a?b" match this name
    SavedModel(config_of(labels=29), make_model(labels=29)).save(other)
    directory, model = tmp_path / name, make_model(seed=3)
    for _ in range(2):
        SavedModel(config_of(), model).save(directory)
    assert_equal(SavedModel.load(directory).model, model)
    for _ in range(2):
        save_weights(directory / "we[i]ghts", model)
    assert_equal(load_weights(directory / "we[i]ghts", make_model()), model)
    names = {path.name for path in directory.iterdir()}
    assert names == {"README.md", "checksums.json", "model", "model.json", "we[i]ghts"}


def test_symlinks_are_replaced_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "checksums.json").write_text("mine")
    directory = tmp_path / "saved"
    directory.mkdir()
    links = [
        *("labels.txt", ".labels.txt.partial", "label_statistics.npz", ".label_statistics.npz.partial"),
        *("model.json", "text_encoder.json", "checksums.json", "README.md.partial", ".README.md.partial"),
    ]
    for name in links:
        (directory / name).symlink_to(outside)
    for name in ("model", ".new_model", ".new_model.partial"):
        (directory / name).symlink_to(tmp_path / "others")
    statistics = LabelStatistics(np.ones(30), np.zeros(30, np.int8))
    config, model = config_of(bag_of_words=True), make_model(bag_of_words=True)
    SavedModel(config, model, WORDS, NAMES, label_statistics=statistics).save(directory)
    assert outside.read_text() == (tmp_path / "others" / "checksums.json").read_text() == "mine"
    assert SavedModel.load(directory).label_encoder.names == NAMES.names


class Killed(BaseException):
    pass


def kill_after(monkeypatch, step):
    """Make file operations raise Killed after `step` of them; return the list of operations so far."""
    steps = []

    def watched(function):
        def call(*arguments, **options):
            steps.append(function)
            if len(steps) > step:
                raise Killed
            return function(*arguments, **options)

        return call

    for name in ("mkdir", "rename", "replace", "rmdir", "unlink"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    return steps


def test_save_killed_at_any_step_leaves_old_or_new_model(tmp_path, monkeypatch):
    names = [f"label {i}" for i in range(30)]
    old = SavedModel(config_of(bag_of_words=True), make_model(bag_of_words=True), WORDS, NAMES)
    statistics = LabelStatistics(np.ones(30), np.zeros(30, np.int8))
    new = SavedModel(
        *(config_of("dense", bag_of_words=True), make_model("dense", bag_of_words=True), WORDS),
        label_statistics=statistics,
        parameters={"seed": 3},
    )
    weights = {id(saved.model): tmp_path / f"weights-{i}" for i, saved in enumerate((old, new))}
    for saved in (old, new):
        write_weights(weights[id(saved.model)], saved.model)
    # Copying is faster than writing by Orbax. Loading a model still compares checksums.
    copy = shutil.copytree
    monkeypatch.setattr(saving, "write_weights", lambda path, model: copy(weights[id(model)], path))
    monkeypatch.setattr(saving, "load_weights", lambda path, model, label_rows: model)
    kinds, step, ended = [], 0, False
    while not ended:
        directory = tmp_path / f"{step}"
        directory.mkdir()
        (directory / "result.json").write_text("of the run")
        old.save(directory)
        with monkeypatch.context() as patch:
            kill_after(patch, step)
            try:
                new.save(directory)
                ended = True
            except Killed:
                pass
        for _ in range(2):  # loading changes nothing
            loaded = SavedModel.load(directory)
            kinds.append(type(loaded.config.head).__name__)
            is_new = loaded.config == new.config
            assert loaded.config == (new if is_new else old).config
            assert (loaded.label_encoder is None) == is_new
            assert (loaded.label_statistics is not None) == is_new
            assert loaded.parameters == ({"seed": 3} if is_new else None)
        old.save(directory)  # the next save succeeds
        assert SavedModel.load(directory).label_encoder.names == names
        assert {path.name for path in directory.iterdir()} == {
            *("README.md", "checksums.json", "labels.txt", "model", "model.json", "result.json"),
            "text_encoder.json",
        }
        step += 1
    assert kinds == sorted(kinds, reverse=True)  # first the old model, then the new one
    assert 10 < kinds.count("DenseConfig") < len(kinds) - 10


def test_failed_save_leaves_only_the_old_model(tmp_path, monkeypatch, capsys):
    SavedModel(config_of(bag_of_words=True), make_model(bag_of_words=True), WORDS, NAMES).save(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    statistics = LabelStatistics(np.ones(30), np.zeros(30, np.int8))
    new = SavedModel(config_of(), make_model(), label_statistics=statistics)

    def raise_no_space(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for where, name in ((np, "savez"), (ocp.Checkpointer, "save"), (os, "fsync")):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, raise_no_space)
            with pytest.raises(OSError, match="No space left on device") as raised:
                new.save(tmp_path)
        assert str(tmp_path) in str(raised.value)
        assert "\n" not in str(raised.value)
        assert sorted(tmp_path.rglob("*")) == before
        assert SavedModel.load(tmp_path).label_encoder.names == NAMES.names
    assert capsys.readouterr() == ("", "")
    with pytest.raises(TypeError, match="not JSON serializable"):
        dataclasses.replace(new, parameters={"seed": object()}).save(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_failed_write_raises_one_error_and_prints_nothing(tmp_path, capfd):
    with size_limit(1 << 16), pytest.raises(OSError, match=r"weights: could not be written: .") as raised:
        write_weights(tmp_path / "weights", nnx.Linear(300, 300, rngs=nnx.Rngs(0)))
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


@contextlib.contextmanager
def size_limit(size):
    """Limit the size of files in bytes: larger writes fail as on a full disk."""
    limits, before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def test_threads_save_and_load_concurrently(tmp_path):
    models = [SavedModel(config_of(), make_model(seed=seed)) for seed in range(4)]

    def save_and_load(number):
        models[number].save(tmp_path / str(number))
        return SavedModel.load(tmp_path / str(number)).model

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for saved, loaded in zip(models, pool.map(save_and_load, range(4)), strict=True):
            assert_equal(loaded, saved.model)


def test_weights_of_custom_module_round_trip(tmp_path):
    module = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    save_weights(tmp_path / "weights", module)
    loaded = load_weights(tmp_path / "weights", nnx.Linear(3, 4, rngs=nnx.Rngs(1)))
    assert_equal(loaded, module)


def test_weights_of_other_shapes_raise(tmp_path):
    save_weights(tmp_path / "weights", nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    for module, message in (
        (nnx.Linear(3, 5, rngs=nnx.Rngs(0)), r"bias is float32 \[4\], expected float32 \[5\]"),
        (nnx.Linear(3, 4, use_bias=False, rngs=nnx.Rngs(0)), r"bias is float32 \[4\], expected none"),
        (nnx.BatchNorm(4, rngs=nnx.Rngs(0)), r"kernel is float32 \[3, 4\], expected none"),
        (nnx.Linear(3, 4, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), r"expected bfloat16 \[4\]"),
    ):
        with pytest.raises(ValueError, match=f"not the weights of such a model: .*{message}"):
            load_weights(tmp_path / "weights", module)
    with pytest.raises(FileNotFoundError, match="nowhere: no such directory"):
        load_weights(tmp_path / "nowhere", nnx.Linear(3, 4, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("layer", [FixedFanInLinear, UnstructuredLinear])
def test_missing_or_out_of_range_indices_raise(tmp_path, layer):
    wide, narrow = (nnx.Sequential(layer(width, 200, 8, rngs=nnx.Rngs(0))) for width in (64, 8))
    save_weights(tmp_path / "weights", wide)
    with pytest.raises(ValueError, match=r"layers\.0\.indices has input \d+, expected 0\.\.7"):
        load_weights(tmp_path / "weights", narrow)
    save_weights(tmp_path / "without connections", nnx.Sequential(nnx.Linear(8, 200, rngs=nnx.Rngs(0))))
    with pytest.raises(ValueError, match=r"layers\.0\.indices is missing, expected"):
        load_weights(tmp_path / "without connections", narrow)


def damage_labels(directory):
    lines = (directory / "labels.txt").read_text().splitlines()
    lines[2], lines[3] = lines[3], lines[2]
    (directory / "labels.txt").write_text("\n".join(lines) + "\n")


def damage_weights(directory):
    path = max((p for p in (directory / "model").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_labels, r"the saved model is damaged: labels\.txt has changed since it was saved"),
        (damage_weights, r"the saved model is damaged: model/.* has changed since it was saved"),
        (lambda d: (d / "labels.txt").unlink(), r"labels\.txt is missing"),
        (lambda d: (d / "tokenizer.json").write_text("{}"), r"tokenizer\.json is new"),
        (
            lambda d: (d / "checksums.json").unlink(),
            r"checksums\.json: not there: the model was saved",
        ),
        (lambda d: (d / "checksums.json").write_text("{}"), "not the checksums of a saved model"),
        (
            lambda d: (d / "checksums.json").write_text('{"format": 2, "files": {}}'),
            "model of format 2",
        ),
    ],
)
def test_damaged_model_raises(tmp_path, damage, message):
    SavedModel(config_of(bag_of_words=True), make_model(bag_of_words=True), WORDS, NAMES).save(tmp_path)
    (tmp_path / "notes of someone else.txt").write_text("which do not matter")
    SavedModel.load(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        SavedModel.load(tmp_path)


@pytest.mark.parametrize("save", ["model", "weights"])
def test_weights_are_moved_after_all_processes_have_checked_them(tmp_path, monkeypatch, save):
    events = []
    monkeypatch.setattr(weights, "check_sizes", lambda metadata, state, path: events.append("check"))
    monkeypatch.setattr(weights, "wait_for_all", lambda what: events.append(what))
    rename = Path.rename

    def record_rename(path, target):
        events.append("move")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", record_rename)
    model = make_model()
    if save == "weights":
        save_weights(tmp_path / "weights", model)
    else:
        SavedModel(config_of(), model).save(tmp_path)
    assert events[:2] == ["check", "written weights"]
    assert "move" in events[2:]
