"""Small classifiers for the tests, one for each kind of head, and batches for them."""

import dataclasses

import jax
import numpy as np
import scipy.sparse
from flax import nnx

from experiments import unstructured as unstructured  # registers a head that is not in the package
from sparse_xmc import BagOfWords, Batch, ClassifierConfig, EncoderConfig
from sparse_xmc.data import Dataset
from sparse_xmc.heads import HEADS

FEATURES, LABELS = 12, 30


def head_config(kind, **sizes):
    """Return the configuration of a small head; sizes that this kind of head lacks are ignored."""
    names = {field.name for field in dataclasses.fields(HEADS[kind])}
    sizes = {"penultimate": 8, "fan_in": 3} | sizes
    return HEADS[kind](**{name: size for name, size in sizes.items() if name in names})


def config_of(kind="fixed_fan_in", *, bag_of_words=False, dropout=0.0, embedding=6, labels=LABELS, **sizes):
    """Return the configuration of a small classifier."""
    head = head_config(kind, **sizes)
    return ClassifierConfig(FEATURES, labels, bag_of_words, EncoderConfig(embedding, dropout), head)


def make_model(kind="fixed_fan_in", *, seed=0, **options):
    """Return a small classifier with initial weights."""
    counts = np.random.default_rng(0).permutation(options.get("labels", LABELS))
    config = config_of(kind, **options)
    train = points_with_counts(counts, FEATURES, sparse=config.bag_of_words)
    return config.make(train=train, rngs=nnx.Rngs(seed))


def points_with_counts(counts, features, *, sparse=False):
    """Return points with random features, of which `counts[l]` have label l."""
    labels = np.arange(max(1, counts.max(initial=0)))[:, None] < counts
    values = np.random.default_rng(2).normal(size=(len(labels), features)).astype(np.float32)
    values = scipy.sparse.csr_array(np.maximum(values, 0)) if sparse else values
    return Dataset(values, scipy.sparse.csr_array(labels))


def make_random_model(kind="fixed_fan_in", **options):
    """Return a small classifier in evaluation mode, all of whose parameters are random."""
    model = make_model(kind, **options)
    model.eval()
    for i, (_, node) in enumerate(nnx.iter_graph(model)):
        if isinstance(node, nnx.Param):
            node.set_value(jax.random.normal(jax.random.key(i), node.shape).astype(node.dtype))
    return model


def make_inputs(batch_size=8, *, bag_of_words=False, seed=0):
    """Return inputs of a batch. Bags of words include empty points, repeated words and padding."""
    rng = np.random.default_rng(seed)
    if not bag_of_words:
        return rng.normal(size=(batch_size, FEATURES)).astype(np.float32)
    rows = np.sort(rng.integers(0, batch_size, 3 * batch_size)).astype(np.int32)
    return BagOfWords(
        rows=np.pad(rows, (0, 5), constant_values=batch_size),
        words=np.pad(rng.integers(0, FEATURES, len(rows)), (0, 5)).astype(np.int32),
        weights=np.pad(rng.random(len(rows), np.float32), (0, 5), constant_values=7),
        num_examples=batch_size,
    )


def make_positives(batch_size=8, *, labels=LABELS, width=3, seed=0):
    """Return positives: distinct labels of each point, some of them replaced by padding."""
    rng = np.random.default_rng(seed)
    positives = np.stack([rng.choice(labels, width, replace=False) for _ in range(batch_size)])
    positives[rng.random(positives.shape) < 0.2] = -1
    return positives.astype(np.int32)


def make_batches(count, batch_size=8, *, bag_of_words=False, seed=0):
    """Yield batches of different points."""
    for i in range(count):
        inputs = make_inputs(batch_size, bag_of_words=bag_of_words, seed=seed + i)
        yield Batch(inputs, make_positives(batch_size, seed=seed + i))
