"""Export of a trained classifier as a program that runs without this library."""

import os
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_xmc.data.batches import BagOfWords, WordsAndText
from sparse_xmc.encoders import BagOfWordsEncoder, DenseFeatures, JointEncoder
from sparse_xmc.estimator import XMCClassifier, resolve_k
from sparse_xmc.model import Classifier
from sparse_xmc.modules import in_evaluation, merge, split
from sparse_xmc.saving import SavedModel
from xla_ops import save_exported


def export_predict(
    model: Classifier | SavedModel | XMCClassifier, path: str | os.PathLike, k: int | None = None
) -> None:
    """Export the prediction of a trained classifier, for processes that have only JAX and `xla_ops`.

    In such a process, `predict = xla_ops.load_exported(path)` is a function for batches of any size B:

    - for dense features: `predict(x)`, x float32 [B, D];
    - for bags of words: `predict(indptr, indices, data)`, int32 [B + 1], int32 [N] and float32 [N], the
        arrays of a `scipy.sparse.csr_array` [B, V], such as TF-IDF. It is compiled for each N: pad `indices`
        and `data` with zeros after the last entry (`np.pad`) to a few sizes;
    - for bags of words and a frozen encoder: `predict(indptr, indices, data, embeddings)`, embeddings float32
      [B, E].

    It returns the scores float32 [B, k] and the labels int32 [B, k], best first; label names are the lines of
    `labels.txt` in the directory of a saved model. Encode texts before with the `inputs` of the `SavedModel`,
    which return `Points` with the CSR matrix `features` and the embeddings `encoded`. The program does not
    check that scores are finite.

    Args:
      model: the classifier. For encoders with other inputs, use `xla_ops.save_exported`.
      path: a new directory.
      k: number of labels to return, at most L; None for 5, or all labels if there are fewer.

    Raises:
      FileExistsError: the path exists.
      ValueError: k is out of range, the classifier is on a mesh, or its encoder is of another class.

    Examples:
      >>> import tempfile, numpy as np, xla_ops
      >>> from flax import nnx
      >>> from sparse_xmc import ClassifierConfig, export_predict
      >>> path = tempfile.mkdtemp() + "/exported"
      >>> export_predict(ClassifierConfig(num_features=64, num_labels=100).make(rngs=nnx.Rngs(0)), path)
      >>> predict = xla_ops.load_exported(path)
      >>> scores, labels = predict(np.ones((2, 64), np.float32))
      >>> labels.shape
      (2, 5)
    """
    if isinstance(model, XMCClassifier):
        model = model._fitted
    if isinstance(model, SavedModel):
        model = model.model
    k = resolve_k(k, model.head.num_labels)
    if model.head.mesh is not None:
        raise ValueError("a classifier on a mesh is not exported: save it, and load it without one")
    graphdef, (random, weights) = split(in_evaluation(model), nnx.RngState)
    encoder = model.encoder
    batch, entries = jax.export.symbolic_shape("batch, entries")
    inputs: list[Any] = [((batch + 1,), jnp.int32), ((entries,), jnp.int32), ((entries,), jnp.float32)]
    if isinstance(encoder, DenseFeatures):
        inputs = [((batch, encoder.features), jnp.float32)]
    elif isinstance(encoder, JointEncoder) and encoder.text is None:
        inputs.append(((batch, encoder.embeddings.features), jnp.float32))
    elif not isinstance(encoder, BagOfWordsEncoder):
        raise ValueError(
            f"the inputs of a {type(encoder).__name__} are not known here; use xla_ops.save_exported"
        )

    def predict(weights: nnx.State, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        classifier = merge(graphdef, random, weights)
        if len(arrays) == 1:
            return classifier.top_k(*arrays, k)
        bags = _bags(*arrays[:3])
        return classifier.top_k(WordsAndText(bags, arrays[3]) if arrays[3:] else bags, k)

    save_exported(path, predict, weights, *(jax.ShapeDtypeStruct(*shape) for shape in inputs))


def _bags(indptr: jax.Array, indices: jax.Array, data: jax.Array) -> BagOfWords:
    """Convert the arrays of a CSR matrix to a `BagOfWords`; entries after the last row are padding."""
    ends = jnp.zeros(indices.shape, jnp.int32).at[indptr[1:]].add(1, mode="drop")
    return BagOfWords(jnp.cumsum(ends), indices, data, indptr.shape[0] - 1)
