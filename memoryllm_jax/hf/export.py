"""Writes a trained model as a Hugging Face directory."""

import json
import math
import os
import shutil
from importlib import resources

import jax.numpy as jnp

from memoryllm_jax.checkpoint.trained import Digest, TrainedModel
from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.progress import Progress
from memoryllm_jax.data import tokenizer_conversion
from memoryllm_jax.hf import card, config_json, shards, tensor_names

# Kept of an imported directory as they are, and written again by export, also where training went on from it.
_KEPT = (
    *("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json"),
    *("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "NOTICE.txt", "USE_POLICY.md"),
)
_OF_THESE_WEIGHTS = ("config.json", shards.INDEX, "README.md")  # kept as long as nothing was trained or converted


def export(workdir: str, output: str, dtype: str = "", shard_bytes: int = 5 << 30, step: int | None = None) -> str:
    """Writes the newest checkpoint of a workdir, or that of `step`, as a Hugging Face directory.

    Some rows of a tensor are in memory at a time; what was imported keeps its files, names and dtypes.

    Args:
      dtype: float32, bfloat16 or float16; "" is that of the import, else float32.
    Returns: one line on what was written. Raises: UserError.
    """
    if dtype not in ("", *shards.NAMES):
        raise UserError(f"--dtype: expected one of {', '.join(shards.NAMES)}, found {dtype!r}")
    if storage.is_url(output):
        raise UserError(f"--output={output}: expected a local folder, found a URL")
    if os.path.exists(output) and (not os.path.isdir(output) or os.listdir(output)):
        raise UserError(f"--output={output}: expected a folder that is not there yet, or is empty")
    trained = TrainedModel(workdir, step, "float32")
    part = f"{output.rstrip('/')}.part"
    try:
        with storage.user_errors(part, "a place to write to"):
            shutil.rmtree(part, ignore_errors=True)
            os.makedirs(part)
            text = _write(trained, part, dtype, shard_bytes)
            if os.path.isdir(output):
                os.rmdir(output)
            os.replace(part, output)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        trained.close()
    return f"{output}: {text}"


def _write(trained, folder, dtype, shard_bytes):
    c, source = trained.config, trained.description.get("source", {})
    tensors = {t.name: t for t in tensor_names.tensors(c)}
    as_it_was = "shards" in source and dtype in ("", *source["dtypes"])
    if as_it_was:
        layout = tuple(_shard(tree) for tree in source["shards"])
    else:
        sizes = {name: math.prod(t.shape) for name, t in tensors.items()}
        layout = shards.plan(sizes, shards.NAMES[dtype or "float32"], shard_bytes)
    main = dtype or source.get("dtype", "float32")
    special = {"bos_token_id": trained.tokenizer.bos_id, "eos_token_id": trained.tokenizer.eos_id}
    tree = config_json.to_json(c, trained.context, main, source.get("special", special))
    _write_tokenizer(trained, folder, source)
    digest = _write_tensors(trained, shards.Writer(folder, layout, {n: t.shape for n, t in tensors.items()}), tensors)
    if c.memory_dim:
        tree["decoder_digest"] = digest
        code = resources.files("memoryllm_jax.hf").joinpath("modeling_memoryllm.py").read_bytes()
        storage.write_bytes(os.path.join(folder, "modeling_memoryllm.py"), code)
    storage.write_json(os.path.join(folder, "config.json"), tree)
    storage.write_bytes(os.path.join(folder, "README.md"), card.text(trained, main).encode())
    _write_texts(folder, source.get("of_these_weights", {}) if as_it_was else {})
    total = sum(math.prod(t.shape) for t in tensors.values())
    count = "1 file" if len(layout) == 1 else f"{len(layout)} files"
    return f"{c.architecture}, {total / 1e6:,.1f}M parameters as {main} in {count}"


def _write_tensors(trained, writer, tensors):
    """Parameter by parameter, and of each some rows of its tensors at a time. Returns the digest of the decoder."""
    by_leaf: dict[str, list] = {}
    for tensor in tensors.values():
        by_leaf.setdefault(tensor.leaf, []).append(tensor)
    decoder = Digest()
    progress = Progress("export", len(by_leaf), "parameter")
    try:
        for done, leaf in enumerate(trained.names()):
            axis = by_leaf[leaf][0].axis
            for first, block in trained.blocks(leaf, axis):
                for tensor in by_leaf[leaf]:
                    layer = 0 if tensor.layer is None else tensor.layer - first[0]
                    if not 0 <= layer < len(block):
                        continue
                    part = block if tensor.layer is None else block[layer]
                    writer.write(tensor.name, first[axis] * tensor.rows_a_step, tensor.from_ours(part))
                    if not trained.is_memory(leaf):
                        shape, along = trained.shape(leaf), axis
                        shape, along = (shape, 0) if tensor.layer is None else (shape[1:], axis - 1)
                        part = part.astype(jnp.bfloat16)  # JAX holds what it was given until it is called again
                        decoder.add(leaf, tensor.layer or 0, shape, part, along, first[axis])
                del block, part  # before the next one is read
            progress.update(done + 1)
        writer.finish()
    finally:
        writer.close()
        progress.close()
    return decoder.text()


def _write_tokenizer(trained, folder, source):
    content, described = tokenizer_conversion.to_json(trained.tokenizer, trained.context)
    storage.write_bytes(os.path.join(folder, "tokenizer.json"), content)
    ids = {"bos_token_id": trained.tokenizer.bos_id, "eos_token_id": trained.tokenizer.eos_id}
    made = {
        "tokenizer_config.json": described,
        "generation_config.json": {name: i for name, i in ids.items() if i is not None},
    }
    texts = {name: json.dumps(tree, indent=2) + "\n" for name, tree in made.items()}
    _write_texts(folder, texts | source.get("files", {}))


def _write_texts(folder, texts):
    for name, text in texts.items():
        storage.write_bytes(os.path.join(folder, name), text.encode(errors="surrogateescape"))


def _shard(tree):
    return shards.Shard(tree["file"], tuple(tuple(pair) for pair in tree["tensors"]), tree["metadata"])
