"""Reads a Hugging Face directory into a workdir."""

import contextlib
import dataclasses
import os

import jax
import numpy as np
import safetensors

from memoryllm_jax import config
from memoryllm_jax.checkpoint import store
from memoryllm_jax.checkpoint.trained import parameter_name
from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.common.progress import Progress
from memoryllm_jax.config import Config, DataConfig
from memoryllm_jax.data.tokenizer import load
from memoryllm_jax.hf import config_json, shards, tensor_names
from memoryllm_jax.model import flops, sharding, transformer

IMPORTED = "imported"  # stands for path and digest of the training data, which are unknown

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Files that export writes again unchanged, also for a model that was trained from the import.
_KEPT = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
    "NOTICE.txt",
    "USE_POLICY.md",
)


def import_model(source: str, workdir: str) -> str:
    """Makes a workdir with one checkpoint, of step 0, from a Hugging Face directory.

    Args:
      source: a directory with config.json, safetensors files and a tokenizer.
      workdir: folder or gs:// URL to write, which has no checkpoints yet.
    Returns: one line that says what was read.
    Raises: UserError that names a missing or damaged file, or a setting or tensor that our models cannot express.
    """
    if not os.path.isdir(source):
        raise ArgumentError("import", f"expected a Hugging Face directory, found none at {source}")
    _check_has_no_checkpoints(workdir)
    path = os.path.join(source, "config.json")
    settings = storage.read_json(path, "a model's settings")
    model, context = config_json.from_json(settings, path)
    tensors = tensor_names.tensors(model)
    stored = _without_copies(shards.read_headers(source), model, source)
    _check_tensors(stored, tensors, source)
    tokenizer = _tokenizer(source, settings)
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"{path}: vocab_size: expected at least the tokenizer's {tokenizer.vocab_size}, found {model.vocab_size}"
        )

    run = Config(seq_len=context, model=model, data=DataConfig(path=IMPORTED))
    description = {
        "config": dataclasses.asdict(run),
        "data": {"digest": IMPORTED},
        "tokenizer": tokenizer.to_json(),
        "source": _source(source, settings, model, stored),
    }
    params = _read_params(source, stored, tensors, model)
    with contextlib.closing(store.Checkpoints(workdir)) as checkpoints:
        checkpoints.save(0, {"params": params}, description)
        checkpoints.wait()
    size = f"{flops.parameters(run)['total'] / 1e6:,.1f}M parameters"
    return f"{workdir}: {model.architecture}, {size}, a context of {context} tokens, computes in {model.dtype}"


def _check_has_no_checkpoints(workdir):
    if not storage.exists(workdir):
        return
    with contextlib.closing(store.Checkpoints(workdir, read_only=True)) as checkpoints:
        if checkpoints.steps():
            raise ArgumentError("workdir", f"expected a folder without checkpoints, found some in {workdir}")


def _source(folder, settings, model, stored):
    """The part of the checkpoint's description from which export writes the model as it was imported."""
    # Not config.json of a model with FFN-M: it holds a digest of the weights, which export computes anew.
    of_these_weights = ("README.md",) if model.memory_dim else ("config.json", "README.md")
    return {
        "dtypes": sorted({tensor.dtype for tensor in stored.values()}),
        "special": {name: settings[name] for name in config_json.SPECIAL if name in settings},
        "files": _texts(folder, _KEPT),
        # They describe the imported weights, so a model that is trained from the import drops them.
        "of_these_weights": _texts(folder, of_these_weights),
    }


def _texts(folder, names):
    """{name: text} of those files that exist. Bytes that are not UTF-8 become surrogates, which export turns back."""
    out = {}
    for name in names:
        path = os.path.join(folder, name)
        if os.path.exists(path):
            out[name] = storage.read_bytes(path, "text").decode(errors="surrogateescape")
    return out


def _without_copies(stored, model, folder):
    """The stored tensors without those that follow from others: rotary buffers, and the head of a tied embedding.

    Raises: UserError if the head of a tied embedding is not the embedding.
    """
    out = {name: tensor for name, tensor in stored.items() if not name.endswith("rotary_emb.inv_freq")}
    if not model.tie_embeddings or _HEAD not in out:
        return out
    # A missing embedding is reported by _check_tensors.
    if _EMBEDDING in out and not np.array_equal(_read(folder, out, _EMBEDDING), _read(folder, out, _HEAD)):
        raise UserError(
            f"{folder}: tensor {_HEAD}: expected the input embedding, as tie_word_embeddings says, found other values"
        )
    del out[_HEAD]
    return out


def _read(folder, stored, name):
    """The values of one tensor in its stored dtype."""
    # Not the NumPy framework, which lacks bfloat16 in older versions of safetensors.
    with safetensors.safe_open(os.path.join(folder, stored[name].file), framework="flax") as file:
        return np.asarray(file.get_tensor(name))


def _check_tensors(stored, tensors, folder):
    """Raises: UserError that names a tensor which is unknown, missing or of another shape."""
    for name, (file, _, shape) in stored.items():
        if name not in tensors:
            raise UserError(f"{folder}/{file}: tensor {name}: expected one of Llama's or FFN-M's, found an unknown one")
        if shape != tensors[name].shape:
            raise UserError(f"{folder}/{file}: tensor {name}: expected the shape {tensors[name].shape}, found {shape}")
    for name in tensors:
        if name not in stored:
            raise UserError(f"{folder}: expected a tensor {name}, found none")


def _read_params(folder, stored, tensors, model):
    """Our tree of parameters in float32; those of the layers are stacked over the layers."""
    mesh = sharding.make_mesh(config.MeshConfig(1, 1, 1), jax.devices()[:1])
    shapes = transformer.abstract_params(transformer.LanguageModel(model), mesh)
    params = jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), shapes)
    leaves = {parameter_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    with contextlib.closing(Progress("import", len(tensors), "tensor")) as progress:
        for done, (name, tensor) in enumerate(tensors.items(), 1):
            leaf = leaves[tensor.leaf]
            place = leaf if tensor.layer is None else leaf[tensor.layer]
            place[...] = tensor.to_ours(_read(folder, stored, name), place.shape)
            progress.update(done)
    return params


def _tokenizer(folder, settings):
    """The tokenizer in tokenizer.json, else in tokenizer.model (SentencePiece's or Llama 3's). Raises: UserError."""
    path = os.path.join(folder, "tokenizer.json")
    if os.path.exists(path):
        tokenizer = load(f"hf:{path}")
        # tokenizer.json says which id begins a text, but not which ids end one.
        tokenizer.name_special(tokenizer.put_before, _end_ids(folder, settings, tokenizer.eos_id))
        return tokenizer
    path = os.path.join(folder, "tokenizer.model")
    if not os.path.exists(path):
        raise UserError(f"{folder}: expected tokenizer.json or tokenizer.model, found neither")
    # Llama 3's file is text that begins with its first token, "!" in base64, and its rank.
    is_llama3 = storage.read_bytes(path, "a tokenizer").startswith(b"IQ== 0")
    kind = "llama3" if is_llama3 else "sentencepiece"
    return load(f"{kind}:{path}")


def _end_ids(folder, settings, default):
    """Ids that end a text: those in generation_config.json, else those in config.json, else the default."""
    path = os.path.join(folder, "generation_config.json")
    if os.path.exists(path):
        settings = settings | storage.read_json(path, "settings of generation")
    ids = settings.get("eos_token_id")
    if ids is None:
        ids = default
    if not isinstance(ids, list):
        ids = [ids]
    return [i for i in ids if i is not None]
