"""Reads a Hugging Face directory into a workdir."""

import dataclasses
import os

import jax
import numpy as np
import safetensors

from memoryllm_jax import config
from memoryllm_jax.checkpoint import store
from memoryllm_jax.checkpoint.trained import parameter_name
from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.progress import Progress
from memoryllm_jax.config import Config, DataConfig
from memoryllm_jax.data.tokenizer import load
from memoryllm_jax.hf import config_json, shards, tensor_names
from memoryllm_jax.hf.export import _KEPT, _OF_THESE_WEIGHTS
from memoryllm_jax.model import flops, sharding, transformer

IMPORTED = "imported"  # data digest of a checkpoint that no data of ours was trained on


def import_(source: str, workdir: str) -> str:
    """Makes a workdir with one checkpoint, of step 0, from a Hugging Face directory.

    Returns: one line on what was read. Raises: UserError that names what the model family cannot express.
    """
    if not os.path.isdir(source):
        raise UserError(f"--import={source}: expected a Hugging Face directory, found none")
    if storage.exists(workdir) and store.Checkpoints(workdir, read_only=True).steps():
        raise UserError(f"--workdir={workdir}: expected a folder without checkpoints")
    path = os.path.join(source, "config.json")
    tree = storage.read_json(path, "a model's settings")
    model, context = config_json.from_json(tree, path)
    found = shards.read(source)
    tensors = {t.name: t for t in tensor_names.tensors(model)}
    layout = _check_tensors(found, tensors, model, source)
    tokenizer = _tokenizer(source, model, tree)
    params = _read_tensors(source, layout, tensors, model)

    config = Config(seq_len=context, model=model, data=DataConfig(path=IMPORTED))
    ours = {"config.json": model.memory_dim > 0, shards.INDEX: layout != found}  # to be written anew
    of_these_weights = [name for name in _OF_THESE_WEIGHTS if not ours.get(name)]
    kinds = {kind for shard in layout for _, kind in shard.tensors}
    description = {
        "config": dataclasses.asdict(config),
        "data": {"digest": IMPORTED},
        "tokenizer": tokenizer.to_json(),
        "source": {
            "shards": [dataclasses.asdict(shard) for shard in layout],
            "dtypes": [name for name, kind in shards.NAMES.items() if {kind} == kinds],
            "dtype": tree.get("dtype") or tree.get("torch_dtype") or "float32",
            "special": {name: tree[name] for name in config_json.SPECIAL if name in tree},
            "files": _texts(source, _KEPT),
            "of_these_weights": _texts(source, of_these_weights),
        },
    }
    saver = store.Checkpoints(workdir)
    try:
        saver.save(0, {"params": params}, description)
        saver.wait()
    finally:
        saver.close()
    counts = flops.parameters(config)
    size = f"{counts['total'] / 1e6:,.1f}M parameters"
    return f"{workdir}: {model.architecture}, {size}, a context of {context} tokens, computes in {model.dtype}"


def _texts(folder, chosen):
    """{name: text} of those files that are there."""
    paths = {name: os.path.join(folder, name) for name in chosen}
    found = {name: storage.read_bytes(path, "text") for name, path in paths.items() if os.path.exists(path)}
    return {name: content.decode(errors="surrogateescape") for name, content in found.items()}


def _check_tensors(layout, tensors, model, source):
    """The layout without buffers that are computed anyway, and copies. Raises: UserError that names a tensor."""
    if model.tie_embeddings:
        _check_copy(layout, source)
    spare = ("rotary_emb.inv_freq", *(["lm_head.weight"] if model.tie_embeddings else []))
    layout = tuple(
        dataclasses.replace(s, tensors=tuple(t for t in s.tensors if not t[0].endswith(spare))) for s in layout
    )
    found = {name: shard.file for shard in layout for name, _ in shard.tensors}
    for name, file in found.items():
        if name not in tensors:
            raise UserError(f"{source}/{file}: tensor {name}: this model family has no place for it")
    for name in tensors:
        if name not in found:
            raise UserError(f"{source}: expected a tensor {name}, found none")
    return layout


def _check_copy(layout, source):
    """Refuses an output head beside a tied embedding that is not the embedding. Raises: UserError."""
    tables = []
    for shard in layout:
        with safetensors.safe_open(os.path.join(source, shard.file), framework="flax") as file:
            held = {"model.embed_tokens.weight", "lm_head.weight"} & {name for name, _ in shard.tensors}
            tables += [np.asarray(file.get_tensor(name)) for name in held]
    if len(tables) == 2 and not np.array_equal(*tables):
        raise UserError(
            f"{source}: tensor lm_head.weight: expected the input embedding, as tie_word_embeddings says, "
            "found other values"
        )


def _read_tensors(source, layout, tensors, model):
    """Our parameters, float32, stacked over the layers."""
    mesh = sharding.make_mesh(config.MeshConfig(1, 1, 1), jax.devices()[:1])
    shapes = transformer.abstract_params(transformer.LanguageModel(model), mesh)
    params = jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), shapes)
    leaves = {parameter_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    progress = Progress("import", len(tensors), "tensor")
    done = 0
    for shard in layout:
        path = os.path.join(source, shard.file)
        with safetensors.safe_open(path, framework="flax") as file:
            for name, _ in shard.tensors:
                t, tensor = tensors[name], np.asarray(file.get_tensor(name))
                if tensor.shape != t.shape:
                    raise UserError(f"{path}: tensor {name}: expected the shape {t.shape}, found {tensor.shape}")
                place = leaves[t.leaf] if t.layer is None else leaves[t.leaf][t.layer]
                place[...] = t.to_ours(tensor, place.shape)
                done += 1
                progress.update(done)
    progress.close()
    return params


def _tokenizer(source, model, tree):
    """tokenizer.json, or else tokenizer.model, of SentencePiece or of Llama 3. Raises: UserError.

    A tokenizer.json tells which id comes before a text; generation_config.json or config.json, which ids end one.
    """
    if os.path.exists(os.path.join(source, "tokenizer.json")):
        tokenizer = load(f"hf:{source}/tokenizer.json")
        path = os.path.join(source, "generation_config.json")
        tree = tree | (storage.read_json(path, "settings of generation") if os.path.exists(path) else {})
        ends = tree.get("eos_token_id")
        ends = ends if isinstance(ends, list) else [tokenizer.eos_id if ends is None else ends]
        tokenizer.name_special(tokenizer.put_before, [i for i in ends if i is not None])
    elif os.path.exists(os.path.join(source, "tokenizer.model")):
        path = os.path.join(source, "tokenizer.model")
        head = storage.read_bytes(path, "a tokenizer")[:9]
        tokenizer = load(f"{'llama3' if head.startswith(b'IQ== 0') else 'sentencepiece'}:{path}")
    else:
        raise UserError(f"{source}: expected tokenizer.json or tokenizer.model, found neither")
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"{source}: vocab_size: expected at least the tokenizer's {tokenizer.vocab_size}, found {model.vocab_size}"
        )
    return tokenizer
