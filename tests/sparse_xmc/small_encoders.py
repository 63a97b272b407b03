"""Tiny encoders of the BERT family, and a reference of their features in NumPy."""

import json
import math

import numpy as np
import pytest
from safetensors.numpy import save_file

from sparse_xmc.data.tokens import Tokens

FAMILIES = ["bert", "distilbert", "roberta", "xlm-roberta"]
VOCABULARY, WIDTH, INNER, LAYERS, HEADS, POSITIONS = 40, 12, 20, 2, 3, 24

BERT_CONFIG = {
    "model_type": "bert",
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "max_position_embeddings": POSITIONS,
    "type_vocab_size": 2,
    "hidden_dropout_prob": 0.2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "pad_token_id": 0,
}
DISTILBERT_CONFIG = {
    "model_type": "distilbert",
    "vocab_size": VOCABULARY,
    "dim": WIDTH,
    "n_layers": LAYERS,
    "n_heads": HEADS,
    "hidden_dim": INNER,
    "max_position_embeddings": POSITIONS,
    "dropout": 0.2,
    "activation": "gelu",
    "pad_token_id": 0,
}


def make_config(family):
    if family == "distilbert":
        return dict(DISTILBERT_CONFIG)
    padding = 1 if "roberta" in family else 0
    return BERT_CONFIG | {"model_type": family, "pad_token_id": padding}


def make_tensors(family, seed=0):
    """Return random tensors under their names in Hugging Face's models."""
    rng = np.random.default_rng(seed)
    tensors = {}

    def add(name, *shape):
        tensors[name] = rng.normal(size=shape).astype(np.float32) / math.sqrt(shape[-1])

    def add_layer(name, outputs, inputs):
        add(f"{name}.weight", outputs, inputs)
        add(f"{name}.bias", outputs)

    def add_norm(name):
        add(f"{name}.weight", WIDTH)
        tensors[f"{name}.weight"] += 1
        add(f"{name}.bias", WIDTH)

    add("embeddings.word_embeddings.weight", VOCABULARY, WIDTH)
    add("embeddings.position_embeddings.weight", POSITIONS, WIDTH)
    add_norm("embeddings.LayerNorm")
    if family == "distilbert":
        for layer in (f"transformer.layer.{i}" for i in range(LAYERS)):
            for name in ("q_lin", "k_lin", "v_lin", "out_lin"):
                add_layer(f"{layer}.attention.{name}", WIDTH, WIDTH)
            add_norm(f"{layer}.sa_layer_norm")
            add_layer(f"{layer}.ffn.lin1", INNER, WIDTH)
            add_layer(f"{layer}.ffn.lin2", WIDTH, INNER)
            add_norm(f"{layer}.output_layer_norm")
        return tensors
    add("embeddings.token_type_embeddings.weight", 2, WIDTH)
    for layer in (f"encoder.layer.{i}" for i in range(LAYERS)):
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            add_layer(f"{layer}.attention.{name}", WIDTH, WIDTH)
        add_norm(f"{layer}.attention.output.LayerNorm")
        add_layer(f"{layer}.intermediate.dense", INNER, WIDTH)
        add_layer(f"{layer}.output.dense", WIDTH, INNER)
        add_norm(f"{layer}.output.LayerNorm")
    add_layer("pooler.dense", WIDTH, WIDTH)
    return tensors


def write(directory, config, tensors):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    return directory


def make_directory(directory, family="bert", seed=0):
    return write(directory, make_config(family), make_tensors(family, seed))


def add_tokenizer(directory, words):
    """Write a tokenizer.json with BERT's special tokens and the given words; return the directory."""
    tokenizers = pytest.importorskip("tokenizers")
    numbers = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def make_tokens(width=9, lengths=(9, 1, 4), seed=0):
    """Return tokens with random padding, and with ids that are words in all families."""
    ids = np.random.default_rng(seed).integers(3, VOCABULARY, size=(len(lengths), width))
    return Tokens(ids.astype(np.int32), np.array(lengths, np.int32))


def reference(family, tensors, tokens, pooling):
    """Return the features of each text in float64, computed one text at a time and without padding."""
    return np.stack(
        [
            _encode(family, tensors, ids[:length], pooling)
            for ids, length in zip(tokens.ids, tokens.lengths, strict=True)
        ]
    )


def _encode(family, tensors, ids, pooling):
    def linear(name, x):
        return x @ tensors[f"{name}.weight"].T.astype(np.float64) + tensors[f"{name}.bias"]

    def norm(name, x):
        epsilon = 1e-12 if family == "distilbert" else 1e-5
        x = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + epsilon)
        return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def gelu(x):
        return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2

    first = 2 if "roberta" in family else 0
    x = tensors["embeddings.word_embeddings.weight"][ids].astype(np.float64)
    x += tensors["embeddings.position_embeddings.weight"][first : first + len(ids)]
    if family != "distilbert":
        x += tensors["embeddings.token_type_embeddings.weight"][0]
    x = norm("embeddings.LayerNorm", x)
    for i in range(LAYERS):
        if family == "distilbert":
            layer = f"transformer.layer.{i}"
            query, key, value, out = (f"{layer}.attention.{name}_lin" for name in ("q", "k", "v", "out"))
            norms = (f"{layer}.sa_layer_norm", f"{layer}.output_layer_norm")
            up, down = f"{layer}.ffn.lin1", f"{layer}.ffn.lin2"
        else:
            layer = f"encoder.layer.{i}"
            query, key, value = (f"{layer}.attention.self.{name}" for name in ("query", "key", "value"))
            out = f"{layer}.attention.output.dense"
            norms = (f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm")
            up, down = f"{layer}.intermediate.dense", f"{layer}.output.dense"
        q, k, v = linear(query, x), linear(key, x), linear(value, x)
        heads = []
        for columns in np.split(np.arange(WIDTH), HEADS):
            scores = np.exp(q[:, columns] @ k[:, columns].T / math.sqrt(len(columns)))
            heads.append(scores / scores.sum(axis=1, keepdims=True) @ v[:, columns])
        x = norm(norms[0], x + linear(out, np.concatenate(heads, axis=1)))
        x = norm(norms[1], x + linear(down, gelu(linear(up, x))))
    if pooling == "mean":
        return x.mean(axis=0)
    return x[0] if pooling == "cls" else np.tanh(linear("pooler.dense", x[:1])[0])
