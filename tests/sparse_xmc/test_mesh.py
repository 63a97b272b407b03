"""Tests of labels that are sharded over a mesh, against one device."""

import itertools
import logging
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from flax import nnx
from sklearn.base import clone
from small_encoders import add_tokenizer, make_directory

from experiments.measure.meshes import bytes_on_first_device, collectives
from sparse_xmc import XMCClassifier
from sparse_xmc.data import Dataset
from sparse_xmc.data.batches import BagOfWords, Batch, Batches, padded_inputs
from sparse_xmc.evaluation import evaluate, gradient_density, predict
from sparse_xmc.heads import (
    HEADS,
    FixedFanInConfig,
    HeadSpec,
    HeadTraining,
    RewireConfig,
    StepInputs,
)
from sparse_xmc.mesh import make_mesh, parse_mesh, place_batch
from sparse_xmc.model import ClassifierConfig, EncoderConfig
from sparse_xmc.saving import SavedModel
from sparse_xmc.train import Checkpoints, Trainer, TrainingConfig, fit
from sparse_xmc.warm_start import start_from

pytestmark = pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 devices")
MESHES = pytest.mark.parametrize("mesh", [(1, 1), (2, 1), (1, 2), (2, 2), (1, 8)], ids=str)
FEATURES, LABELS, POINTS = 12, 103, 80  # no number of devices divides 103


def make_heads(mesh, labels=LABELS, **options):
    """Return the same head on one device and on a mesh."""
    config = FixedFanInConfig(**{"penultimate": 24, "fan_in": 5, "output_bias": -0.5} | options)
    one = config.make(HeadSpec(FEATURES, labels), nnx.Rngs(0))
    return one, config.make(HeadSpec(FEATURES, labels, mesh=make_mesh(*mesh)), nnx.Rngs(0))


def make_inputs(labels=LABELS, seed=0):
    rng = np.random.default_rng(seed)
    positives = np.stack([rng.permutation(labels)[:3] for _ in range(8)]).astype(np.int32)
    positives[2:4, 1:] = -1
    return jnp.asarray(rng.normal(size=(8, FEATURES)), jnp.float32), jnp.asarray(positives)


def assert_same_weights(one, sharded, exactly=False):
    for (path, a), (_, b) in zip(
        nnx.to_flat_state(nnx.state(one)), nnx.to_flat_state(nnx.state(sharded)), strict=True
    ):
        a, b = (np.asarray(x[...]) for x in (a, b))
        b = b[: len(a)] if b.ndim else b
        if exactly or a.dtype.kind in "iu":
            np.testing.assert_array_equal(a, b, err_msg=str(path))
        else:
            a, b = a.astype(np.float32), b.astype(np.float32)
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5, err_msg=str(path))


class TestHead:
    @MESHES
    @pytest.mark.parametrize("labels", [LABELS, 3])
    def test_initial_weights_losses_and_ranking_match_one_device(self, mesh, labels):
        one, sharded = make_heads(mesh, labels)
        assert_same_weights(one, sharded, exactly=True)
        x, positives = make_inputs(labels)
        np.testing.assert_allclose(sharded(x), one(x), rtol=1e-5, atol=1e-6)
        for loss in ("squared_hinge", "bce"):
            expected = one.loss(x, positives, loss)
            np.testing.assert_allclose(sharded.loss(x, positives, loss), expected, rtol=1e-5)
        for k in {1, min(20, labels), labels}:
            (scores, ids), (expected_scores, expected_ids) = sharded.top_k(x, k), one.top_k(x, k)
            np.testing.assert_allclose(scores, expected_scores, rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(ids, expected_ids)
        blocks = list(sharded.logits_in_blocks(x))
        np.testing.assert_array_equal(np.concatenate([ids for _, ids in blocks]), np.arange(labels))
        np.testing.assert_allclose(np.hstack([b for b, _ in blocks]), one(x), rtol=1e-5, atol=1e-6)

    def test_top_k_breaks_ties_by_lower_label(self):
        _, sharded = make_heads((2, 2), output_bound=1e-30)
        x, _ = make_inputs()
        np.testing.assert_array_equal(sharded.top_k(x, 9)[1], np.tile(np.arange(9), (8, 1)))
        with pytest.raises(ValueError, match=r"k must be in 1..103, got 104"):
            sharded.top_k(x, 104)

    @MESHES
    @pytest.mark.parametrize("kind", ["step_fused", "step_by_optax"])
    @pytest.mark.parametrize(
        ("optimizer", "dtype", "penultimate"),
        [("adam", "float32", 24), ("sgd", "float32", 24), ("sgd", "bfloat16", 24), ("adam", "float32", 0)],
    )
    def test_steps_match_one_device(self, mesh, kind, optimizer, dtype, penultimate):
        if mesh in ((1, 1), (2, 1)) and (kind, optimizer) != ("step_fused", "adam"):
            pytest.skip("covered by the other meshes")
        one, sharded = make_heads(mesh, output_dtype=dtype, penultimate=penultimate)
        training = HeadTraining(output_optimizer=optimizer, epsilon=1e-9)
        moments, sharded_moments = one.init_moments(training), sharded.init_moments(training)
        for number in range(3):
            x, positives = make_inputs(seed=number)
            inputs = StepInputs(x, positives, jnp.float32(1e-2), 3, jnp.int32(number))
            with jax.numpy_dtype_promotion("standard"):  # Optax needs it
                loss, d_x, moments = getattr(one, kind)(inputs, moments, training)
                value, sharded_d_x, sharded_moments = getattr(sharded, kind)(
                    inputs, sharded_moments, training
                )
            # In bfloat16 each device rounds its summand of d_x.
            tolerance = 2e-2 if dtype == "bfloat16" else 1e-3
            np.testing.assert_allclose(value, loss, rtol=tolerance / 10)
            scale = float(jnp.abs(d_x).max())
            np.testing.assert_allclose(sharded_d_x, d_x, rtol=tolerance, atol=tolerance * scale)
        if dtype == "float32":
            assert_same_weights(one, sharded)
        for name, mu in moments.mu.items():
            atol = tolerance * float(jnp.abs(mu).max())
            np.testing.assert_allclose(sharded_moments.mu[name][: len(mu)], mu, rtol=tolerance, atol=atol)
            assert not np.any(np.asarray(sharded_moments.mu[name][len(mu) :]))

    def test_bfloat16_rounding_matches_one_device_exactly(self):
        # Sums have another order on a mesh. One point and no penultimate layer avoid such sums.
        one, sharded = make_heads((1, 8), output_dtype="bfloat16", penultimate=0)
        training = HeadTraining(output_optimizer="sgd", output_lr_multiplier=0.3)
        x, positives = make_inputs()
        inputs = StepInputs(x[:1], positives[:1], jnp.float32(1e-2), 3, jnp.int32(5))
        for head in (one, sharded):
            head.step_fused(inputs, head.init_moments(training), training)
        assert_same_weights(one, sharded, exactly=True)

    @MESHES
    @pytest.mark.parametrize("growth", ["random", "active"])
    def test_rewiring_matches_one_device(self, mesh, growth):
        one, sharded = make_heads(mesh)
        before = np.asarray(one.output.indices[...])
        training = HeadTraining()
        x, positives = make_inputs()
        config = RewireConfig(fraction=0.3, growth=growth)
        moments = one.rewire(x, positives, one.init_moments(training), jax.random.key(5), config)
        sharded_moments = sharded.rewire(
            x, positives, sharded.init_moments(training), jax.random.key(5), config
        )
        assert_same_weights(one, sharded, exactly=True)
        moved = np.mean(before != np.asarray(one.output.indices[...]))
        assert (0.2 < moved < 0.31) if growth == "random" else moved > 0
        np.testing.assert_array_equal(
            sharded_moments.mu["output.kernel"][:LABELS], moments.mu["output.kernel"]
        )

    def test_arrays_are_sharded_by_label(self):
        _, sharded = make_heads((2, 4))
        for array in (sharded.output.kernel, sharded.output.indices, sharded.output.bias):
            assert array.shape[0] == 104
            assert {shard.data.shape[0] for shard in array[...].addressable_shards} == {13}
        moments = sharded.init_moments(HeadTraining())
        assert {s.data.shape for s in moments.nu["output.kernel"].addressable_shards} == {(13, 5)}

    def test_top_k_ranks_nan_last_and_never_padding_labels(self):
        _, sharded = make_heads((1, 8), 13)
        kernel = sharded.output.kernel
        kernel.set_value(kernel[...].at[4].set(np.nan))
        x, _ = make_inputs(13)
        scores, labels = sharded.top_k(x, 13)
        assert not np.isfinite(np.asarray(scores)[:, -1]).any()
        np.testing.assert_array_equal(np.sort(labels, axis=1)[0], [-1, *range(4), *range(5, 13)])

    def test_positives_beyond_last_label_are_ignored(self):
        one, sharded = make_heads((1, 8))
        x, positives = make_inputs()
        positives = positives.at[0].set(jnp.array([103, 111, 5]))  # 103 is a padding label
        for loss in ("squared_hinge", "bce"):
            expected = one.loss(x, positives, loss)
            np.testing.assert_allclose(sharded.loss(x, positives, loss), expected, rtol=1e-5)

    def test_methods_compile_once(self):
        _, sharded = make_heads((2, 2))
        x, positives = make_inputs()
        calls = (lambda: sharded.top_k(x, 3), lambda: sharded.loss(x, positives), lambda: sharded(x))
        calls += (lambda: list(sharded.logits_in_blocks(x)),)
        for call in calls:
            call()
        with jax.log_compiles(), warnings.catch_warnings(record=True), pytest.MonkeyPatch.context() as patch:
            compiled = []
            patch.setattr(
                logging.getLogger("jax._src.dispatch"), "handle", lambda r: compiled.append(r.getMessage())
            )
            for call in calls:
                call()
        assert not [message for message in compiled if "Finished XLA compilation of jit(call)" in message]

    def test_other_implementation_of_random_keys(self):
        rngs = nnx.Rngs(jax.random.key(0, impl="rbg"))
        spec = HeadSpec(FEATURES, LABELS, mesh=make_mesh(1, 2))
        head = FixedFanInConfig(penultimate=24, fan_in=5).make(spec, rngs)
        assert head.output.kernel.shape == (104, 5)

    @pytest.mark.parametrize("kind", sorted(set(HEADS) - {"fixed_fan_in"}))
    def test_other_heads_raise(self, kind):
        with pytest.raises(ValueError, match="a mesh needs a fixed fan-in head, got "):
            HEADS[kind]().make(HeadSpec(4, 30, mesh=make_mesh(1, 2)), nnx.Rngs(0))


@pytest.fixture(scope="module")
def dataset():
    rng = np.random.default_rng(0)
    features = scipy.sparse.random_array((POINTS, 40), density=0.2, rng=rng, dtype=np.float32, format="csr")
    return Dataset(features, scipy.sparse.csr_array(rng.random((POINTS, LABELS)) < 0.03))


def make_trainer(dataset, mesh, *, dropout=0.2, **options):
    config = ClassifierConfig(
        40,
        LABELS,
        bag_of_words=True,
        encoder=EncoderConfig(embedding=FEATURES, dropout=dropout),
        head=FixedFanInConfig(penultimate=24, fan_in=5, direct_inputs=2, output_bias=-1),
    )
    model = config.make(train=dataset, mesh=mesh and make_mesh(*mesh), rngs=nnx.Rngs(0))
    settings = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-2, "schedule": "linear", "epsilon": 1e-9}
    settings |= {"rewire": RewireConfig(fraction=0.2, growth="active"), "rewire_interval": 4}
    return config, Trainer(model, TrainingConfig(**settings | options), seed=1)


def fit_fifty_steps(dataset, mesh):
    """Train a model; return it and the records of its epochs."""
    _, trainer = make_trainer(dataset, mesh, epochs=5)
    with jax.numpy_dtype_promotion("standard"):
        records = fit(trainer, dataset, dataset)
    assert trainer.step == 50
    return trainer.model, records


@pytest.fixture(scope="module")
def on_one_device(dataset):
    return fit_fifty_steps(dataset, None)


class TestTraining:
    @MESHES
    def test_fifty_steps_match_one_device(self, dataset, on_one_device, mesh):
        (one, expected), (sharded, records) = on_one_device, fit_fifty_steps(dataset, mesh)
        for ours, theirs in zip(records, expected, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
            assert ours["p@5"] == pytest.approx(theirs["p@5"], abs=0.01)
        assert_same_weights(one.head, sharded.head)
        for (_, _, ranking), (_, _, sharded_ranking) in zip(
            predict(one, dataset, 5, batch_size=24), predict(sharded, dataset, 5, batch_size=24), strict=True
        ):
            assert np.mean(ranking == sharded_ranking) > 0.98
        batches = list(itertools.islice(Batches(dataset, 8).shuffled(0, 0), 2))
        density = gradient_density(one, batches)
        assert gradient_density(sharded, batches) == pytest.approx(density, abs=2e-3)

    def test_communication_does_not_depend_on_number_of_labels(self, dataset):
        _, trainer = make_trainer(dataset, (2, 4))
        batch = next(Batches(dataset, 8).shuffled(0, 0))
        sent = collectives(trainer.trace(batch)["step"].lower().compile().as_text())
        assert ("all-reduce", 4 * (8 * 24 + 1)) in sent  # the gradient of the hidden units, and the loss
        assert sum(size for _, size in sent) <= 4 * (8 * 24 + 1 + 2 * 8 * FEATURES)

    def test_state_is_split_over_devices(self, dataset):
        whole, split = (bytes_on_first_device(make_trainer(dataset, mesh)[1]) for mesh in ((1, 1), (1, 8)))
        assert split["on all devices"] == whole["on all devices"]
        assert split["split by labels"] == whole["split by labels"] * 13 / LABELS

    def test_batch_size_that_data_axis_does_not_divide_raises(self, dataset):
        with pytest.raises(
            ValueError, match=r"batch_size must be a multiple of the mesh's data axis, 2, got 7"
        ):
            make_trainer(dataset, (2, 1), batch_size=7)

    def test_checkpoints_resume_on_any_mesh(self, dataset, tmp_path):
        meshes = [None, (2, 4), (1, 8), None]
        with jax.numpy_dtype_promotion("standard"):
            for epochs, mesh in enumerate(meshes, 1):
                _, trainer = make_trainer(dataset, mesh, epochs=len(meshes))
                with Checkpoints(tmp_path) as checkpoints:
                    progress = checkpoints.restore_latest(trainer)
                    assert (progress is None) == (epochs == 1)
                    list(trainer.epoch(Batches(dataset, 8), epochs - 1, lambda step: 1e-2))
                    checkpoints.save_latest(trainer, {})
            _, straight = make_trainer(dataset, None, epochs=len(meshes))
            for epoch in range(len(meshes)):
                list(straight.epoch(Batches(dataset, 8), epoch, lambda step: 1e-2))
        assert_same_weights(straight.model.head, trainer.model.head)

    @pytest.mark.parametrize("mesh", [None, (1, 8)])
    @pytest.mark.parametrize("labels", [100, 150])
    def test_checkpoint_of_other_number_of_labels_raises(self, dataset, tmp_path, mesh, labels):
        # On 8 devices, 100 and 103 labels have the same number of rows.
        configs = [
            ClassifierConfig(40, n, True, head=FixedFanInConfig(penultimate=24, fan_in=5))
            for n in (labels, LABELS)
        ]
        mesh = mesh and make_mesh(*mesh)
        models = [config.make(mesh=mesh, rngs=nnx.Rngs(0)) for config in configs]
        trainers = [Trainer(model, TrainingConfig(batch_size=8)) for model in models]
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save_latest(trainers[0], {})
            checkpoints.save_best(trainers[0])
            for restore in (checkpoints.restore_latest, checkpoints.restore_best):
                with pytest.raises(ValueError, match=rf"/\d+: is of {labels} labels, expected 103"):
                    restore(trainers[1])
        saved = [SavedModel(config, t.model) for config, t in zip(configs, trainers, strict=True)]
        with pytest.raises(ValueError, match=f"has {labels} labels, expected 103"):
            start_from(saved[1], saved[0])

    def test_checkpoint_of_other_sizes_raises(self, dataset, tmp_path):
        _, trainer = make_trainer(dataset, (1, 2))
        config = ClassifierConfig(
            30, LABELS, bag_of_words=True, head=FixedFanInConfig(penultimate=24, fan_in=5)
        )
        other = Trainer(config.make(rngs=nnx.Rngs(0)), trainer.config)
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save_latest(trainer, {})
            checkpoints.save_best(trainer)
            for restore in (checkpoints.restore_latest, checkpoints.restore_best):
                with pytest.raises(ValueError, match=r"not the weights of such a model: .* expected"):
                    restore(other)


def test_saved_models_load_on_any_mesh(dataset, tmp_path):
    config, trainer = make_trainer(dataset, (2, 2))
    SavedModel(config, trainer.model).save(tmp_path)
    expected = evaluate(trainer.model, dataset)
    for mesh in (None, make_mesh(1, 8), make_mesh(2, 1)):
        loaded = SavedModel.load(tmp_path, mesh=mesh)
        assert (loaded.model.head.mesh is None) == (mesh is None)
        assert evaluate(loaded.model, dataset) == pytest.approx(expected)
        if mesh is None:
            assert_same_weights(loaded.model.head, trainer.model.head, exactly=True)


@pytest.mark.usefixtures("x64")
def test_estimator_on_mesh_matches_one_device(tmp_path):
    texts = ["a small cat", "a big cat", "a small dog", "a big dog"] * 5
    labels = [["cat", "small"], ["cat"], ["dog", "small"], ["dog"]] * 5
    one = XMCClassifier(epochs=3).fit(texts, labels)
    split = clone(XMCClassifier(epochs=3, mesh=make_mesh(2, 2))).fit(texts, labels)
    for a, b in zip(one.predict(texts, k=3), split.predict(texts, k=3), strict=True):
        if a.dtype == object:
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    split.save(tmp_path)
    loaded = XMCClassifier.load(tmp_path)
    assert loaded.mesh is None
    np.testing.assert_array_equal(loaded.predict(texts, k=2).labels, one.predict(texts, k=2).labels)
    again = XMCClassifier.load(tmp_path, mesh=make_mesh(1, 8))
    np.testing.assert_array_equal(again.predict(texts, k=2).labels, one.predict(texts, k=2).labels)


class TestMesh:
    def test_parse_mesh_and_make_mesh(self):
        assert parse_mesh("data:2,label:4") == {"data": 2, "label": 4}
        assert parse_mesh("label:8") == {"label": 8}
        assert dict(make_mesh(label=8).shape) == {"data": 1, "label": 8}

    @pytest.mark.parametrize(
        "text", ["", "8", "label", "label:0", "labels:2", "label:2,label:2", "data:2;label:2"]
    )
    def test_invalid_mesh_raises(self, text):
        with pytest.raises(ValueError, match="mesh must be like data:2,label:4"):
            parse_mesh(text)

    def test_mesh_of_too_many_devices_raises(self):
        with pytest.raises(ValueError, match=r"a mesh of data:3,label:4 needs 12 devices, got 8; .*=12"):
            make_mesh(3, 4)

    def test_place_batch_splits_rows_but_not_words(self):
        mesh = make_mesh(2, 2)
        bags = BagOfWords(*(np.zeros(4, np.int32) for _ in range(2)), np.ones(4, np.float32), 4)
        batch = Batch({"dense": np.ones((4, 3), np.float32), "bags": bags}, np.zeros((4, 1), np.int32))
        placed = place_batch(batch, mesh)
        assert {s.data.shape for s in placed.inputs["dense"].addressable_shards} == {(2, 3)}
        assert {s.data.shape for s in placed.inputs["bags"].words.addressable_shards} == {(4,)}
        with pytest.raises(
            ValueError, match="the batch size must be a multiple of the mesh's data axis, 2, got 3"
        ):
            place_batch(Batch(np.ones((3, 3)), np.zeros((3, 1), np.int32)), mesh)

    def test_padded_inputs_read_only_local_rows(self):
        class Features(np.ndarray):
            def __getitem__(self, rows):
                read.extend(rows)
                return np.asarray(self)[rows]

        read = []
        features = np.arange(40, dtype=np.float32).reshape(10, 4).view(Features)
        points = Dataset(features, scipy.sparse.csr_array(np.eye(10, 3, dtype=bool)))
        half = lambda size: np.arange(size) < size // 2  # noqa: E731
        (_, first), (_, last) = padded_inputs(points, 6, multiple_of=2, local_rows=half)
        assert read == [0, 1, 2, 6, 7]
        np.testing.assert_array_equal(first, np.asarray(features)[:6] * (np.arange(6) < 3)[:, None])
        assert last.shape == (4, 4)


@pytest.mark.parametrize("trainable", [False, True])
def test_pretrained_encoder_on_mesh_matches_one_device(tmp_path, trainable):
    words = ["a", "small", "big", "cat", "dog"]
    directory = add_tokenizer(make_directory(tmp_path / "encoder"), words)
    texts = ["a small cat", "a big cat", "a small dog", "a big dog"] * 4
    labels = [["cat", "small"], ["cat"], ["dog", "small"], ["dog"]] * 4
    sizes = {"fan_in": 4, "penultimate": 8, "embedding": 4, "epochs": 3, "batch_size": 4, "max_length": 12}
    encoder = {"encoder": directory, "encoder_trainable": trainable}
    with jax.numpy_dtype_promotion("standard"):
        one, split = (
            XMCClassifier(**encoder, **sizes, mesh=mesh).fit(texts, labels)
            for mesh in (None, make_mesh(2, 2))
        )
    for ours, theirs in zip(one.history_, split.history_, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    scores, sharded_scores = (classifier.predict(texts, k=3).scores for classifier in (one, split))
    np.testing.assert_allclose(scores, sharded_scores, rtol=1e-2, atol=1e-2)
