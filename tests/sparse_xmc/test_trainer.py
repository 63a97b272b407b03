"""Tests of training steps against Optax, of rewiring and of errors. See also test_fused_and_optax.py."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse
from flax import nnx
from small_models import make_batches, make_inputs, make_model, make_positives

from sparse_xmc import (
    Batch,
    Classifier,
    DenseFeatures,
    EmbeddingTable,
    FixedFanInLinear,
    RewireConfig,
    Trainer,
    TrainingConfig,
)
from sparse_xmc.data import Dataset
from sparse_xmc.data.batches import Batches
from sparse_xmc.encoders.table import TableParam
from sparse_xmc.heads import HEADS, DenseHead, FixedFanInHead, HeadSpec
from sparse_xmc.modules import in_evaluation, parameters_of

NEVER = RewireConfig(fraction=0)

pytestmark = pytest.mark.usefixtures("standard_promotion")


def new_trainer(kind="fixed_fan_in", *, seed=0, model=None, **options):
    model = model or make_model(kind, seed=seed, penultimate=24, fan_in=4)
    return Trainer(model, TrainingConfig(**{"batch_size": 8} | options), seed=seed)


def one_batch():
    (batch,) = make_batches(1)
    return batch


def indices_of(trainer):
    return np.asarray(trainer.model.head.output.indices[...])


def test_dense_products_use_matmul_precision_of_jax():
    # On a GPU the default rounds float32 to TF32; docs/gpu.md says why this is not changed.
    for precision, expected in (("default", "DEFAULT"), ("highest", "HIGHEST")):
        with jax.default_matmul_precision(precision):
            text = new_trainer().trace(one_batch())["step"].lower().as_text()
        products = [line for line in text.splitlines() if "dot_general" in line]
        assert products
        assert all(f"precision = [{expected}, {expected}]" in line for line in products)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_gradient_of_features_is_skipped_if_not_needed(optimizer):
    for penultimate, left_out in ((0, True), (24, False)):
        model = make_model(penultimate=penultimate, fan_in=4)
        trainer = new_trainer(model=model, output_optimizer=optimizer)
        text = trainer.trace(one_batch())["step"].lower().as_text()
        assert ("tensor<0x0xf32>" in text) == left_out


def test_steps_match_optax_adam_on_plain_jax_model():
    trainer = new_trainer(rewire=NEVER, epsilon=1e-7)
    head, columns = trainer.model.head, indices_of(trainer)
    params = {
        "w1": head.penultimate.kernel[...],
        "b1": head.penultimate.bias[...],
        "w2": head.output.kernel[...],
        "b2": head.output.bias[...],
    }
    params = jax.tree.map(jnp.copy, params)  # the trainer donates its arrays

    def loss_of(params, batch):
        hidden = jnp.maximum(batch.inputs @ params["w1"] + params["b1"][None], 0)
        logits = jnp.sum(hidden[:, columns] * params["w2"][None], axis=2) + params["b2"][None]
        is_positive = (batch.positives[:, :, None] == np.arange(30)).any(axis=1)
        return jnp.mean(jnp.square(jnp.maximum(0, 1 - jnp.where(is_positive, logits, -logits))))

    tx = optax.adam(3e-3, eps=1e-7)
    state = tx.init(params)
    for batch in make_batches(5):
        expected, grads = jax.value_and_grad(loss_of)(params, batch)
        updates, state = tx.update(grads, state)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(trainer.train_step(batch, 3e-3), expected, rtol=1e-5)
    np.testing.assert_allclose(trainer.model.head.output.kernel[...], params["w2"], rtol=2e-3, atol=2e-5)
    np.testing.assert_allclose(trainer.model.head.penultimate.kernel[...], params["w1"], rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("loss", ["squared_hinge", "bce"])
def test_loss_falls_on_small_problem(loss, kind):
    trainer, batch = new_trainer(kind, loss=loss, rewire_interval=20), one_batch()
    losses = [float(trainer.train_step(batch, 1e-2)) for _ in range(150)]
    assert losses[-1] < 0.15 * losses[0]


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_loss_falls_with_every_optimizer(kind, optimizer, moments):
    model = make_model(kind, penultimate=24, fan_in=4, output_bias=-1.0, output_bound=0.5)
    rate = {"adam": 1.0, "sgd": 3.0}[optimizer]
    trainer = new_trainer(
        model=model, output_optimizer=optimizer, output_lr_multiplier=rate, moment_dtype=moments, rewire=NEVER
    )
    batch = one_batch()
    losses = [float(trainer.train_step(batch, 1e-2)) for _ in range(150)]
    assert losses[-1] < 0.3 * losses[0]


def test_same_seed_gives_same_losses_bit_for_bit():
    def losses(seed):
        trainer = new_trainer(seed=seed, rewire_interval=2)
        return [float(trainer.train_step(batch, 1e-3)) for batch in make_batches(6)]

    assert losses(0) == losses(0)
    assert losses(0) != losses(1)


def test_compiled_steps_are_freed_with_their_trainer():
    def compiled_steps():
        gc.collect()
        modules = [module for e in jax.devices()[0].client.live_executables() for module in e.hlo_modules()]
        return [module.name for module in modules].count("jit_train")

    before = compiled_steps()
    for seed in range(5):
        trainer = new_trainer(seed=seed)
        trainer.train_step(one_batch(), 0.1)
    assert 1 <= compiled_steps() <= before + 2  # two compiled steps are kept for new trainers


def test_learning_rate_multiplier_applies_to_its_layer_only():
    def changes(**rates):
        trainer = new_trainer(rewire=NEVER, **rates)
        before = jax.tree.map(np.array, trainer.state["params"]["head"])
        trainer.train_step(one_batch(), 1e-3)
        after = trainer.state["params"]["head"]
        return {name: np.asarray(after[name]["kernel"][...]) - before[name]["kernel"][...] for name in after}

    plain, slow = changes(), changes(penultimate_lr_multiplier=0.25)
    np.testing.assert_allclose(slow["penultimate"], 0.25 * plain["penultimate"], rtol=1e-3, atol=1e-8)
    np.testing.assert_array_equal(slow["output"], plain["output"])


def test_sgd_uses_gradient_of_summed_loss():
    trainer, batch = new_trainer(rewire=NEVER, output_optimizer="sgd", output_lr_multiplier=0.5), one_batch()
    before = trainer.model

    def loss_of(kernel):
        model = nnx.clone(before)
        model.head.output.kernel.set_value(kernel)
        return model.loss(batch.inputs, batch.positives)

    kernel = jnp.copy(before.head.output.kernel[...])
    expected = kernel - 1e-2 * 0.5 * 8 * 30 * jax.grad(loss_of)(kernel)
    trainer.train_step(batch, 1e-2)
    np.testing.assert_allclose(trainer.model.head.output.kernel[...], expected, rtol=1e-5, atol=1e-7)
    assert set(trainer.state["moments"].mu) == {"penultimate.kernel", "penultimate.bias"}


def lr_multipliers_of(head, training):
    """Return the learning-rate multiplier of each parameter of a head, by path."""
    rates = {}
    for name in parameters_of(head):
        multiplier = (
            training.penultimate_lr_multiplier if "penultimate" in name else training.output_lr_multiplier
        )
        rates[name] = multiplier * (0.25 if name.startswith("heads.0") else 1.0)  # of the dense head
    return rates


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("fused", [True, False])
def test_first_step_of_every_head_matches_gradient_of_loss(kind, optimizer, fused):
    training = TrainingConfig(
        rewire=NEVER,
        output_optimizer=optimizer,
        output_lr_multiplier=0.5,
        penultimate_lr_multiplier=0.3,
        learning_rate=0.1,
        epsilon=1e-4,  # about as large as gradients, so that their scale matters
    )
    head = make_model(kind, penultimate=24, fan_in=4, output_bound=0.5).head
    model = Classifier(nnx.Linear(12, 12, rngs=nnx.Rngs(5)), head)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    batch = one_batch()

    def loss_of(params):
        return nnx.merge(graphdef, params, rest, copy=True).loss(batch.inputs, batch.positives)

    loss, gradients = jax.value_and_grad(loss_of)(params)
    expected = {}
    for path, g in nnx.to_flat_state(gradients):
        name, gradient = ".".join(map(str, path)), np.asarray(g[...])
        value = np.asarray(parameters_of(model)[name][...])
        if name.startswith("encoder"):
            expected[name] = value - 30 * gradient  # gradient of the sum over labels
            continue
        rate = 0.1 * lr_multipliers_of(head, training)[name.removeprefix("head.")]
        by_sgd = optimizer == "sgd" and "penultimate" not in name
        # In Adam's first step, the bias-corrected moments are the gradient and its square.
        expected[name] = value - rate * (
            8 * 30 * gradient if by_sgd else gradient / (np.abs(gradient) + 1e-4)
        )
    trainer = Trainer(model, training, encoder_optimizer=optax.sgd(1.0), fused=fused)
    np.testing.assert_allclose(trainer.train_step(batch, 0.1), loss, rtol=1e-5)
    for name, parameter in parameters_of(trainer.model).items():
        np.testing.assert_allclose(parameter[...], expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_bfloat16_output_layer_is_trained_reproducibly():
    def train(seed):
        model = make_model(penultimate=24, output_dtype="bfloat16", output_bias=-1.0, output_bound=0.5)
        trainer = new_trainer(
            model=model, seed=seed, output_optimizer="sgd", output_lr_multiplier=3.0, rewire_interval=50
        )
        batch = one_batch()
        losses = [float(trainer.train_step(batch, 1e-2)) for _ in range(150)]
        assert trainer.model.head.output.kernel[...].dtype == jnp.bfloat16
        return losses

    losses = train(0)
    assert losses[-1] < 0.3 * losses[0]
    assert train(0) == losses
    assert train(1) != losses  # other random bits for stochastic rounding


# ---- rewiring ----


@pytest.mark.parametrize(("interval", "expected"), [(3, [1, 4, 7]), (1, [1, 2, 3, 4, 5, 6, 7]), (100, [1])])
def test_connections_move_after_step_1_and_every_interval(interval, expected):
    trainer = new_trainer(rewire=RewireConfig(fraction=0.5), rewire_interval=interval)
    changed, before = [], indices_of(trainer)
    for step, batch in enumerate(make_batches(7), start=1):
        trainer.train_step(batch, 1e-3)
        after = indices_of(trainer)
        if np.any(after != before):
            changed.append(step)
        before = after
    assert changed == expected


def test_interval_of_minus_one_rewires_between_epochs():
    rng = np.random.default_rng(0)
    labels = scipy.sparse.csr_array(rng.random((40, 30)) < 0.1)
    batches = Batches(Dataset(rng.normal(size=(40, 12)).astype(np.float32), labels), 8)
    trainer = new_trainer(rewire=RewireConfig(fraction=0.5), rewire_interval=-1)
    start = indices_of(trainer)
    for _ in trainer.epoch(batches, 0, lambda step: 1e-3):
        np.testing.assert_array_equal(indices_of(trainer), start)
    seen = []
    for _ in trainer.epoch(batches, 1, lambda step: 1e-3):
        seen.append(indices_of(trainer))
    assert len(seen) == 5
    assert np.any(seen[0] != start)
    assert all(np.array_equal(seen[0], later) for later in seen)


@pytest.mark.parametrize("kind", ["fixed_fan_in", "unstructured"])
def test_rewiring_zeroes_weights_and_moments_of_moved_connections(kind):
    trainer = new_trainer(kind, rewire=RewireConfig(fraction=0.5), rewire_interval=1000)
    trainer.train_step(one_batch(), 1e-3)
    kernel, moments = np.asarray(trainer.model.head.output.kernel[...]), trainer.state["moments"]
    assert (kernel == 0).sum() == 30 * 4 // 2 - 1
    for moment in (moments.mu["output.kernel"], moments.nu["output.kernel"]):
        assert np.all(np.asarray(moment)[kernel == 0] == 0)
        assert np.any(np.asarray(moment)[kernel != 0] != 0)


@pytest.mark.usefixtures("x64")
def test_active_growth_selects_hidden_units_without_dropout():
    rewiring = RewireConfig(fraction=0.5, growth="active")
    model = make_model(penultimate=24, fan_in=4, dropout=0.9)
    trainer = new_trainer(model=model, rewire=rewiring, rewire_interval=2)
    start = indices_of(trainer)
    first, second, third = make_batches(3)
    trainer.train_step(first, 0.0)
    after, trained = indices_of(trainer), in_evaluation(trainer.model)
    hidden = np.asarray(trained.head.output_inputs(trained.encoder(first.inputs))[0])
    excess = hidden - hidden.mean(axis=0, keepdims=True)
    for label in range(30):
        if label not in first.positives:
            np.testing.assert_array_equal(after[label], start[label])
            continue
        point = np.flatnonzero((first.positives == label).any(axis=1))[0]
        others = np.setdiff1d(np.arange(24), start[label])
        best = others[np.argsort(-excess[point, others])][:2]
        np.testing.assert_array_equal(np.setdiff1d(after[label], start[label]), np.sort(best))
    trainer.train_step(second, 0.0)
    np.testing.assert_array_equal(indices_of(trainer), after)
    trainer.train_step(third, 0.0)
    assert np.any(indices_of(trainer) != after)


def test_rewiring_of_unstructured_layer_changes_both_coordinates():
    trainer = new_trainer("unstructured", rewire=RewireConfig(fraction=0.5), rewire_interval=2)
    first, second, third = make_batches(3)
    trainer.train_step(first, 1e-3)
    before = indices_of(trainer)
    trainer.train_step(second, 1e-3)
    np.testing.assert_array_equal(indices_of(trainer), before)
    trainer.train_step(third, 1e-3)
    assert np.all(np.any(indices_of(trainer) != before, axis=0))


def test_active_growth_of_unstructured_layer_raises():
    with pytest.raises(ValueError, match="unstructured layers grow at random, got growth='active'"):
        new_trainer("unstructured", rewire=RewireConfig(growth="active"))


def test_tail_of_head_and_tail_is_rewired():
    trainer = new_trainer("head_and_tail", rewire=RewireConfig(fraction=0.5), rewire_interval=1000)
    before = np.asarray(trainer.model.head.heads[1].output.indices[...])
    trainer.train_step(one_batch(), 1e-3)
    assert np.any(np.asarray(trainer.model.head.heads[1].output.indices[...]) != before)


# ---- custom encoders ----


class Encoder(nnx.Module):
    """Two linear layers with GELU and LayerNorm in between."""

    def __init__(self, rngs):
        self.first = nnx.Linear(12, 16, rngs=rngs)
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.second = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x):
        return self.second(self.norm(nnx.gelu(self.first(x))))


def with_encoder(encoder, features=10, kind="fixed_fan_in", penultimate=24):
    head = HEADS[kind](penultimate=penultimate, fan_in=4).make(HeadSpec(features, 30), nnx.Rngs(1))
    return Classifier(encoder, head)


def test_encoder_parameters_follow_custom_optimizer():
    model = with_encoder(Encoder(nnx.Rngs(0)))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    trainer = Trainer(
        nnx.clone(model), TrainingConfig(learning_rate=1e-2, rewire=NEVER), encoder_optimizer=tx
    )
    graphdef, params, rest = nnx.split(model.encoder, nnx.Param, ...)
    state = tx.init(params)
    for batch in make_batches(3):
        # The gradient of the sum over labels, with the head before its step.
        head = nnx.clone(trainer.model.head)

        def loss_of(params, batch=batch, head=head):
            features = nnx.merge(graphdef, params, rest, copy=True)(batch.inputs)
            return 30 * head.loss(features, batch.positives)

        updates, state = tx.update(jax.grad(loss_of)(params), state, params)
        params = jax.tree.map(lambda p, u: p + 0.5 * u, params, updates)  # half of the initial learning rate
        before = jax.tree.map(np.array, trainer.state["params"]["encoder"])
        trainer.train_step(batch, 5e-3)
        after = trainer.state["params"]["encoder"]
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), dict(after), dict(params)
        )
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.any(a != b), True), after, before)


def test_encoder_whose_output_starts_at_zero_is_trained():
    class Scale(nnx.Module):
        def __init__(self):
            self.scale = nnx.Param(jnp.zeros(()))

        def __call__(self, x):
            return self.scale[...] * x

    trainer = Trainer(
        with_encoder(Scale(), features=12, penultimate=0), TrainingConfig(learning_rate=1e-2, rewire=NEVER)
    )
    batch = one_batch()
    for _ in range(5):
        trainer.train_step(batch, 1e-2)
    assert float(trainer.model.encoder.scale[...]) != 0


def test_rng_state_and_batch_statistics_of_encoder_are_updated():
    class Normed(nnx.Module):
        def __init__(self, rngs):
            self.norm, self.dropout = nnx.BatchNorm(12, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(self.norm(x))

    trainer = Trainer(with_encoder(Normed(nnx.Rngs(0)), features=12), TrainingConfig(rewire=NEVER))
    first, second = make_batches(2)
    trainer.train_step(first, 1e-3)
    norm = trainer.model.encoder.norm
    np.testing.assert_allclose(norm.mean[...], 0.01 * first.inputs.mean(axis=0), rtol=1e-3, atol=1e-6)
    counts = [int(c) for c in jax.tree.leaves(nnx.state(trainer.model, nnx.RngCount))]
    trainer.train_step(second, 1e-3)
    assert counts != [int(c) for c in jax.tree.leaves(nnx.state(trainer.model, nnx.RngCount))]


def test_encoder_computing_in_bfloat16_is_trained():
    class Narrow(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.Linear(12, 10, dtype=jnp.bfloat16, rngs=rngs)

        def __call__(self, x):
            return self.layer(x)

    trainer = Trainer(with_encoder(Narrow(nnx.Rngs(0))), TrainingConfig(rewire=NEVER))
    before, batch = np.array(trainer.model.encoder.layer.kernel[...]), one_batch()
    losses = [float(trainer.train_step(batch, 1e-2)) for _ in range(100)]
    assert losses[-1] < 0.5 * losses[0]
    assert np.all(before != trainer.model.encoder.layer.kernel[...])


# ---- mistakes that would otherwise go unnoticed ----


def test_encoder_parameter_without_gradient_raises():
    class Unused(Encoder):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.extra = nnx.Linear(3, 3, rngs=rngs)

    class Stopped(Encoder):
        def __call__(self, x):
            return self.second(jax.lax.stop_gradient(self.norm(self.first(x))))

    class StoppedTable(Encoder):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.words = EmbeddingTable(5, 10, rngs=rngs)

        def __call__(self, x):
            rows = self.words.lookup(jnp.zeros(len(x), jnp.int32))
            return super().__call__(x) + jax.lax.stop_gradient(rows)

    encoders = ((Unused, "extra.bias"), (Stopped, "first.bias"), (StoppedTable, "words.embedding"))
    for encoder, name in encoders:
        trainer = Trainer(with_encoder(encoder(nnx.Rngs(0))), TrainingConfig())
        with pytest.raises(ValueError, match=f"do not depend on the encoder's parameter {name}"):
            trainer.train_step(one_batch(), 1e-3)


def test_unused_embedding_table_raises():
    class Unused(DenseFeatures):
        def __init__(self, rngs):
            super().__init__(12, rngs=rngs)
            self.words = EmbeddingTable(5, 3, rngs=rngs)

    trainer = Trainer(with_encoder(Unused(nnx.Rngs(0)), features=12), TrainingConfig())
    with pytest.raises(ValueError, match=r"does not use its table words\.embedding"):
        trainer.train_step(one_batch(), 1e-3)


def test_unknown_head_parameter_raises():
    class Forgetful(FixedFanInHead):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.temperature = nnx.Param(jnp.ones(()))

    template = make_model().head
    head = Forgetful(template.output, template.penultimate)
    with pytest.raises(ValueError, match="nothing would train the head's parameter temperature"):
        Trainer(Classifier(DenseFeatures(12, rngs=nnx.Rngs(0)), head), TrainingConfig())


def test_head_step_that_does_not_update_a_parameter_raises():
    class Lazy(FixedFanInHead):
        def step_fused(self, inputs, moments, training):
            return self.loss(inputs.x, inputs.positives), jnp.zeros_like(inputs.x), moments

    head = Lazy(FixedFanInLinear(12, 30, 3, rngs=nnx.Rngs(0)))
    trainer = Trainer(Classifier(DenseFeatures(12, rngs=nnx.Rngs(0)), head), TrainingConfig(), fused=True)
    with pytest.raises(ValueError, match=r"head's step leaves its parameter output\.\w+ as it is"):
        trainer.train_step(one_batch(), 1e-3)


def test_parameters_outside_encoder_and_head_or_in_both_raise():
    class Tempered(Classifier):
        def __init__(self, *parts):
            super().__init__(*parts)
            self.temperature = nnx.Param(jnp.ones(()))

    model = make_model()
    with pytest.raises(ValueError, match="temperature is neither in the encoder nor in the head"):
        Trainer(Tempered(model.encoder, model.head), TrainingConfig())

    class Tied(nnx.Module):
        def __init__(self, layer):
            self.layer = layer

        def __call__(self, x):
            return self.layer(x)

    layer = nnx.Linear(12, 30, rngs=nnx.Rngs(0))
    tied = Classifier(Tied(layer), DenseHead(layer))
    with pytest.raises(ValueError, match="is in the encoder and the head both"):
        Trainer(tied, TrainingConfig())


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("wrong", [30, 2**31 - 1, -2])
def test_positives_out_of_range_raise(convert, wrong):
    trainer, positives = new_trainer(), make_positives()
    positives[5, 1] = wrong
    with pytest.raises(ValueError, match=rf"labels in 0\.\.29, or -1; point 5 of the batch has {wrong}$"):
        trainer.train_step(Batch(make_inputs(), convert(positives)), 1e-3)
    assert trainer.step == 0


@pytest.mark.parametrize(
    ("rate", "error", "message"),
    [
        (None, TypeError, "learning_rate must be a number, got None"),
        ("0.1", TypeError, "learning_rate must be a number, got '0.1'"),
        (float("nan"), ValueError, "learning_rate must be finite in float32, got nan"),
        (jnp.float32(np.inf), ValueError, "learning_rate must be finite in float32, got inf"),
        (1e300, ValueError, "learning_rate must be finite in float32, got 1e+300"),
    ],
)
def test_invalid_learning_rate_raises(rate, error, message):
    trainer = new_trainer()
    with pytest.raises(error) as raised:
        trainer.train_step(one_batch(), rate)
    assert str(raised.value) == message
    assert trainer.step == 0


@pytest.mark.parametrize("positives", [None, np.zeros((8, 1)), np.zeros(8, np.int32), "abc"])
def test_positives_that_are_not_an_integer_matrix_raise(positives):
    with pytest.raises(TypeError, match=r"positives must be an array of integers \[B, P\], got dtype"):
        new_trainer().train_step(Batch(make_inputs(), positives), 1e-3)


@pytest.mark.parametrize("seed", [None, 1.5, True, -1, 2**32])
def test_invalid_seed_raises(seed):
    with pytest.raises(ValueError, match=f"seed must be a whole number between 0 and 4294967295, got {seed}"):
        Trainer(make_model("fixed_fan_in", fan_in=4), TrainingConfig(batch_size=8), seed=seed)


def test_repeated_positives_raise():
    positives = np.full((8, 3), -1, np.int32)
    positives[2] = [7, -1, 7]
    with pytest.raises(ValueError, match="positives must be distinct; point 2 of the batch has 7 twice"):
        new_trainer().train_step(Batch(make_inputs(), positives), 1e-3)


def test_tables_that_cannot_be_trained_by_rows_raise():
    class Loose(DenseFeatures):
        def __init__(self, rngs):
            super().__init__(12, rngs=rngs)
            self.table = TableParam(jnp.zeros((3, 2)))

    class Shared(DenseFeatures):
        def __init__(self, rngs):
            super().__init__(12, rngs=rngs)
            self.one, self.other = (EmbeddingTable(3, 2, rngs=rngs) for _ in range(2))
            self.other.embedding = self.one.embedding

    class Narrow(DenseFeatures):
        def __init__(self, rngs):
            super().__init__(12, rngs=rngs)
            self.words = EmbeddingTable(3, 2, param_dtype=jnp.bfloat16, rngs=rngs)

    for encoder, message in (
        (Loose, "table must be the table of one EmbeddingTable, but is that of 0"),
        (Shared, r"embedding must be the table of one EmbeddingTable, but is that of 2"),
        (Narrow, r"words\.embedding must be float32 to be trained by rows, got bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(with_encoder(encoder(nnx.Rngs(0)), features=12), TrainingConfig())


@pytest.mark.parametrize(
    "setting", [{"encoder_lr_multiplier": 2.0}, {"encoder_warmup": 3}, {"encoder_weight_decay": 0.1}]
)
def test_encoder_settings_with_custom_optimizer_raise(setting):
    with pytest.raises(ValueError, match=f"{next(iter(setting))} is for the default optimizer"):
        Trainer(make_model(), TrainingConfig(**setting), encoder_optimizer=optax.sgd(0.1))


def test_encoder_warmup_and_weight_decay():
    class Linear(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(12, 12, bias_init=nnx.initializers.constant(0.1), rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.layer(x)

    config = TrainingConfig(
        learning_rate=0.2,
        encoder_lr_multiplier=0.5,
        encoder_warmup=3,
        encoder_weight_decay=0.1,
        moment_dtype="bfloat16",
    )
    trainer = Trainer(with_encoder(Linear(), features=12), config, fused=False)
    names = ("layer.kernel", "layer.bias")
    params = {name: np.array(parameters_of(trainer.model.encoder)[name][...]) for name in names}
    batch = one_batch()
    for step, rate in enumerate((0.025, 0.05, 0.075, 0.1, 0.1)):
        before = params
        trainer.train_step(batch, 0.2)
        params = {name: np.array(parameters_of(trainer.model.encoder)[name][...]) for name in names}
        moved = {name: params[name] - before[name] for name in names}
        moved["layer.kernel"] += rate * 0.1 * before["layer.kernel"]
        if not step:  # the first step of Adam is as large as the learning rate
            for name in names:
                np.testing.assert_allclose(np.unique(np.abs(moved[name])), rate, rtol=1e-3)
        assert all(np.abs(moved[name]).max() < 2.5 * rate for name in names)
    (adam, *_) = trainer.state["optimizer"]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(adam.mu)} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(adam.nu)} == {"float32"}


def test_output_layer_with_other_compute_dtype_raises():
    head = FixedFanInHead(FixedFanInLinear(12, 30, 3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="dtype of its parameters, float32; leave out dtype=bfloat16"):
        Trainer(Classifier(DenseFeatures(12, rngs=nnx.Rngs(0)), head), TrainingConfig())


def test_calling_the_model_does_not_change_training():
    trainers = [new_trainer(model=make_model(dropout=0.5)) for _ in range(2)]
    for batch in make_batches(3):
        losses = [float(trainer.train_step(batch, 1e-2)) for trainer in trainers]
        assert losses[0] == losses[1]
        trainers[0].model.encoder(batch.inputs)  # in training mode: draws random numbers


def test_deleted_trainer_frees_its_arrays():
    trainer = new_trainer()
    trainer.train_step(one_batch(), 1e-2)
    arrays = [weakref.ref(a) for a in jax.tree.leaves(trainer.state)]
    del trainer
    assert not any(array() is not None for array in arrays)


def test_adam_with_bfloat16_output_layer_raises():
    with pytest.raises(ValueError, match="'adam' needs a float32 output layer, got bfloat16; use 'sgd'"):
        new_trainer(model=make_model(output_dtype="bfloat16"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "hinge"}, "loss must be one of squared_hinge, bce, got 'hinge'"),
        ({"output_optimizer": "lion"}, "output_optimizer must be one of adam, sgd, got 'lion'"),
        ({"moment_dtype": "int8"}, "moment_dtype must be one of float32, bfloat16, got 'int8'"),
        ({"schedule": "cosine"}, "schedule must be one of plateau, linear, got 'cosine'"),
        ({"rewire_interval": 0}, "rewire_interval must be at least 1, or -1, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0, got nan"),
        ({"learning_rate": 0}, "learning_rate must be above 0, got 0"),
        ({"epsilon": 0.0}, r"epsilon must be above 0, or None, got 0\.0"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"output_lr_multiplier": float("inf")}, "output_lr_multiplier must be at least 0, got inf"),
    ],
)
def test_invalid_settings_raise(options, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**options)
