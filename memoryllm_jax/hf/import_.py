"""Reads a Hugging Face directory into a workdir."""

import contextlib
import os

import jax
import numpy as np
from msgspec import UNSET, UnsetType

from memoryllm_jax import config
from memoryllm_jax.checkpoint import description as description_lib
from memoryllm_jax.checkpoint import store
from memoryllm_jax.checkpoint.digest import array_name
from memoryllm_jax.common import devices, records, storage
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.common.progress import Progress
from memoryllm_jax.config import Config, DataConfig
from memoryllm_jax.data.tokenizer import load
from memoryllm_jax.hf import config_json, shards, tensor_names
from memoryllm_jax.hf import source as source_lib
from memoryllm_jax.model import flops, sharding, transformer

IMPORTED = "imported"  # stands for path and digest of the training data, which are unknown

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


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
    _check_can_hold_a_checkpoint(workdir)
    path = shards.path_in(source, "config.json")
    settings = config_json.read(path)
    model, context = config_json.from_json(settings, path)
    found = shards.read_headers(source)
    # Sizes in config.json are compared with the files before anything of these sizes is allocated, the names of all
    # layers' tensors among them. A layer has at least one tensor.
    if model.layers > len(found):
        raise UserError(
            f"{path}: num_hidden_layers: expected at most {len(found)}, the number of tensors, found {model.layers}"
        )
    tensors = tensor_names.tensors(model)
    stored = _without_copies(found, model, source)
    _check_tensors(stored, tensors, source)
    tokenizer = _tokenizer(source, settings, model.vocab_size)
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"{path}: vocab_size: expected at least the tokenizer's {tokenizer.vocab_size}, found {model.vocab_size}"
        )

    run = Config(seq_len=context, model=model, data=DataConfig(path=IMPORTED))
    description = description_lib.describe(run, IMPORTED, tokenizer, _source(source, settings, model, stored))
    params = _read_params(source, stored, tensors, model)
    with contextlib.closing(store.Checkpoints(workdir)) as checkpoints:
        checkpoints.save(0, {"params": params}, description)
        checkpoints.wait()
    size = f"{flops.parameters(run)['total'] / 1e6:,.1f}M parameters"
    text = f"{workdir}: {model.architecture}, {size}, a context of {context} tokens, computes in {model.dtype}"
    if shards.has_unread_index(source):
        text += f"; read from {shards.SINGLE}, as by transformers, not from the files of {shards.INDEX} beside it"
    return text


def _check_can_hold_a_checkpoint(workdir):
    """Refuses a workdir that is taken or out of reach, before the weights are read."""
    workdir = description_lib.folder(workdir)
    if storage.exists(workdir) and description_lib.steps(workdir):
        raise ArgumentError("workdir", f"expected a folder without checkpoints, found some in {workdir}")


def _source(folder, settings, model, stored):
    """The part of the checkpoint's description from which export writes the model as it was imported."""
    # Not config.json of a model with FFN-M: it holds a digest of the weights, which export computes anew.
    of_these_weights = tuple(n for n in source_lib.OF_THESE_WEIGHTS if n != "config.json" or not model.memory_dim)
    kept = source_lib.Source(
        dtypes=tuple(sorted({tensor.dtype for tensor in stored.values()})),
        special=settings.special(),
        files=source_lib.texts(folder, source_lib.KEPT),
        of_these_weights=source_lib.texts(folder, of_these_weights),
    )
    return records.to_json(kept)


def _without_copies(stored, model, folder):
    """The stored tensors without those that follow from others: rotary buffers, and the head of a tied embedding.

    Raises: UserError if the head of a tied embedding is not the embedding.
    """
    out = {name: tensor for name, tensor in stored.items() if not name.endswith("rotary_emb.inv_freq")}
    if not model.tie_embeddings or _HEAD not in out:
        return out
    # A missing embedding is reported by _check_tensors.
    if _EMBEDDING in out and not _are_equal(folder, out[_EMBEDDING], out[_HEAD]):
        raise UserError(
            f"{folder}: tensor {_HEAD}: expected the input embedding, as tie_word_embeddings says, found other values"
        )
    del out[_HEAD]
    return out


def _are_equal(folder, one, other):
    """Whether two stored tensors have the same values."""
    return one.shape == other.shape and np.array_equal(shards.read(folder, one), shards.read(folder, other))


def _check_tensors(stored, tensors, folder):
    """Raises: UserError that names a tensor which is unknown, missing or of another shape."""
    for name, (file, _, shape, _) in stored.items():
        if name not in tensors:
            raise UserError(f"{folder}/{file}: tensor {name}: expected one that config.json calls for, found another")
        if shape != tensors[name].shape:
            raise UserError(f"{folder}/{file}: tensor {name}: expected the shape {tensors[name].shape}, found {shape}")
    for name in tensors:
        if name not in stored:
            raise UserError(f"{folder}: expected a tensor {name}, found none")


def _read_params(folder, stored, tensors, model):
    """Our tree of parameters in float32; those of the layers are stacked over the layers."""
    mesh = sharding.make_mesh(config.MeshConfig(1, 1, 1), devices.find()[:1])
    shapes = transformer.abstract_params(transformer.LanguageModel(model), mesh)
    params = jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), shapes)
    leaves = {array_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    with contextlib.closing(Progress("import", len(tensors), "tensor")) as progress:
        for done, (name, tensor) in enumerate(tensors.items(), 1):
            leaf = leaves[tensor.leaf]
            place = leaf if tensor.layer is None else leaf[tensor.layer]
            place[...] = tensor.to_ours(shards.read(folder, stored[name]), place.shape)
            progress.update(done)
    return params


def _tokenizer(folder, settings, vocab_size):
    """The tokenizer in tokenizer.json, else in tokenizer.model (SentencePiece's or Llama 3's). Raises: UserError."""
    path = shards.path_in(folder, "tokenizer.json")
    if os.path.exists(path):
        shards.path_in(folder, "tokenizer_config.json")  # which `load` reads
        tokenizer = load(f"hf:{path}")
        # tokenizer.json says which id begins a text, but not which ids end one.
        tokenizer.name_special(tokenizer.put_before, _end_ids(folder, settings, tokenizer.eos_id, vocab_size))
        return tokenizer
    path = shards.path_in(folder, "tokenizer.model")
    if not os.path.exists(path):
        raise UserError(f"{folder}: expected tokenizer.json or tokenizer.model, found neither")
    # Llama 3's file is text that begins with its first token, "!" in base64, and its rank.
    is_llama3 = storage.read_bytes(path, "a tokenizer").startswith(b"IQ== 0")
    kind = "llama3" if is_llama3 else "sentencepiece"
    return load(f"{kind}:{path}")


class _Generation(records.Record):
    """What import reads of generation_config.json."""

    eos_token_id: int | list[int] | UnsetType | None = UNSET


def _end_ids(folder, settings, default, vocab_size):
    """Ids that end a text: those in generation_config.json, else those in config.json, else the default."""
    path = shards.path_in(folder, "generation_config.json")
    ids, where = settings.eos_token_id, os.path.join(folder, "config.json")
    if os.path.exists(path):
        generation = records.read(_Generation, path, "settings of generation")
        if generation.eos_token_id is not UNSET:
            ids, where = generation.eos_token_id, path
    if ids is None or ids is UNSET:
        ids = default
    if not isinstance(ids, list):
        ids = [ids]
    ids = [i for i in ids if i is not None]
    for i in ids:
        if not 0 <= i < vocab_size:
            raise UserError(f"{where}: eos_token_id: expected ids below vocab_size = {vocab_size}, found {i}")
    return ids
