import subprocess
import sys

import jax
import numpy as np
import pytest
import scipy.sparse
from flax import nnx
from small_models import FEATURES, config_of, make_inputs, make_model, make_random_model

import xla_ops
from sparse_xmc import BagOfWords, Classifier, XMCClassifier, export_predict, make_mesh
from sparse_xmc.data.batches import WordsAndText
from sparse_xmc.encoders import DenseFeatures, JointEncoder
from sparse_xmc.saving import SavedModel

SERVER = """
import sys, numpy, xla_ops
for name in sys.argv[1:]:
    predict = xla_ops.load_exported(name.rstrip("0123456789"))
    arrays = numpy.load(name + ".npz")
    numpy.savez(name + "_out.npz", *predict(*(arrays[key] for key in arrays.files)))
assert "sparse_xmc" not in sys.modules and "flax" not in sys.modules
"""


def with_embeddings(model, features):
    """Return `model` with an encoder that takes `features` features from embeddings instead of words."""
    encoder = make_random_model(bag_of_words=True, embedding=6 - features, direct_inputs=2).encoder
    return Classifier(JointEncoder(encoder, DenseFeatures(features, rngs=nnx.Rngs(0))), model.head)


@pytest.mark.usefixtures("x64")
def test_exported_model_predicts_same_without_sparse_xmc(tmp_path):
    word_model = make_random_model(bag_of_words=True, direct_inputs=2)
    models = {
        "dense": make_random_model("head_and_tail", output_dtype="bfloat16"),
        "words": word_model,
        "both": with_embeddings(word_model, 4),
    }
    for name, model in models.items():
        export_predict(model, tmp_path / name, k=3)
    top_k, expected = nnx.jit(lambda model, inputs: model.top_k(inputs, 3)), {}
    for name, batch in (("dense", 8), ("words", 9), ("both", 1)):
        x, embeddings = make_inputs(batch), make_inputs(batch)[:, :4]
        rng = np.random.default_rng(0)
        csr = scipy.sparse.random_array((batch, FEATURES), density=0.4, format="csr", rng=rng)
        csr = csr.astype(np.float32)
        rows = np.repeat(np.arange(batch, dtype=np.int32), np.diff(csr.indptr))
        bags = BagOfWords(rows, csr.indices, csr.data, batch)
        padded = (csr.indptr, np.pad(csr.indices, (0, 5)), np.pad(csr.data, (0, 5)))
        arrays, inputs = {
            "dense": ((x,), x),
            "words": (padded, bags),
            "both": ((*padded, embeddings), WordsAndText(bags, embeddings)),
        }[name]
        np.savez(tmp_path / f"{name}{batch}.npz", *arrays)
        expected[f"{name}{batch}"] = top_k(models[name], inputs)

    subprocess.run([sys.executable, "-c", SERVER, *(str(tmp_path / name) for name in expected)], check=True)

    for name, (scores, labels) in expected.items():
        with np.load(tmp_path / f"{name}_out.npz") as served:
            np.testing.assert_allclose(served["arr_0"], scores, rtol=1e-5)
            np.testing.assert_array_equal(served["arr_1"], labels)


def test_program_file_does_not_contain_weights(tmp_path):
    sizes = {}
    for penultimate in (8, 8000):
        path = tmp_path / str(penultimate)
        export_predict(make_model(penultimate=penultimate), path)
        sizes[penultimate] = [(path / name).stat().st_size for name in ("weights.npz", "program.jax_export")]
    assert sizes[8000][0] > 400_000
    assert sizes[8000][1] < 1.1 * sizes[8][1]


def test_export_disables_dropout_and_does_not_change_model(tmp_path):
    model = make_model(dropout=0.5)
    classifier = XMCClassifier()
    classifier._set_fitted(SavedModel(config_of(dropout=0.5), model))
    export_predict(classifier, tmp_path / "exported")
    assert not model.encoder.dropout.deterministic
    predict = xla_ops.load_exported(tmp_path / "exported")
    expected = classifier.predict(make_inputs())
    for array, other in zip(predict(make_inputs()), (expected.scores, expected.labels), strict=True):
        np.testing.assert_allclose(array, other, rtol=1e-5)


def test_default_k_is_limited_by_number_of_labels(tmp_path):
    export_predict(make_model(labels=3), tmp_path / "exported")
    scores, labels = xla_ops.load_exported(tmp_path / "exported")(make_inputs())
    assert scores.shape == labels.shape == (len(make_inputs()), 3)


def test_invalid_exports_raise(tmp_path):
    class Own(nnx.Module):
        pass

    model = make_model()
    with pytest.raises(ValueError, match="k must be between 1 and the number of labels, 30, got 31"):
        export_predict(model, tmp_path / "new", k=31)
    with pytest.raises(ValueError, match=r"inputs of a Own are not known here; use xla_ops\.save_exported"):
        export_predict(Classifier(Own(), model.head), tmp_path / "new")
    sharded = config_of().make(mesh=make_mesh(label=len(jax.devices())), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="a classifier on a mesh is not exported"):
        export_predict(sharded, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(FileExistsError):
        export_predict(model, tmp_path)
