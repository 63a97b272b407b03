"""The README's examples, run at sizes that a test can afford."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import sparse_xmc

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SIZES = {"670_091": "200", "32_768": "64", "fan_in=32": "fan_in=8"}


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax's Adam raises a float to an integer power, which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def example(heading):
    """The first block of Python under a heading, with smaller sizes."""
    code = re.search(rf"^## {heading}$.*?^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL).group(1)
    for size, smaller in SIZES.items():
        code = code.replace(size, smaller)
    return code


def test_texts_in_labels_out():
    texts = ["a small cat", "a big cat", "a small dog", "a big dog"] * 5
    labels = [["cat", "small"], ["cat", "big"], ["dog", "small"], ["dog", "big"]] * 4 + [["other"]] * 4
    names = {"texts": texts, "labels": labels, "new_texts": ["the small dog"]}
    exec(example("Texts in, labels out"), names)
    assert set(names["names"][0][:2]) == {"dog", "small"}
    assert names["scores"].shape == (1, 5)


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 devices")
def test_many_devices():
    texts = ["a small cat", "a big cat", "a small dog", "a big dog"] * 5
    names = {"texts": texts, "labels": [[text.split()[-1]] for text in texts]}
    exec(example("Many devices"), names)
    assert names["classifier"].predict(["the dog"], k=1).labels.tolist() == [["dog"]]
    assert names["classifier"].saved_.model.head.mesh.size == 8


def test_the_head_on_your_own_network():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(10, 768)).astype(np.float32)
    labels = np.stack([rng.choice(200, 3, replace=False) for _ in range(10)]).astype(np.int32)
    batches = [(centres[i], labels[i]) for i in rng.integers(0, 10, (60, 32))]
    losses, start, original = [], {}, sparse_xmc.Trainer.train_step

    def step(trainer, *arguments, **options):
        if not start:
            start.update(jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(trainer.model, nnx.Param))))
        losses.append(float(original(trainer, *arguments, **options)))
        return losses[-1]

    names = {"batches": batches}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_xmc.Trainer, "train_step", step)
        exec(example("The head on your own network"), names)
    end = nnx.to_pure_dict(nnx.state(names["trainer"].model, nnx.Param))
    moved = jax.tree.map(lambda a, b: bool(np.any(a != np.asarray(b))), start, end)
    assert all(jax.tree.leaves(moved)), moved
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
    assert names["labels"].shape == (32, 5)


def test_the_layer_in_your_own_model():
    names = {"features": np.ones((4, 768), np.float32)}
    exec(example("The layer in your own model"), names)
    assert names["logits"].shape == (4, 200)
