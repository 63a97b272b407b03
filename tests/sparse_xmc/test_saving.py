import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import config_of, make_inputs, make_model

from sparse_xmc import saving
from sparse_xmc.data import LabelEncoder, TextEncoder
from sparse_xmc.heads import HEADS
from sparse_xmc.heads.unstructured import UnstructuredLinear
from sparse_xmc.layers import FixedFanInLinear
from sparse_xmc.saving import SavedModel, load_weights, save_weights

WORDS = TextEncoder([f"word{i}" for i in range(12)], np.ones(12, np.float32))
NAMES = LabelEncoder([f"label {i}" for i in range(30)])


def assert_equal(model, other):
    for a, b in zip(
        *(jax.tree.leaves(nnx.state(m, nnx.Not(nnx.RngKey))) for m in (model, other)), strict=True
    ):
        np.testing.assert_array_equal(a, b, strict=True)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("bag_of_words", [False, True])
def test_models_round_trip(tmp_path, kind, bag_of_words):
    config = config_of(kind, bag_of_words=bag_of_words)
    SavedModel(config, make_model(kind, bag_of_words=bag_of_words, seed=4), WORDS, NAMES).save(tmp_path)
    model = make_model(kind, bag_of_words=bag_of_words, seed=3)
    SavedModel(config, model).save(tmp_path)  # in place of that one
    loaded = SavedModel.load(tmp_path)
    assert loaded.config == config
    assert loaded.text_encoder is loaded.label_encoder is None
    assert_equal(loaded.model, model)
    inputs = make_inputs(bag_of_words=bag_of_words)
    np.testing.assert_array_equal(loaded.model(inputs), model(inputs))


@pytest.mark.usefixtures("x64")
def test_encoders_round_trip(tmp_path):
    SavedModel(config_of(bag_of_words=True), make_model(bag_of_words=True), WORDS, NAMES).save(tmp_path)
    loaded = SavedModel.load(tmp_path)
    assert loaded.label_encoder.names == NAMES.names
    np.testing.assert_array_equal(
        loaded.text_encoder(["word3 word7"]).toarray(), WORDS(["word3 word7"]).toarray()
    )


@pytest.mark.parametrize("part", ["model.json", "model"])
def test_a_missing_part_is_an_error(tmp_path, part):
    SavedModel(config_of(), make_model()).save(tmp_path)
    (tmp_path / part).rename(tmp_path / "elsewhere")
    with pytest.raises(
        FileNotFoundError, match=rf"{part}: not there; is this the directory of a saved model\?"
    ):
        SavedModel.load(tmp_path)


def test_parts_that_do_not_fit_are_errors(tmp_path, monkeypatch):
    SavedModel(config_of(bag_of_words=True), make_model(bag_of_words=True), WORDS, NAMES).save(tmp_path)
    monkeypatch.setattr(saving, "_check_files", lambda directory: None)  # which would have seen all of it
    LabelEncoder(NAMES.names[1:]).save(tmp_path / "labels.txt")
    with pytest.raises(ValueError, match=r"labels\.txt: has 29 labels, but the model 30"):
        SavedModel.load(tmp_path)
    NAMES.save(tmp_path / "labels.txt")
    config = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps(config | {"num_features": 13}))
    with pytest.raises(ValueError, match=r"text_encoder\.json: has 12 words, but the model 13"):
        SavedModel.load(tmp_path)
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(ValueError, match=r"model\.json: not the configuration of a classifier"):
        SavedModel.load(tmp_path)


def test_weights_of_a_users_own_module_round_trip(tmp_path):
    module = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    save_weights(tmp_path / "weights", module)
    loaded = load_weights(tmp_path / "weights", nnx.Linear(3, 4, rngs=nnx.Rngs(1)))
    assert_equal(loaded, module)


def test_weights_of_another_shape_are_an_error(tmp_path):
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
def test_connections_to_inputs_that_a_layer_lacks_are_an_error(tmp_path, layer):
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
def test_a_damaged_model_is_refused(tmp_path, damage, message):
    SavedModel(config_of(bag_of_words=True), make_model(bag_of_words=True), WORDS, NAMES).save(tmp_path)
    (tmp_path / "notes of someone else.txt").write_text("which do not matter")
    SavedModel.load(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        SavedModel.load(tmp_path)
