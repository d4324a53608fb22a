"""Writes a trained model as a Hugging Face directory, and reads one into a workdir.

    python -m memoryllm_jax.export --workdir=DIR --output=HF_DIR [--dtype=bfloat16]
    python -m memoryllm_jax.export --import=HF_DIR --workdir=DIR

base becomes an ordinary Llama. memory and flex-B keep Llama's names and add `model.layers.N.memory.*`; a modeling file
in the directory runs them with AutoModelForCausalLM.from_pretrained(HF_DIR, trust_remote_code=True), with live FFN-M or
with a ToL file (tol="FILE"). --import takes Llama models (safetensors, sharded or not) and what this command wrote. The
workdir then serves evaluate, generate, precompute and export, and training starts from it with configs/start.py.
"""

import dataclasses
import json
import math
import os
import shutil
from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from absl import flags

from memoryllm_jax import checkpoint, cli, files, metrics, sharding
from memoryllm_jax import config as config_lib
from memoryllm_jax import model as model_lib
from memoryllm_jax import tokenizer as tokenizer_lib
from memoryllm_jax.cli import UserError
from memoryllm_jax.hf import card, names, settings, shards
from memoryllm_jax.hf import tokenizer as hf_tokenizer
from memoryllm_jax.saved import Digest, SavedModel, parameter_name
from memoryllm_jax.tol import options

# Kept of an imported directory as they are, and written again by export, also where training went on from it.
_KEPT = (
    *("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json"),
    *("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "NOTICE.txt", "USE_POLICY.md"),
)
_OF_THESE_WEIGHTS = ("config.json", shards.INDEX, "README.md")  # kept as long as nothing was trained or converted
IMPORTED = "imported"  # data digest of a checkpoint that no data of ours was trained on


def export(workdir: str, output: str, dtype: str = "", shard_bytes: int = 5 << 30, step: int | None = None) -> str:
    """Writes the newest checkpoint of a workdir, or that of `step`, as a Hugging Face directory.

    Some rows of a tensor are in memory at a time; what was imported keeps its files, names and dtypes.

    Args:
      dtype: float32, bfloat16 or float16; "" is that of the import, else float32.
    Returns: one line on what was written. Raises: UserError.
    """
    if dtype not in ("", *shards.NAMES):
        raise UserError(f"--dtype: expected one of {', '.join(shards.NAMES)}, found {dtype!r}")
    if files.is_url(output):
        raise UserError(f"--output={output}: expected a local folder, found a URL")
    if os.path.exists(output) and (not os.path.isdir(output) or os.listdir(output)):
        raise UserError(f"--output={output}: expected a folder that is not there yet, or is empty")
    saved = SavedModel(workdir, step, "float32")
    part = f"{output.rstrip('/')}.part"
    try:
        with files.told(part, "a place to write to"):
            shutil.rmtree(part, ignore_errors=True)
            os.makedirs(part)
            text = _write(saved, part, dtype, shard_bytes)
            if os.path.isdir(output):
                os.rmdir(output)
            os.replace(part, output)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        saved.close()
    return f"{output}: {text}"


def _write(saved, folder, dtype, shard_bytes):
    c, source = saved.config, saved.description.get("source", {})
    tensors = {t.name: t for t in names.tensors(c)}
    as_it_was = "shards" in source and dtype in ("", *source["dtypes"])
    if as_it_was:
        layout = tuple(_shard(tree) for tree in source["shards"])
    else:
        sizes = {name: math.prod(t.shape) for name, t in tensors.items()}
        layout = shards.plan(sizes, shards.NAMES[dtype or "float32"], shard_bytes)
    main = dtype or source.get("dtype", "float32")
    special = {"bos_token_id": saved.tokenizer.bos_id, "eos_token_id": saved.tokenizer.eos_id}
    tree = settings.to_json(c, saved.context, main, source.get("special", special))
    _write_tokenizer(saved, folder, source)
    digest = _write_tensors(saved, shards.Writer(folder, layout, {n: t.shape for n, t in tensors.items()}), tensors)
    if c.memory_dim:
        tree["decoder_digest"] = digest
        code = resources.files("memoryllm_jax.hf").joinpath("modeling_memoryllm.py").read_bytes()
        files.write_bytes(os.path.join(folder, "modeling_memoryllm.py"), code)
    files.write_json(os.path.join(folder, "config.json"), tree)
    files.write_bytes(os.path.join(folder, "README.md"), card.text(saved, main).encode())
    _write_texts(folder, source.get("of_these_weights", {}) if as_it_was else {})
    total = sum(math.prod(t.shape) for t in tensors.values())
    count = "1 file" if len(layout) == 1 else f"{len(layout)} files"
    return f"{c.architecture}, {total / 1e6:,.1f}M parameters as {main} in {count}"


def _write_tensors(saved, writer, tensors):
    """Parameter by parameter, and of each some rows of its tensors at a time. Returns the digest of the decoder."""
    by_leaf: dict[str, list] = {}
    for tensor in tensors.values():
        by_leaf.setdefault(tensor.leaf, []).append(tensor)
    decoder = Digest()
    progress = cli.Progress("export", len(by_leaf), "parameter")
    try:
        for done, leaf in enumerate(saved.names()):
            axis = by_leaf[leaf][0].axis
            for first, block in saved.blocks(leaf, axis):
                for tensor in by_leaf[leaf]:
                    layer = 0 if tensor.layer is None else tensor.layer - first[0]
                    if not 0 <= layer < len(block):
                        continue
                    part = block if tensor.layer is None else block[layer]
                    writer.write(tensor.name, first[axis] * tensor.rows_a_step, tensor.from_ours(part))
                    if not saved.is_memory(leaf):
                        shape, along = saved.shape(leaf), axis
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


def _write_tokenizer(saved, folder, source):
    content, described = hf_tokenizer.to_json(saved.tokenizer, saved.context)
    files.write_bytes(os.path.join(folder, "tokenizer.json"), content)
    ids = {"bos_token_id": saved.tokenizer.bos_id, "eos_token_id": saved.tokenizer.eos_id}
    made = {
        "tokenizer_config.json": described,
        "generation_config.json": {name: i for name, i in ids.items() if i is not None},
    }
    texts = {name: json.dumps(tree, indent=2) + "\n" for name, tree in made.items()}
    _write_texts(folder, texts | source.get("files", {}))


def _write_texts(folder, texts):
    for name, text in texts.items():
        files.write_bytes(os.path.join(folder, name), text.encode(errors="surrogateescape"))


def import_(source: str, workdir: str) -> str:
    """Makes a workdir with one checkpoint, of step 0, from a Hugging Face directory.

    Returns: one line on what was read. Raises: UserError that names what the model family cannot express.
    """
    if not os.path.isdir(source):
        raise UserError(f"--import={source}: expected a Hugging Face directory, found none")
    if files.exists(workdir) and checkpoint.Checkpoints(workdir, read_only=True).steps():
        raise UserError(f"--workdir={workdir}: expected a folder without checkpoints")
    path = os.path.join(source, "config.json")
    tree = files.read_json(path, "a model's settings")
    model, context = settings.from_json(tree, path)
    found = shards.read(source)
    tensors = {t.name: t for t in names.tensors(model)}
    layout = _check_tensors(found, tensors, model, source)
    tokenizer = _tokenizer(source, model, tree)
    params = _read_tensors(source, layout, tensors, model)

    config = config_lib.Config(seq_len=context, model=model, data=config_lib.DataConfig(path=IMPORTED))
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
            "special": {name: tree[name] for name in settings.SPECIAL if name in tree},
            "files": _texts(source, _KEPT),
            "of_these_weights": _texts(source, of_these_weights),
        },
    }
    saver = checkpoint.Checkpoints(workdir)
    try:
        saver.save(0, {"params": params}, description)
        saver.wait()
    finally:
        saver.close()
    counts = metrics.parameters(config)
    size = f"{counts['total'] / 1e6:,.1f}M parameters"
    return f"{workdir}: {model.architecture}, {size}, a context of {context} tokens, computes in {model.dtype}"


def _texts(folder, chosen):
    """{name: text} of those files that are there."""
    paths = {name: os.path.join(folder, name) for name in chosen}
    found = {name: files.read_bytes(path, "text") for name, path in paths.items() if os.path.exists(path)}
    return {name: content.decode(errors="surrogateescape") for name, content in found.items()}


def _shard(tree):
    return shards.Shard(tree["file"], tuple(tuple(pair) for pair in tree["tensors"]), tree["metadata"])


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
    mesh = sharding.make_mesh(config_lib.MeshConfig(1, 1, 1), jax.devices()[:1])
    shapes = model_lib.abstract_params(model_lib.LanguageModel(model), mesh)
    params = jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), shapes)
    leaves = {parameter_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    progress = cli.Progress("import", len(tensors), "tensor")
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
        tokenizer = tokenizer_lib.load(f"hf:{source}/tokenizer.json")
        path = os.path.join(source, "generation_config.json")
        tree = tree | (files.read_json(path, "settings of generation") if os.path.exists(path) else {})
        ends = tree.get("eos_token_id")
        ends = ends if isinstance(ends, list) else [tokenizer.eos_id if ends is None else ends]
        tokenizer.name_special(tokenizer.put_before, [i for i in ends if i is not None])
    elif os.path.exists(os.path.join(source, "tokenizer.model")):
        path = os.path.join(source, "tokenizer.model")
        head = files.read_bytes(path, "a tokenizer")[:9]
        tokenizer = tokenizer_lib.load(f"{'llama3' if head.startswith(b'IQ== 0') else 'sentencepiece'}:{path}")
    else:
        raise UserError(f"{source}: expected tokenizer.json or tokenizer.model, found neither")
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"{source}: vocab_size: expected at least the tokenizer's {tokenizer.vocab_size}, found {model.vocab_size}"
        )
    return tokenizer


def main():
    f = flags.FLAGS
    if bool(f["import"].value) == bool(f.output):
        raise UserError("expected --output=HF_DIR to write, or --import=HF_DIR to read, and not both")
    if f["import"].value:
        print(import_(f["import"].value, f.workdir))
    else:
        print(export(f.workdir, f.output, f.dtype, options.size(f.shard_size, "shard_size"), f.step))
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "folder with checkpoints; with --import, made", required=True)
    flags.DEFINE_string("output", "", "Hugging Face directory to write")
    flags.DEFINE_string("import", "", "Hugging Face directory to read")
    flags.DEFINE_string("dtype", "", "float32, bfloat16 or float16; by default that of the import, else float32")
    flags.DEFINE_string("shard_size", "5GB", "largest size of a safetensors file")
    flags.DEFINE_integer("step", None, "checkpoint to export; by default the newest")
    cli.run(main)
