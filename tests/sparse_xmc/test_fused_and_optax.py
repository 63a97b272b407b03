"""Tests on random networks that 20 fused steps and 20 steps by Optax agree up to rounding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import FEATURES, LABELS, head_config, make_batches, points_with_counts

from sparse_xmc import (
    BagOfWordsEncoder,
    Classifier,
    DenseFeatures,
    FixedFanInLinear,
    RewireConfig,
    Trainer,
    TrainingConfig,
)
from sparse_xmc.heads import HEADS, DenseHead, FixedFanInHead, HeadSpec, make_penultimate

STEPS = 20


@pytest.fixture(autouse=True, scope="module")
def standard_promotion():
    """Allow standard promotion: Optax's Adam raises a float to an integer power."""
    with jax.numpy_dtype_promotion("standard"):
        yield


class Deep(nnx.Module):
    """An encoder that applies a linear layer, GELU and LayerNorm to the output of another encoder."""

    def __init__(self, inner, width, use_bias, rngs):
        self.inner = inner
        self.layer = nnx.Linear(width, 9, use_bias=use_bias, rngs=rngs)
        self.norm = nnx.LayerNorm(9, rngs=rngs)

    def __call__(self, inputs):
        return self.norm(nnx.gelu(self.layer(self.inner(inputs))))


@dataclasses.dataclass(frozen=True)
class Network:
    """The settings of a random network."""

    bag_of_words: bool
    deep: bool
    dropout: float
    kind: str  # of head; "no bias" and "dense no bias" are layers without a bias
    penultimate: int
    bfloat16: bool  # in the output layer
    direct_inputs: int  # number of direct inputs of each label

    def make(self):
        rngs, width = nnx.Rngs(0), FEATURES
        if self.bag_of_words:
            width = 7
            encoder = BagOfWordsEncoder(
                FEATURES,
                width,
                self.dropout,
                scale=1.5,
                return_direct_inputs=self.reads_direct_inputs,
                rngs=rngs,
            )
        else:
            encoder = DenseFeatures(width, self.dropout, rngs=rngs)
        if self.deep:
            encoder, width = Deep(encoder, width, not self.bag_of_words, rngs), 9
        return Classifier(encoder, self._head(width, rngs))

    @property
    def reads_direct_inputs(self):
        return self.bag_of_words and self.direct_inputs > 0

    def _head(self, width, rngs):
        if self.kind == "no bias":
            penultimate, init = make_penultimate(width, self.penultimate, rngs), nnx.initializers.normal(0.3)
            layer = FixedFanInLinear(
                self.penultimate or width, LABELS, 4, use_bias=False, kernel_init=init, rngs=rngs
            )
            return FixedFanInHead(layer, penultimate)
        if self.kind == "dense no bias":
            return DenseHead(nnx.Linear(width, LABELS, use_bias=False, rngs=rngs))
        options = {"output_dtype": "bfloat16"} if self.bfloat16 else {}
        options |= {"direct_inputs": self.direct_inputs}
        config = head_config(
            self.kind, penultimate=self.penultimate, fan_in=4, output_bias=-0.5, output_bound=0.5, **options
        )
        counts = np.random.default_rng(1).permutation(LABELS)
        direct = FEATURES if self.reads_direct_inputs else 0
        train = points_with_counts(counts, direct or width, sparse=self.reads_direct_inputs)
        return config.make(HeadSpec(width, LABELS, direct, train), rngs)


KINDS = [*HEADS, "no bias", "dense no bias"]


@st.composite
def problems(draw, kind, optimizer):
    """Draw a network with a kind of head, and the settings of its training."""
    bfloat16 = optimizer == "sgd" and kind in ("fixed_fan_in", "head_and_tail") and draw(st.booleans())
    bag_of_words, deep = draw(st.booleans()), draw(st.booleans())
    penultimate = draw(st.sampled_from([0, 24])) or (6 if kind == "bottleneck" else 0)
    # Direct inputs are words of the outermost encoder, or dense features if there is a penultimate layer.
    direct = 2 if kind in ("fixed_fan_in", "head_and_tail") and draw(st.booleans()) else 0
    if (bag_of_words and deep) or (not bag_of_words and not penultimate):
        direct = 0
    dropout = draw(st.sampled_from([0.0, 0.2]))
    network = Network(bag_of_words, deep, dropout, kind, penultimate, bfloat16, direct)
    growth = draw(st.sampled_from(["random", "active"])) if kind != "unstructured" else "random"
    growth = "active" if direct else growth
    training = TrainingConfig(
        batch_size=8,
        loss=draw(st.sampled_from(["squared_hinge", "bce"])),
        learning_rate=1e-2,
        output_optimizer=optimizer,
        output_lr_multiplier=0.5,
        penultimate_lr_multiplier=0.5,
        embedding_lr_multiplier=2.0,
        moment_dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        epsilon=1e-5,  # far above the noise of gradients that cancel
        rewire=RewireConfig(fraction=draw(st.sampled_from([0.0, 0.3])), growth=growth),
    )
    return network, training


def make_trainers(network, training):
    """Return a trainer for each kind of step, and the initial state of both."""
    trainers = {fused: Trainer(network.make(), training, seed=3, fused=fused) for fused in (True, False)}
    states = [jax.tree.map(lambda a: (a.shape, a.dtype), trainer.state) for trainer in trainers.values()]
    assert states[0] == states[1]
    return trainers, jax.tree.map(jnp.copy, trainers[True].state)


def train(trainers, start, network, fused):
    """Train with fused steps where `fused(step)` is true; return the losses and the final state."""
    state, losses = jax.tree.map(jnp.copy, start), []
    for step, batch in enumerate(make_batches(STEPS, bag_of_words=network.bag_of_words)):
        trainer = trainers[fused(step)]
        trainer.state, trainer.step = state, step
        losses.append(float(trainer.train_step(batch, 1e-2)))
        state = trainer.state
    return losses, state


def arrays(tree):
    """Return the arrays of a tree by path, without random keys."""
    return {
        jax.tree_util.keystr(path): np.asarray(leaf, np.float32)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@settings(max_examples=2)
@given(data=st.data())
def test_fused_steps_match_optax_steps(kind, optimizer, data):
    network, training = data.draw(problems(kind, optimizer))
    trainers, start = make_trainers(network, training)
    losses, state = train(trainers, start, network, lambda step: True)
    # With the same random bits, a small difference can change the result of stochastic rounding.
    tolerance = {"float32": 2e-3, "bfloat16": 2e-2}["bfloat16" if network.bfloat16 else training.moment_dtype]
    for fused in (lambda step: False, lambda step: step % 10 < 5):
        other_losses, other = train(trainers, start, network, fused)
        np.testing.assert_allclose(other_losses, losses, rtol=tolerance)
        expected = arrays({**state, "other": ()})
        for path, array in arrays({**other, "other": ()}).items():
            atol = tolerance * (1 + np.abs(array).max()) / 2
            np.testing.assert_allclose(array, expected[path], rtol=tolerance, atol=atol, err_msg=path)
        np.testing.assert_equal(arrays(other["other"]), arrays(state["other"]))


def test_tolerance_detects_other_learning_rates():
    # After 20 steps, a 10% lower learning rate of one layer changes parameters by more than the tolerance.
    network = Network(False, True, 0.0, "fixed_fan_in", 24, False, 0)
    training = TrainingConfig(batch_size=8, epsilon=1e-5, learning_rate=1e-2)
    _, state = train(*make_trainers(network, training), network, lambda step: True)
    expected = arrays(state["params"])
    for name in ("output_lr_multiplier", "penultimate_lr_multiplier"):
        trainers, start = make_trainers(network, dataclasses.replace(training, **{name: 0.9}))
        actual = arrays(train(trainers, start, network, lambda step: False)[1]["params"])
        assert max(np.abs(actual[path] - expected[path]).max() for path in expected) > 5 * 2e-3
