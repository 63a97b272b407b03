"""Tests of classifiers that combine words with a pretrained encoder, frozen or trained."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import small_encoders
from flax import nnx
from safetensors.numpy import save_file

import sparse_xmc
from sparse_xmc import XMCClassifier
from sparse_xmc.data import Dataset, write_tsv
from sparse_xmc.data.batches import Batches, WordsAndText
from sparse_xmc.data.tokens import Tokenizer, TokenLists
from sparse_xmc.defaults import training_for
from sparse_xmc.encoders import (
    BagOfWordsEncoder,
    DenseFeatures,
    JointEncoder,
    PretrainedEncoder,
    cached_embeddings,
)
from sparse_xmc.encoders.frozen_encoder import FrozenEncoder, open_pretrained
from sparse_xmc.evaluation import predict
from sparse_xmc.modules import parameters_of
from sparse_xmc.saving import SavedModel
from sparse_xmc.warm_start import start_from

ROOT = Path(sparse_xmc.__file__).parents[1]
SIZES = {"fan_in": 4, "penultimate": 8, "embedding": 4, "epochs": 2, "batch_size": 4, "max_length": 12}
TEXTS = ["a small cat", "a big cat", "a small dog", "a big dog"] * 4
LABELS = [["cat", "small"], ["cat"], ["dog", "small"], ["dog"]] * 4

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture
def directory(tmp_path):
    encoder = small_encoders.make_directory(tmp_path / "encoder")
    return small_encoders.add_tokenizer(encoder, ["a", "small", "big", "cat", "dog"])


def bags(rows=3):
    features = scipy.sparse.csr_array(np.eye(rows, 5, dtype=np.float32))
    return features, scipy.sparse.csr_array(np.ones((rows, 2), bool))


class TestDataset:
    def test_take_includes_encoded_texts(self):
        features, labels = bags()
        lists = TokenLists(np.arange(6, dtype=np.int32), np.array([0, 1, 3, 6]), 16)
        embeddings = np.arange(12, dtype=np.float32).reshape(3, 4)
        for rows in (np.array([2, 0]), np.array([True, False, True]), slice(1, 3)):
            numbers = np.arange(3)[rows]
            taken = Dataset(features, labels, encoded=embeddings).take(rows)
            np.testing.assert_array_equal(taken.encoded, embeddings[numbers])
            taken = Dataset(features, labels, encoded=lists).take(rows).encoded
            for i, number in enumerate(numbers):
                ours, theirs = taken.take([i]), lists.take([number])
                assert ours.lengths == theirs.lengths
                np.testing.assert_array_equal(ours.ids, theirs.ids)

    def test_batches_have_words_and_encoded_texts(self):
        features, labels = bags()
        embeddings = np.arange(12, dtype=np.float32).reshape(3, 4)
        ((_, batch),) = Batches(Dataset(features, labels, encoded=embeddings), 4).in_order()
        assert batch.inputs.bags.num_examples == 3
        np.testing.assert_array_equal(batch.inputs.encoded, embeddings)

    def test_invalid_encoded_texts_raise(self):
        features, labels = bags()
        with pytest.raises(ValueError, match="encoded has 2 texts but features 3 rows"):
            Dataset(features, labels, encoded=np.zeros((2, 4), np.float32))
        with pytest.raises(ValueError, match="encoded texts go with bags of words"):
            Dataset(np.zeros((3, 5), np.float32), labels, encoded=np.zeros((3, 4), np.float32))


@pytest.mark.parametrize("direct", [False, True])
def test_joint_encoder_concatenates_features(directory, direct):
    rngs = nnx.Rngs(0)
    words = BagOfWordsEncoder(5, 3, return_direct_inputs=direct, rngs=rngs)
    text = PretrainedEncoder.from_directory(directory, dropout=0.0)
    features, labels = bags()
    tokens = Tokenizer.from_directory(directory, max_length=12)(TEXTS[:3])
    ((_, batch),) = Batches(Dataset(features, labels, encoded=tokens), 4).in_order()
    joint = JointEncoder(words, DenseFeatures(text.features, scale=2.0, rngs=rngs), text)
    joint.eval()
    result, word_output = joint(batch.inputs), words(batch.inputs.bags)
    x, bag = (result.features, word_output.features) if direct else (result, word_output)
    embeddings = small_encoders.reference(
        "bert", small_encoders.make_tensors("bert"), batch.inputs.encoded, "mean"
    )
    np.testing.assert_allclose(x[:, :-3], 2 * embeddings, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(x[:, -3:], bag)
    frozen = JointEncoder(words, joint.embeddings)
    inputs = WordsAndText(batch.inputs.bags, embeddings.astype(np.float32))
    frozen.eval()
    again = frozen(inputs)
    np.testing.assert_allclose(again.features if direct else again, x, rtol=1e-4, atol=1e-5)


def write_json(path, values):
    path.write_text(json.dumps(values))


class TestSentenceTransformersSettings:
    LONG = "a small cat a big dog a small"

    @pytest.mark.parametrize("trainable", [False, True])
    def test_default_max_length_is_read_from_file(self, directory, trainable, tmp_path):
        def lengths(max_length):
            opened = open_pretrained(directory, trainable=trainable, max_length=max_length)
            tokenizer = opened if trainable else opened._loaded[1]
            return tokenizer([self.LONG]).lengths.item()

        write_json(directory / "sentence_bert_config.json", {"max_seq_length": 6, "do_lower_case": False})
        assert (lengths(None), lengths(5)) == (6, 5)
        cached = cached_embeddings(directory, [self.LONG], tmp_path / "cache")
        np.testing.assert_array_equal(cached, FrozenEncoder(directory, max_length=6)([self.LONG]))
        with pytest.warns(UserWarning, match="max_length=12 is above the max_seq_length .*, 6$"):
            assert lengths(12) == 10
        write_json(directory / "sentence_bert_config.json", {"max_seq_length": 1000})
        assert lengths(None) == 10
        write_json(directory / "sentence_bert_config.json", {"max_seq_length": "long"})
        with pytest.raises(ValueError, match=r"sentence_bert_config\.json: max_seq_length must be .*'long'"):
            lengths(None)

    def test_prompts_that_are_not_applied_warn(self, directory):
        file = directory / "config_sentence_transformers.json"
        write_json(file, {"prompts": {"query": "", "document": ""}})
        FrozenEncoder(directory)
        write_json(file, {"prompts": {"query": "query: ", "passage": "passage: ", "other": ""}})
        with pytest.warns(UserWarning, match="the prompts query, passage are not applied"):
            XMCClassifier(encoder=directory, **SIZES).fit(TEXTS, LABELS)


class TestFrozen:
    def test_cached_embeddings_match_embeddings(self, directory, tmp_path):
        encoder = FrozenEncoder(directory, max_length=12)
        expected = encoder(TEXTS)
        np.testing.assert_array_equal(encoder(TEXTS, cache_dir=tmp_path / "cache"), expected)
        assert expected.shape == (16, encoder.features)
        assert any((tmp_path / "cache").iterdir())

    @pytest.mark.parametrize("trainable", [False, True])
    def test_predict_and_embed_without_texts(self, directory, tmp_path, trainable):
        options = {"encoder": directory, "encoder_trainable": trainable, "cache_dir": tmp_path}
        classifier = XMCClassifier(**options, **SIZES).fit(TEXTS, LABELS)
        assert classifier.predict([], k=2).labels.shape == (0, 2)
        assert FrozenEncoder(directory)([], cache_dir=tmp_path).shape == (0, small_encoders.WIDTH)

    def test_saved_classifier_finds_encoder_in_its_directory(self, directory, tmp_path):
        classifier = XMCClassifier(encoder=directory, **SIZES).fit(TEXTS, LABELS)
        assert classifier.saved_.config.text_features == small_encoders.WIDTH
        assert not any("text" in name for name in parameters_of(classifier.saved_.model))
        classifier.save(tmp_path / "model")
        loaded = XMCClassifier.load(tmp_path / "model")
        for ours, theirs in zip(classifier.predict(TEXTS, k=3), loaded.predict(TEXTS, k=3), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert loaded.score(TEXTS, LABELS) == classifier.score(TEXTS, LABELS)

    def test_load_accepts_new_directory_of_moved_encoder(self, directory, tmp_path):
        classifier = XMCClassifier(encoder=directory, **SIZES).fit(TEXTS, LABELS)
        classifier.save(tmp_path / "model")
        moved = directory.rename(tmp_path / "elsewhere")
        loaded = XMCClassifier.load(tmp_path / "model", encoder=moved)
        assert loaded.encoder == moved
        for ours, theirs in zip(classifier.predict(TEXTS, k=3), loaded.predict(TEXTS, k=3), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        XMCClassifier(**SIZES).fit(TEXTS, LABELS).save(tmp_path / "of words")
        with pytest.raises(ValueError, match="has no frozen encoder"):
            XMCClassifier.load(tmp_path / "of words", encoder=moved)

    def test_save_into_directory_of_encoder_raises(self, directory):
        before = {file.name: file.read_bytes() for file in directory.iterdir()}
        with pytest.raises(ValueError, match="directory of a pretrained encoder"):
            XMCClassifier(encoder=directory, **SIZES).fit(TEXTS, LABELS).save(directory)
        assert {file.name: file.read_bytes() for file in directory.iterdir()} == before

    def test_load_with_missing_or_other_encoder_raises(self, directory, tmp_path):
        XMCClassifier(encoder=directory, **SIZES).fit(TEXTS, LABELS).save(tmp_path / "model")
        save_file(small_encoders.make_tensors("bert", seed=1), directory / "model.safetensors")
        with pytest.raises(ValueError, match="is not the one the model was trained on"):
            XMCClassifier.load(tmp_path / "model")
        directory.rename(tmp_path / "elsewhere")
        with pytest.raises(
            ValueError, match=r"frozen_encoder\.json: the encoder that .* is not in .*encoder=DIR"
        ):
            XMCClassifier.load(tmp_path / "model")
        (tmp_path / "model" / "frozen_encoder.json").write_text("{}")
        with pytest.raises(ValueError, match="not a saved FrozenEncoder"):
            FrozenEncoder.load(tmp_path / "model" / "frozen_encoder.json")
        (tmp_path / "model" / "frozen_encoder.json").unlink()
        with pytest.raises(ValueError, match=r"damaged: frozen_encoder\.json is missing"):
            SavedModel.load(tmp_path / "model")


class TestTrained:
    def test_all_encoder_parameters_are_trained_and_saved(self, directory, tmp_path):
        before = parameters_of(PretrainedEncoder.from_directory(directory))
        classifier = XMCClassifier(encoder=str(directory), encoder_trainable=True, **SIZES)
        classifier.fit(TEXTS, LABELS)
        after = parameters_of(classifier.saved_.model.encoder.text)
        for name, parameter in before.items():
            assert np.isfinite(after[name][...]).all(), name
            assert (after[name][...] != parameter[...]).any(), name
        classifier.save(tmp_path / "model")
        for file in directory.iterdir():
            file.unlink()  # the saved model does not need these files
        loaded = XMCClassifier.load(tmp_path / "model")
        assert loaded.saved_.inputs.pretrained.max_length == 12
        for ours, theirs in zip(classifier.predict(TEXTS, k=3), loaded.predict(TEXTS, k=3), strict=True):
            np.testing.assert_array_equal(ours, theirs)

    def test_save_removes_encoder_of_previous_model(self, directory, tmp_path):
        XMCClassifier(encoder=directory, encoder_trainable=True, **SIZES).fit(TEXTS, LABELS).save(
            tmp_path / "m"
        )
        XMCClassifier(**SIZES).fit(TEXTS, LABELS).save(tmp_path / "m")
        assert XMCClassifier.load(tmp_path / "m").saved_.inputs.pretrained is None

    @pytest.mark.parametrize("trainable", [False, True])
    def test_max_length_above_limit_of_encoder_raises(self, directory, trainable):
        with pytest.raises(ValueError, match=r"max_length must be at most 24 for .*, got 25"):
            open_pretrained(directory, trainable=trainable, max_length=25)

    def test_default_learning_rate_and_warmup_of_encoder(self):
        features, labels = bags()
        tokens = TokenLists(np.arange(6, dtype=np.int32), np.array([0, 1, 3, 6]), 16)
        with_tokens, without = (training_for(Dataset(features, labels, encoded=e)) for e in (tokens, None))
        assert with_tokens.learning_rate * with_tokens.encoder_lr_multiplier == pytest.approx(1e-5)
        assert 0 < with_tokens.encoder_warmup < with_tokens.epochs
        assert (without.encoder_lr_multiplier, without.encoder_warmup) == (1, 0)


class TestStartFrom:
    def saved(self, directory, **options):
        return XMCClassifier(encoder=directory, **SIZES | options).fit(TEXTS, LABELS).saved_

    def test_start_from_frozen_model_copies_all_but_the_encoder(self, directory):
        frozen, trained = self.saved(directory), self.saved(directory, encoder_trainable=True, seed=1)
        text_parameters = parameters_of(trained.model.encoder.text)
        before = {name: np.asarray(parameter[...]) for name, parameter in text_parameters.items()}
        start_from(trained, frozen)
        for name, parameter in parameters_of(frozen.model).items():
            np.testing.assert_array_equal(parameters_of(trained.model)[name][...], parameter[...])
        np.testing.assert_array_equal(
            trained.model.head.output.indices[...], frozen.model.head.output.indices[...]
        )
        for name, values in before.items():
            np.testing.assert_array_equal(text_parameters[name][...], values)
        with pytest.raises(ValueError, match=r"encoder\.text\..* is float32 .*, expected none"):
            start_from(frozen, trained)

    def test_start_from_incompatible_model_raises(self, directory):
        ours = self.saved(directory)
        with pytest.raises(ValueError, match=r"head\.output\.indices is .*, expected .*"):
            start_from(ours, self.saved(directory, fan_in=SIZES["fan_in"] - 1))
        with pytest.raises(ValueError, match="has other words; was it trained on the same data"):
            start_from(ours, XMCClassifier(encoder=directory, **SIZES).fit(TEXTS[1:4], LABELS[1:4]).saved_)
        others = XMCClassifier(encoder=directory, **SIZES)
        others.fit(TEXTS, [[f"{name}'" for name in names] for names in LABELS])
        with pytest.raises(ValueError, match="has other labels; was it trained on the same data"):
            start_from(ours, others.saved_)


def test_estimator_with_invalid_encoder_raises(directory):
    with pytest.raises(ValueError, match="encoder is for texts, but X is a matrix"):
        XMCClassifier(encoder=directory).fit(np.zeros((4, 2), np.float32), LABELS[:4])
    with pytest.raises(ValueError, match="encoder_trainable=True needs an encoder"):
        XMCClassifier(encoder_trainable=True).fit(TEXTS, LABELS)
    with pytest.raises(ValueError, match=r"config\.json"):
        XMCClassifier(encoder=directory / "nowhere").fit(TEXTS, LABELS)


def test_encoder_path_is_saved_in_json(directory, tmp_path):
    XMCClassifier(encoder=directory, **SIZES).fit(TEXTS, LABELS).save(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "estimator.json").read_text())["encoder"] == str(directory)


@pytest.mark.parametrize("trainable", [False, True])
def test_run_program_with_encoder(directory, tmp_path, trainable):
    for name, repeats in (("train", 10), ("test", 2)):
        write_tsv(tmp_path / f"{name}.tsv", LABELS[:4] * repeats, TEXTS[:4] * repeats)
    flags = {"train": tmp_path / "train.tsv", "test": tmp_path / "test.tsv", "workdir": tmp_path / "run"}
    flags |= {"encoder": directory, "encoder_trainable": trainable, "max_length": 12, "epochs": 2}
    flags |= {"embedding": 4, "penultimate": 8, "fan_in": 4, "direct_inputs": 2, "rewire_fraction": 0}
    flags |= {"batch_size": 4, "cache_dir": tmp_path / "cache"}
    command = [
        sys.executable,
        "-m",
        "experiments.run",
        *(f"--{name}={value}" for name, value in flags.items()),
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    again = [*command[:-1], f"--cache_dir={tmp_path / 'cache'}", f"--workdir={tmp_path / 'again'}"]
    again += [f"--init_from={tmp_path / 'run'}", "--encoder_trainable"]
    subprocess.run(again, cwd=ROOT, check=True, capture_output=True)
    first, second = ((tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in ("run", "again"))
    # The second run starts with the weights of the first.
    assert json.loads(second[0])["loss"] < json.loads(first[0])["loss"]
    saved = SavedModel.load(tmp_path / "run")
    assert isinstance(saved.inputs.pretrained, Tokenizer if trainable else FrozenEncoder)
    assert (saved.config.pretrained is not None) == trainable
    report = json.loads((tmp_path / "run" / "result.json").read_text())
    assert report["model"]["text_features"] == small_encoders.WIDTH
    scores = next(predict(saved.model, saved.inputs(TEXTS), 3))[1]
    assert np.isfinite(scores).all()
