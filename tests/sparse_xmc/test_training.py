"""The training loop on small problems, step by step against plain Optax, and the rules of the paper."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse
from flax import nnx

from sparse_xmc.data import Dataset
from sparse_xmc.data.batches import Batch, Batches
from sparse_xmc.layers import BagOfWords
from sparse_xmc.models import Classifier, ClassifierConfig
from sparse_xmc.rewire import RewireConfig
from sparse_xmc.steps import (
    init_in_place,
    init_optax,
    rewire_in_place,
    rewire_optax,
    step_in_place,
    step_optax,
)
from sparse_xmc.training import Plateau, Trainer, TrainingConfig

CONFIG = ClassifierConfig(num_features=12, num_labels=30, penultimate=24, fan_in=4, dropout=0.0)


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax's Adam raises a float to an integer power, which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def random_batches(count, batch_size=8, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        positives = np.stack([rng.choice(30, 3, replace=False) for _ in range(batch_size)]).astype(np.int32)
        yield Batch(rng.normal(size=(batch_size, 12)).astype(np.float32), positives)


def new_trainer(seed=0, **options):
    model = Classifier(CONFIG, rngs=nnx.Rngs(seed))
    return Trainer(model, TrainingConfig(batch_size=8, **options), seed=seed)


def indices_of(trainer):
    return np.asarray(trainer.model.output.indices[...])


def test_steps_are_those_of_optax_adam_on_dense_arithmetic():
    trainer = new_trainer(rewire=None, epsilon=1e-7)
    model = trainer.model
    columns = indices_of(trainer)
    params = {
        "w1": model.penultimate.kernel[...],
        "b1": model.penultimate.bias[...],
        "w2": model.output.kernel[...],
        "b2": model.output.bias[...],
    }
    params = jax.tree.map(jnp.copy, params)  # the trainer donates its own

    def loss_of(params, batch):
        hidden = jnp.maximum(batch.inputs @ params["w1"] + params["b1"][None], 0)
        logits = jnp.sum(hidden[:, columns] * params["w2"][None], axis=2) + params["b2"][None]
        signs = np.full(logits.shape, -1.0, np.float32)
        np.put_along_axis(signs, batch.positives, 1.0, axis=1)
        return jnp.mean(jnp.square(jnp.maximum(0, 1 - signs * logits)))

    tx = optax.adam(3e-3, eps=1e-7)
    state = tx.init(params)
    for batch in random_batches(5):
        expected, grads = jax.value_and_grad(loss_of)(params, batch)
        updates, state = tx.update(grads, state)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(trainer.train_step(batch, 3e-3), expected, rtol=1e-5)
    np.testing.assert_allclose(trainer.model.output.kernel[...], params["w2"], rtol=2e-3, atol=2e-5)
    np.testing.assert_allclose(trainer.model.penultimate.kernel[...], params["w1"], rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize(("interval", "expected"), [(3, [1, 4, 7]), (1, [1, 2, 3, 4, 5, 6, 7]), (100, [1])])
def test_connections_move_after_steps_1_and_then_every_interval(interval, expected):
    trainer = new_trainer(rewire=RewireConfig(fraction=0.5), rewire_interval=interval)
    changed, before = [], indices_of(trainer)
    for step, batch in enumerate(random_batches(7), start=1):
        trainer.train_step(batch, 1e-3)
        after = indices_of(trainer)
        if np.any(after != before):
            changed.append(step)
        before = after
    assert changed == expected


def test_an_interval_of_minus_one_rewires_once_between_epochs():
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


def test_rewiring_zeroes_weights_and_moments_of_what_moved():
    trainer = new_trainer(rewire=RewireConfig(fraction=0.5), rewire_interval=1000)
    (batch,) = random_batches(1)
    trainer.train_step(batch, 1e-3)
    kernel = np.asarray(trainer.model.output.kernel[...])
    moments = [np.asarray(m) for m in trainer.state["moments"]["output"][1:3]]
    assert (kernel == 0).sum() == 30 * 4 // 2 - 1
    for moment in moments:
        assert np.all(moment[kernel == 0] == 0)
        assert np.any(moment[kernel != 0] != 0)


def test_labels_move_towards_the_hidden_units_of_their_points_which_dropout_does_not_hide():
    config = dataclasses.replace(CONFIG, dropout=0.9)
    rewiring = RewireConfig(fraction=0.5, growth="active")
    training = TrainingConfig(batch_size=8, rewire=rewiring, rewire_interval=2)
    trainer = Trainer(Classifier(config, rngs=nnx.Rngs(0)), training, seed=0)
    start = indices_of(trainer)
    first, second, third = random_batches(3)
    trainer.train_step(first, 0.0)
    after = indices_of(trainer)
    hidden = np.asarray(nnx.view(trainer.model, deterministic=True).features(first.inputs))
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


def test_unstructured_layers_do_not_grow_towards_active_inputs():
    model = Classifier(dataclasses.replace(CONFIG, output_layer="unstructured"), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="unstructured layers grow at random, got growth='active'"):
        Trainer(model, TrainingConfig(rewire=RewireConfig(growth="active")), seed=0)


def test_unstructured_layers_are_rewired_in_both_coordinates():
    config = ClassifierConfig(12, 30, penultimate=24, fan_in=4, dropout=0.0, output_layer="unstructured")
    rewiring = RewireConfig(fraction=0.5)
    trainer = Trainer(
        Classifier(config, rngs=nnx.Rngs(0)), TrainingConfig(rewire=rewiring, rewire_interval=2), seed=0
    )
    first, second, third = random_batches(3)
    trainer.train_step(first, 1e-3)
    kernel, before = np.asarray(trainer.model.output.kernel[...]), indices_of(trainer)
    assert (kernel == 0).sum() == 30 * 4 // 2 - 1
    for moment in trainer.state["optimizer"][0][1:]:
        assert np.all(np.asarray(moment["output"]["kernel"][...])[kernel == 0] == 0)
    trainer.train_step(second, 1e-3)
    np.testing.assert_array_equal(indices_of(trainer), before)
    trainer.train_step(third, 1e-3)
    assert np.all(np.any(indices_of(trainer) != before, axis=0))


def test_dense_output_layers_train_without_rewiring():
    model = Classifier(
        ClassifierConfig(num_features=12, num_labels=30, penultimate=6, output_layer="dense"),
        rngs=nnx.Rngs(0),
    )
    trainer = Trainer(model, TrainingConfig(batch_size=8, rewire_interval=1), seed=0)
    (batch,) = random_batches(1)
    losses = [float(trainer.train_step(batch, 1e-2)) for _ in range(30)]
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("output_layer", ["fixed_fan_in", "unstructured"])
@pytest.mark.parametrize("loss", ["squared_hinge", "bce"])
def test_a_small_problem_is_learnt(loss, output_layer):
    model = Classifier(dataclasses.replace(CONFIG, output_layer=output_layer), rngs=nnx.Rngs(0))
    trainer = Trainer(model, TrainingConfig(batch_size=8, loss=loss, rewire_interval=20), seed=0)
    (batch,) = random_batches(1)
    losses = [float(trainer.train_step(batch, 1e-2)) for _ in range(150)]
    assert losses[-1] < 0.1 * losses[0]


def test_the_same_seed_gives_the_same_losses_bit_for_bit():
    def losses(seed):
        trainer = new_trainer(seed=seed, rewire_interval=2)
        return [float(trainer.train_step(batch, 1e-3)) for batch in random_batches(6)]

    assert losses(0) == losses(0)
    assert losses(0) != losses(1)


def test_plateau_halves_after_two_epochs_without_a_thousandth():
    plateau = Plateau(1e-3)
    rates = []
    for metric in [0.1, 0.2, 0.2005, 0.2009, 0.3, 0.3, 0.3]:
        plateau.update(metric)
        rates.append(plateau.learning_rate)
    assert rates == [1e-3, 1e-3, 1e-3, 5e-4, 5e-4, 5e-4, 2.5e-4]


def test_plateau_stays_above_its_floor():
    plateau = Plateau(1e-3)
    for _ in range(30):
        plateau.update(0.5)
    assert plateau.learning_rate == 1e-4


def test_plateau_stops_after_four_epochs_without_an_improvement():
    plateau = Plateau(1e-3)
    for metric in [0.5, 0.50004, 0.49, 0.5]:  # 4e-5 is not enough
        plateau.update(metric)
        assert not plateau.should_stop
    plateau.update(0.5)
    assert plateau.should_stop
    plateau.update(0.6)
    assert not plateau.should_stop
    assert plateau.best == 0.6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "hinge"}, "loss must be one of squared_hinge, bce, got 'hinge'"),
        ({"output_optimizer": "lion"}, "output_optimizer must be one of adam, sgd, got 'lion'"),
        ({"moments": "int8"}, "moments must be one of float32, bfloat16, factored, got 'int8'"),
        ({"schedule": "cosine"}, "schedule must be one of plateau, linear, got 'cosine'"),
        ({"rewire_interval": 0}, "rewire_interval must be positive, or -1 for once an epoch, got 0"),
    ],
)
def test_bad_choices_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**options)


def test_layers_learn_at_their_own_rates():
    def changes(**rates):
        trainer = new_trainer(rewire=None, **rates)
        before = jax.tree.map(np.array, trainer.state["params"])
        (batch,) = random_batches(1)
        trainer.train_step(batch, 1e-3)
        after = trainer.state["params"]
        return {name: np.asarray(after[name]["kernel"][...]) - before[name]["kernel"][...] for name in after}

    plain, slow = changes(), changes(penultimate_rate=0.25)
    np.testing.assert_allclose(slow["penultimate"], 0.25 * plain["penultimate"], rtol=1e-3, atol=1e-8)
    np.testing.assert_array_equal(slow["output"], plain["output"])


def test_sgd_follows_the_sum_of_the_losses():
    trainer = new_trainer(rewire=None, output_optimizer="sgd", output_rate=0.5)
    before = trainer.model
    (batch,) = random_batches(1)

    def loss_of(kernel):
        model = nnx.clone(before)
        model.output.kernel.set_value(kernel)
        return model.loss(batch.inputs, batch.positives)

    kernel = jnp.copy(before.output.kernel[...])
    expected = kernel - 1e-2 * 0.5 * 8 * 30 * jax.grad(loss_of)(kernel)
    trainer.train_step(batch, 1e-2)
    np.testing.assert_allclose(trainer.model.output.kernel[...], expected, rtol=1e-5, atol=1e-7)
    assert "output" not in trainer.state["moments"]


@pytest.mark.parametrize("layer", ["fixed_fan_in", "dense"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("moments", ["float32", "bfloat16", "factored"])
def test_every_choice_of_optimizer_learns(layer, optimizer, moments):
    config = dataclasses.replace(CONFIG, output_layer=layer, output_bias=-1.0, output_bound=0.5)
    rates = {"adam": 1.0, "sgd": 3.0}
    training = TrainingConfig(
        batch_size=8, output_optimizer=optimizer, output_rate=rates[optimizer], moments=moments, rewire=None
    )
    trainer = Trainer(Classifier(config, rngs=nnx.Rngs(0)), training, seed=0)
    (batch,) = random_batches(1)
    losses = [float(trainer.train_step(batch, 1e-2)) for _ in range(150)]
    assert losses[-1] < 0.3 * losses[0]


def test_a_bfloat16_output_layer_learns_and_repeats():
    def train(seed):
        config = dataclasses.replace(CONFIG, output_dtype="bfloat16", output_bias=-1.0, output_bound=0.5)
        training = TrainingConfig(batch_size=8, output_optimizer="sgd", output_rate=3.0, rewire_interval=50)
        trainer = Trainer(Classifier(config, rngs=nnx.Rngs(0)), training, seed=seed)
        (batch,) = random_batches(1)
        losses = [float(trainer.train_step(batch, 1e-2)) for _ in range(150)]
        assert trainer.model.output.kernel[...].dtype == jnp.bfloat16
        return losses

    losses = train(0)
    assert losses[-1] < 0.3 * losses[0]
    assert train(0) == losses
    assert train(1) != losses  # other bits for the rounding


@pytest.mark.parametrize("output_layer", ["fixed_fan_in", "dense"])
def test_embeddings_are_trained_by_adagrad_row_by_row(output_layer):
    config = ClassifierConfig(
        12, 30, bag_of_words=True, embedding=6, fan_in=3, output_layer=output_layer, output_bound=0.5
    )
    training = TrainingConfig(batch_size=4, rewire=None, embedding_rate=2.0)
    trainer = Trainer(Classifier(config, rngs=nnx.Rngs(0)), training, seed=0)
    # Words repeat within and between examples; the last entries are padding; 0 and 11 are never used.
    rows = np.asarray([0, 0, 0, 1, 1, 2, 3, 3, 4, 4], np.int32)
    squares = np.zeros(12)
    for words in ([3, 5, 3, 5, 7, 7, 1, 2, 0, 0], [3, 4, 6, 8, 9, 10, 10, 3, 0, 0]):
        bags = BagOfWords(rows, np.asarray(words, np.int32), np.linspace(1, 2, 10, dtype=np.float32), 4)
        bags.weights[8:] = 0
        batch = Batch(bags, np.asarray([[0, 3], [5, 6], [7, -1], [8, 29]], np.int32))
        graphdef, params, other = nnx.split(trainer.model, nnx.Param, ...)
        before = np.asarray(params["embedding"]["embedding"][...])

        def loss_of(params, batch=batch, graphdef=graphdef, other=other):
            return nnx.merge(graphdef, params, other, copy=True).loss(batch.inputs, batch.positives)

        gradient = np.asarray(jax.grad(loss_of)(params)["embedding"]["embedding"][...], np.float64)
        trainer.train_step(batch, 0.1)
        squares += np.square(gradient).mean(axis=1)
        used = squares > 0
        expected = before.copy()
        expected[used] -= 0.2 * gradient[used] / np.sqrt(squares[used])[:, None]
        after = np.asarray(trainer.model.embedding.embedding[...])
        np.testing.assert_allclose(after, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(after[[0, 11]], before[[0, 11]])
        np.testing.assert_allclose(trainer.state["squares"], squares, rtol=1e-5)
        assert np.abs(after - before).max() > 0.1


@pytest.mark.parametrize("bag_of_words", [False, True])
@pytest.mark.parametrize(("penultimate", "growth"), [(0, "random"), (160, "random"), (160, "active")])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("moments", ["float32", "bfloat16", "factored"])
def test_training_in_place_is_training_by_optax(bag_of_words, penultimate, growth, optimizer, moments):
    config = ClassifierConfig(
        num_features=12,
        num_labels=30,
        bag_of_words=bag_of_words,
        embedding=130,  # large enough for Optax to factor the penultimate layer
        penultimate=penultimate,
        fan_in=4,
        dropout=0.1,
        output_bound=0.5,
    )
    training = TrainingConfig(
        batch_size=8,
        output_optimizer=optimizer,
        moments=moments,
        embedding_rate=2.0,
        penultimate_rate=0.5,
        rewire=RewireConfig(growth=growth),
    )
    graphdef, *state = nnx.split(Classifier(config, rngs=nnx.Rngs(0)), nnx.Param, ...)
    states = [init(training, *jax.tree.map(jnp.copy, state)) for init in (init_in_place, init_optax)]
    steps = [jax.jit(functools.partial(step, graphdef, training, 0)) for step in (step_in_place, step_optax)]
    rewirings = [jax.jit(functools.partial(f, graphdef, training)) for f in (rewire_in_place, rewire_optax)]
    tolerance = 1e-4 if moments == "float32" else 5e-3  # Optax multiplies bfloat16 moments in bfloat16
    for i, batch in enumerate(random_batches(5)):
        if bag_of_words:
            rows, words = np.divmod(np.arange(16, dtype=np.int32), 2)
            words = ((5 * i + words + rows) % 12).astype(np.int32)
            batch.inputs = BagOfWords(rows, words, np.ones(16, np.float32), num_examples=8)
        results = [f(s, batch, np.float32(1e-2), np.int32(i)) for f, s in zip(steps, states, strict=True)]
        states = [state for state, _ in results]
        np.testing.assert_allclose(results[0][1], results[1][1], rtol=tolerance)
        if i == 2:
            states = [f(s, batch, jax.random.key(7)) for f, s in zip(rewirings, states, strict=True)]
    for a, b in zip(*(jax.tree.leaves(s["params"]) for s in states), strict=True):
        np.testing.assert_allclose(a, b, rtol=10 * tolerance, atol=2 * tolerance)
    narrow = [a for a in jax.tree.leaves(states[1]["optimizer"]) if a.dtype == jnp.bfloat16]
    # Of the penultimate layer alone; factored moments are its kernel's, and its bias has others.
    assert len(narrow) == (0 if not penultimate else {"float32": 0, "bfloat16": 2, "factored": 1}[moments])
