"""Logits and texts of our models, of transformers' and of tests/reference.py, which tests/hf compares."""

import contextlib
import io
import os

import numpy as np
import pytest
import reference
from lab import GOLDEN
from safetensors.numpy import load_file

from memoryllm_jax.data import documents
from memoryllm_jax.hf.config_json import from_json, read
from memoryllm_jax.inference.sampling import Sampling
from memoryllm_jax.tol import serving

IDS = np.random.default_rng(0).integers(0, 64, (2, 12))
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def our_logits(engine, ids):
    """Logits [B, T, V] of our decoder at every position of the ids [B, T].

    Prefill gives the logits after a prompt's last token alone, so every prefix is a prompt of its own.
    """
    B, T = ids.shape
    prefixes = np.repeat(ids, T, 0)
    lengths = np.tile(np.arange(1, T + 1), B)
    unique, index = np.unique(prefixes, return_inverse=True)
    rows = engine.rows.fetch(unique)
    cache = engine.decoder.empty_cache(B * T, T)
    logits, _ = engine.decoder.prefill(rows, index.reshape(B * T, T), lengths, np.arange(B * T), cache)
    return np.asarray(logits).reshape(B, T, -1)


def our_text(engine, prompt, tokens):
    """Token ids of our greedy continuation of a prompt."""
    return [token for new in engine.generate([prompt], tokens, Sampling(0)) for _, token in new]


def float32_engine(workdir, tol=""):
    """Our engine in float32, with live FFN-M or a ToL file, closed at the end of the `with` block."""
    return contextlib.closing(serving.open_engine(workdir, tol, dtype="float32"))


def their_logits(model, ids):
    """Logits [B, T, V] of a model in transformers at every position of the ids [B, T]."""
    import torch

    with torch.no_grad():
        return model(torch.tensor(ids.astype(np.int64))).logits.float().numpy()


def their_text(model, prompt, tokens):
    """Token ids of transformers' greedy continuation of a prompt."""
    import torch

    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return out[0, len(prompt) :].tolist()


def golden_by_the_equations(name, ids):
    """Logits [B, T, V] of the model in a golden directory, computed by tests/reference.py from its files."""
    m, _ = from_json(read(f"{GOLDEN}/{name}/config.json"), name)
    params = reference.from_llama(load_file(f"{GOLDEN}/{name}/model.safetensors"), m)
    return np.asarray(reference.logits(params, ids, m))


def write_tokenizer(folder, specials=("<s>", "</s>"), put_before=None):
    """Writes a tokenizer.json of 64 ids: 62 characters and two special tokens.

    Args:
      put_before: the special token that it puts before each text.
    """
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {chr(32 + i): i for i in range(62)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    made.add_special_tokens(list(specials))
    if put_before:
        ids = [(put_before, made.token_to_id(put_before))]
        made.post_processor = tokenizers.processors.TemplateProcessing(f"{put_before} $A", special_tokens=ids)
    made.save(os.path.join(folder, "tokenizer.json"))


def write_sentencepiece(path, **options):
    """Trains a SentencePiece model of 400 pieces on a text; its defaults are those of Llama 2's."""
    import sentencepiece

    model = io.BytesIO()
    text = next(documents.read("embedded"))[0]
    defaults = {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()), model_writer=model, vocab_size=400, byte_fallback=True,
        num_threads=1, minloglevel=2, **(defaults | options),
    )  # fmt: skip
    with open(path, "wb") as file:
        file.write(model.getvalue())
