"""Tests that run the Python code of README.md, docs/ and docstrings, at smaller sizes."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

import sparse_xmc
import xla_ops
from sparse_xmc.data import Dataset, LabelEncoder, read_tsv
from sparse_xmc.evaluation import evaluate

ROOT = Path(__file__).parents[1]
# Sizes in the code of the pages, and the smaller ones that replace them in tests.
SIZES = {"670_091": "200", "32_768": "64", "fan_in=32": "fan_in=8"}
TEXTS = ["a small cat", "a big cat", "a small dog", "a big dog"] * 5

pytestmark = pytest.mark.usefixtures("standard_promotion")


def python_blocks(path):
    """Return the Python blocks of a Markdown file."""
    text = (ROOT / path).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def run(path, namespace, start=0, stop=None, sizes=SIZES):
    """Execute the Python blocks `start` to `stop` of a file in one namespace; return the namespace."""
    blocks = python_blocks(path)[start:stop]
    assert blocks
    for code in blocks:
        for size, smaller in sizes.items():
            code = code.replace(size, smaller)
        exec(compile(code, path, "exec"), namespace)
    return namespace


def make_batches():
    """Return 60 batches of 32 points: (features, positives) around 10 centres with 3 labels each."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(10, 768)).astype(np.float32)
    labels = np.stack([rng.choice(200, 3, replace=False) for _ in range(10)]).astype(np.int32)
    return [(centres[i], labels[i]) for i in rng.integers(0, 10, (60, 32))]


def test_readme_code(tmp_path):
    labels = [["cat", "small"], ["cat", "big"], ["dog", "small"], ["dog", "big"]] * 4 + [["other"]] * 4
    for path in ("train.tsv", "test.tsv"):
        lines = ("|".join(names) + f"\t{text}\n" for names, text in zip(labels, TEXTS, strict=True))
        (tmp_path / path).write_text("".join(lines), encoding="utf-8")
    smaller = {"sparse_xmc/cli/data/wordnet": str(tmp_path), ".tsv.xz": ".tsv", "boat that is rowed": "dog"}
    namespace = run("README.md", {"features": np.ones((4, 768), np.float32)}, sizes=SIZES | smaller)
    assert set(namespace["names"][0][:2]) == {"dog", "small"}
    assert namespace["scores"].shape == (1, 3)
    assert namespace["logits"].shape == (4, 200)
    assert "indices" in nnx.to_pure_dict(namespace["state"])["layers"][3]
    assert python_blocks("docs/estimator.md")[0] in python_blocks("README.md")


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 devices")
def test_many_devices_page():
    labels = [[text.split()[-1]] for text in TEXTS]
    classifier = run("docs/many_devices.md", {"texts": TEXTS, "labels": labels})["classifier"]
    assert classifier.predict(["the dog"], k=1).labels.tolist() == [["dog"]]
    assert classifier.saved_.model.head.mesh.size == 8


@pytest.fixture(scope="module")
def wordnet():
    """Return training and test set: points of the shipped data with 256 dense features and 100 labels."""
    names, texts = read_tsv(ROOT / "sparse_xmc" / "cli" / "data" / "wordnet" / "train.tsv.xz")
    labels = LabelEncoder.fit(names)(names)
    by_frequency = np.argsort(-np.asarray(labels.sum(axis=0)).ravel(), kind="stable")
    labels = labels[:, np.sort(by_frequency[:100])]
    rows = np.random.default_rng(0).permutation(np.flatnonzero(np.diff(labels.indptr)))[:2000]
    words = TfidfVectorizer(min_df=2).fit_transform([texts[row] for row in rows])
    features = TruncatedSVD(256, n_iter=2, random_state=0).fit_transform(words).astype(np.float32)
    return tuple(Dataset(features[part], labels[rows[part]]) for part in (slice(1500), slice(1500, None)))


@pytest.fixture(scope="module")
def expected_p_at_1(wordnet):
    """Return P@1 of `XMCClassifier` on the test set of `wordnet`."""
    train, test = wordnet
    return (
        sparse_xmc.XMCClassifier(epochs=5).fit(train.features, train.labels).score(test.features, test.labels)
    )


WORDNET_SIZES = {"512": "128", "1024": "256", "768": "256", "670_091": "100", "32_768": "256"}


@pytest.mark.parametrize("scale", [1, 1 / 16, 16])
def test_model_page_trains_own_network(wordnet, expected_p_at_1, monkeypatch, scale):
    start, original = {}, sparse_xmc.Trainer.train_step

    def step(trainer, *arguments, **options):
        if not start:
            start.update(jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(trainer.model, nnx.Param))))
        return original(trainer, *arguments, **options)

    monkeypatch.setattr(sparse_xmc.Trainer, "train_step", step)
    train, test = (Dataset(points.features * np.float32(scale), points.labels) for points in wordnet)
    namespace = {"features": train.features, "labels": train.labels}
    run("docs/model.md", namespace, stop=1, sizes=WORDNET_SIZES)
    model = namespace["trainer"].model
    end = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    has_changed = jax.tree.map(lambda a, b: bool(np.any(a != np.asarray(b))), start, end)
    assert all(jax.tree.leaves(has_changed)), has_changed
    assert namespace["best"].shape == (32, 5)
    assert evaluate(model, test, ks=(1,))["p@1"] > 0.85 * expected_p_at_1


def test_model_page_trains_own_model_with_layer(wordnet, expected_p_at_1):
    first_line = "rngs = nnx.Rngs(0)\n"
    readme_code, page_code = (
        python_blocks(path)[1].partition(first_line)[2] for path in ("README.md", "docs/model.md")
    )
    assert readme_code.startswith(page_code)
    train, test = wordnet
    namespace = {"features": train.features[:4]}
    run("docs/model.md", namespace, start=1, stop=2, sizes=WORDNET_SIZES)
    model, optimizer = namespace["model"], namespace["optimizer"]

    @nnx.jit
    def step(model, optimizer, x, y):
        grads = nnx.grad(lambda model: optax.sigmoid_binary_cross_entropy(model(x), y).mean())(model)
        optimizer.update(model, grads)

    rng = np.random.default_rng(0)
    targets = train.labels.toarray().astype(np.float32)
    for _ in range(5):
        for rows in rng.permutation(len(train)).reshape(-1, 50):
            step(model, optimizer, train.features[rows], targets[rows])
    best = np.asarray(model(test.features)).argmax(axis=1)
    p_at_1 = test.labels.toarray()[np.arange(len(test)), best].mean()
    assert p_at_1 > 0.85 * expected_p_at_1


def test_model_page_rewires_layer():
    moved = run("docs/model.md", {"features": np.ones((4, 768), np.float32)}, start=1)["moved"]
    assert moved.shape == (200, 8)
    assert moved.any()


def test_ops_page_trains_layer():
    namespace = run("docs/ops.md", {"batches": make_batches()})
    positives, best_labels = namespace["positives"].tolist(), np.asarray(namespace["labels"]).tolist()
    hits = [len({*row} & {*best}) for row, best in zip(positives, best_labels, strict=True)]
    assert np.mean(hits) > 2


def test_serving_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 8)).astype(np.float32), np.eye(10)[np.arange(40) % 10]
    classifier = sparse_xmc.XMCClassifier(epochs=1, penultimate=16, fan_in=4).fit(x, y)
    classifier.save("model")
    namespace = run("docs/serving.md", {"x": x})
    np.testing.assert_array_equal(namespace["labels"], classifier.predict(x).labels)


def test_memory_page(capsys):
    plan = run("docs/memory.md", {})["plan"]
    assert plan.fits
    assert capsys.readouterr().out == f"{plan.bytes} True\n"


def modules_with_examples():
    """Yield the names of the modules of both packages whose docstrings contain examples."""
    for package in (sparse_xmc, xla_ops):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            source = module.module_finder.find_spec(module.name).origin
            if source.endswith(".py") and ">>> " in Path(source).read_text(encoding="utf-8"):
                yield module.name


@pytest.mark.parametrize("name", [*modules_with_examples()])
def test_docstring_examples(name):
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert failed == 0
    assert tried > 0


def test_links_resolve():
    """All relative links in README.md, WORKSPACE.md, docs/ and experiments/results/ resolve."""
    pages = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "experiments" / "results").glob("*.md")]
    for path in (ROOT / "README.md", ROOT / "WORKSPACE.md", *pages):
        text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            if not target.startswith("https:"):
                assert (path.parent / target).exists(), f"{path.name}: {target}"


def numbers_in(page):
    """Return the numbers in the text of a page, without code, links and names such as P@1 or float32."""
    page = re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)
    page = re.sub(r"`[^`]*`|\]\([^)]*\)", "", page)
    return re.findall(r"\d[\d.,]*", re.sub(r"[A-Za-z][^\s|]*", "", page))


def test_results_pages_are_short():
    """Results and tuning have at most 60 numbers per page; experiments/results has the rest."""
    for path in (ROOT / "docs" / "tuning.md", *(ROOT / "docs" / "results").glob("*.md")):
        numbers = numbers_in(path.read_text(encoding="utf-8"))
        assert len(numbers) <= 60, f"{path.name}: {len(numbers)} numbers"


def test_api_page_lists_all_public_names():
    page = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    public = [
        f"{package.__name__}.{name}"
        for package in (sparse_xmc, xla_ops)
        for name in package.__all__
        if not inspect.ismodule(getattr(package, name))
    ]
    assert set(public) <= set(page)
    assert len(set(page)) == len(page)
