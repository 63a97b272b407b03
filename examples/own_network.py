"""Train your own network with a fixed fan-in head, on synthetic points: `python examples/own_network.py`.

Any `nnx.Module` from inputs to features can be the encoder. Optax updates it, and the head updates its own
weights in place, without storing the logits of all labels or the gradient of its kernel.
"""

import numpy as np
import optax
import scipy.sparse
from flax import nnx

from sparse_xmc import Classifier, RewireConfig, Trainer, TrainingConfig, fit
from sparse_xmc.data import Dataset
from sparse_xmc.evaluation import evaluate
from sparse_xmc.heads import FixedFanInConfig, HeadSpec
from sparse_xmc.saving import load_weights, save_weights

FEATURES, LABELS = 128, 1000


class Network(nnx.Module):
    """A residual network from [B, FEATURES] to [B, width], to be replaced by your own."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.first = nnx.Linear(FEATURES, width, rngs=rngs)
        self.block = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x):
        """Return the features of a batch."""
        x = nnx.gelu(self.first(x))
        return x + nnx.gelu(self.block(x))


def make_points(count: int, seed: int) -> Dataset:
    """Return points with three labels each; features are the sum of directions of the labels, and noise."""
    directions = np.random.default_rng(0).normal(size=(LABELS, FEATURES))
    rng = np.random.default_rng(seed)
    labels = np.stack([rng.choice(LABELS, 3, replace=False) for _ in range(count)])
    features = directions[labels].sum(axis=1) + 0.3 * rng.normal(size=(count, FEATURES))
    rows = np.repeat(np.arange(count), 3)
    matrix = scipy.sparse.csr_array((np.ones(3 * count, bool), (rows, labels.ravel())), (count, LABELS))
    return Dataset(features.astype(np.float32), matrix)


def make_classifier(seed: int) -> Classifier:
    """Return a classifier: the network, 2,048 hidden units, and labels that read 32 of them each."""
    rngs = nnx.Rngs(seed)
    head = FixedFanInConfig(penultimate=2048, fan_in=32, output_bias=-1, output_bound=0.05)
    return Classifier(Network(256, rngs), head.make(HeadSpec(256, LABELS), rngs))


def main(points: int = 20_000, epochs: int = 10, path: str = "runs/own_network") -> dict[str, float]:
    """Train, save and load a classifier, and return its metrics."""
    config = TrainingConfig(
        epochs=epochs,
        batch_size=64,
        learning_rate=2e-3,  # of the head; the optimizer of the network has its own
        schedule="linear",
        rewire=RewireConfig(fraction=0.1),
        rewire_interval=300,
    )
    network = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    trainer = Trainer(make_classifier(seed=0), config, encoder_optimizer=network)
    for record in fit(trainer, make_points(points, seed=1)):
        print(f"epoch {record['epoch']}: loss {record['loss']:.6f}, {record['seconds']:.1f} s")
    save_weights(path, trainer.model)  # including the connections of the labels
    classifier = load_weights(path, make_classifier(seed=1))
    return evaluate(classifier, make_points(1000, seed=2))


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name:10s}{100 * value:6.2f}")
