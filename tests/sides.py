"""Both sides of tests/hf: logits and texts of ours and of transformers."""

import contextlib
import json
import os

import numpy as np
import pytest
import reference
from lab import GOLDEN
from safetensors.numpy import load_file

from memoryllm_jax.hf.config_json import from_json
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
    """[B, T, V] of our decoder: the token after every prefix, as it is generated from."""
    B, T = ids.shape
    prefixes, lengths = np.repeat(ids, T, 0), np.tile(np.arange(1, T + 1), B)
    unique, index = np.unique(prefixes, return_inverse=True)
    cache = engine.decoder.empty_cache(B * T, T)
    rows, index = engine.rows.fetch(unique), index.reshape(B * T, T)
    logits, _ = engine.decoder.prefill(rows, index, lengths, np.arange(B * T), cache)
    return np.asarray(logits).reshape(B, T, -1)


def our_text(engine, prompt, tokens):
    """Ids of a greedy continuation."""
    return [token for new in engine.generate([prompt], tokens, Sampling(0)) for _, token in new]


def opened(workdir, tol=""):
    return contextlib.closing(serving.open_engine(workdir, tol, dtype="float32"))


def their_logits(model, ids):
    import torch

    with torch.no_grad():
        return model(torch.tensor(ids.astype(np.int64))).logits.float().numpy()


def their_text(model, prompt, tokens):
    import torch

    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return out[0, len(prompt) :].tolist()


def golden_by_the_equations(name, ids):
    """[B, T, V] of a golden directory, from its files by tests/reference.py alone."""
    m, _ = from_json(json.load(open(f"{GOLDEN}/{name}/config.json")), name)
    params = reference.from_llama(load_file(f"{GOLDEN}/{name}/model.safetensors"), m)
    return np.asarray(reference.logits(params, ids, m))


def write_tokenizer(folder, specials=("<s>", "</s>"), put_before=None):
    """A tokenizer.json of 64 ids."""
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {chr(32 + i): i for i in range(62)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    made.add_special_tokens(list(specials))
    if put_before:
        ids = [(put_before, made.token_to_id(put_before))]
        made.post_processor = tokenizers.processors.TemplateProcessing(f"{put_before} $A", special_tokens=ids)
    made.save(os.path.join(folder, "tokenizer.json"))
