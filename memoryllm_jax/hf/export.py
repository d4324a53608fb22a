"""Writes a trained model as a Hugging Face directory."""

import contextlib
import json
import math
import os
from importlib import resources

import numpy as np

from memoryllm_jax.checkpoint.trained import Digest, TrainedModel, parts
from memoryllm_jax.common import records, storage
from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.common.progress import Progress
from memoryllm_jax.data import tokenizer_conversion
from memoryllm_jax.hf import card, config_json, shards, tensor_names
from memoryllm_jax.hf import source as source_lib

FILE_BYTES = 5 * 10**9  # largest safetensors file, as in transformers before 5
_CODE = ("modeling_memoryllm.py", "modeling_digest.py", "modeling_tol.py")  # of memory and flex models


def export_model(
    workdir: str, output: str, dtype: str = "", file_bytes: int = FILE_BYTES, step: int | None = None
) -> str:
    """Writes a checkpoint as a Hugging Face directory.

    Safetensors files are written one after another: the host holds the tensors of one file and, beside them, one
    parameter in float32, stacked over the layers. Before that, the digests of a memory or flex model need two copies of
    the decoder's largest parameter. An imported model keeps its dtype, its special token ids and the files that
    `import_model` kept.

    Args:
      workdir: folder of the checkpoints.
      output: local folder to write, which is missing or empty.
      dtype: float32, bfloat16 or float16; "" is the dtype of an imported model, and float32 for any other.
      file_bytes: largest size of a safetensors file.
      step: the checkpoint's step; None is the newest.
    Returns: one line that says what was written.
    Raises: ArgumentError that names a bad argument; UserError for a model that cannot be exported.
    """
    if dtype not in ("", *shards.DTYPES):
        raise ArgumentError("dtype", f"expected one of {', '.join(shards.DTYPES)}, found {dtype!r}")
    if storage.is_url(output):
        raise ArgumentError("output", f"expected a local folder, found the URL {output}")
    if os.path.exists(output) and (not os.path.isdir(output) or os.listdir(output)):
        raise ArgumentError("output", f"expected a folder that does not exist yet or is empty, found {output}")
    path = output.rstrip("/")
    with contextlib.closing(TrainedModel(workdir, step, "float32")) as trained:
        lock = _claim(f"{path}.part")
        with contextlib.closing(lock), storage.replaced(path) as part:
            text = _write(trained, part, dtype, file_bytes)
            storage.discard_lock(lock, part)
    return f"{output}: {text}"


def _claim(part):
    """Makes and locks the folder that an export fills before it is renamed; empties one that a killed export left.

    Returns: the lock. Raises: UserError if another export fills the folder, or if something else is there.
    """
    found = storage.names(part)
    if os.path.islink(part) or (found and ".lock" not in found):
        raise ArgumentError("output", f"expected nothing at {part}, where export writes first, found a file or folder")
    lock = storage.lock_folder(part)
    for name in storage.names(part) - {".lock"}:
        os.remove(os.path.join(part, name))
    return lock


def _write(trained, folder, dtype, file_bytes):
    """Writes all files of the directory. Returns: a text about model, files and tokenizer."""
    source = source_lib.of(trained.description.source, trained.workdir)
    imported_dtype = _dtype_of(source)
    dtype = dtype or imported_dtype
    tensors = tensor_names.tensors(trained.config)
    sizes = {name: math.prod(t.shape) * shards.DTYPES[dtype].itemsize for name, t in tensors.items()}
    files = shards.plan(sizes, file_bytes)

    # The weights take longest, so the steps that may refuse the model come first.
    settings = _settings(trained, dtype, source)
    about_tokenizer = _write_tokenizer(trained, folder, source)
    if trained.config.memory_dim:
        # The digests come before the weights, as the allocator may not yet have returned their last file's memory.
        settings["float16_digests"] = _float16_digests(trained, dtype)
        for file in _CODE:
            content = resources.files("memoryllm_jax.hf").joinpath(file).read_bytes()
            storage.write_bytes(os.path.join(folder, file), content)
    storage.write_json(os.path.join(folder, "config.json"), settings)
    _write_weights(trained, folder, files, tensors, dtype)
    if len(files) > 1:
        shards.write_index(folder, files, sum(sizes.values()))
    storage.write_bytes(os.path.join(folder, "README.md"), card.text(trained, dtype).encode())
    if dtype == imported_dtype:
        # The weights are those of the import, so its config.json and model card still describe them.
        about_weights = source.of_these_weights
        # Imports made by earlier versions also hold the index of the original files, which export names differently.
        source_lib.write_texts(folder, {name: text for name, text in about_weights.items() if name != shards.INDEX})

    parameters = sum(math.prod(t.shape) for t in tensors.values())
    count = "1 file" if len(files) == 1 else f"{len(files)} files"
    return (
        f"{trained.config.architecture}, {parameters / 1e6:,.1f}M parameters as {dtype} in {count}; {about_tokenizer}"
    )


def _dtype_of(source):
    """The dtype that holds every imported tensor exactly; float32 for a model that was trained here."""
    return source.dtypes[0] if len(source.dtypes) == 1 else "float32"


def _settings(trained, dtype, source):
    """The settings for config.json. Special token ids are those of the import, else the tokenizer's."""
    special = _special_ids(trained.tokenizer) if source.special is None else source.special
    return config_json.to_json(trained.config, trained.context, dtype, special)


def _special_ids(tokenizer):
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}


def _float16_digests(trained, dtype):
    """{digest of the decoder's weights as float16: their digest}, by which the modeling code recognises ToL files.

    The digest rounds float32 and bfloat16 weights alike, so that the modeling code can compute it from either. From
    float16 it cannot: values that were rounded to float16 first may then round to another bfloat16.

    Args:
      dtype: of the exported weights.
    """
    exact, rounded = Digest(), Digest()
    for name in trained.names():
        if not trained.is_memory(name):
            value = trained.leaf_on_host(name)
            with np.errstate(over="ignore"):  # no warning: transformers gives the same infinities
                in_float16 = value.astype(shards.DTYPES[dtype], copy=False).astype(np.float16, copy=False)
            for digest, leaf in ((exact, value), (rounded, in_float16)):
                digest.add(name, parts(name, leaf))
            del value, in_float16, leaf  # frees the parameter before the next one is read
    return {rounded.text(): exact.text()}


def _write_weights(trained, folder, files, tensors, dtype):
    """Writes the safetensors files.

    A parameter holds all layers, stacked, while a file holds the tensors of some layers. So for each file, the
    parameters with a part in it are read again, one at a time, and the file's tensors are copied out of them.

    Args:
      files: {file name: names of its tensors}.
      tensors: {name: Tensor} of the whole model.
    """
    done = 0
    with contextlib.closing(Progress("export", len(tensors), "tensor")) as progress:
        for file, names in files.items():
            content = {}
            for leaf, members in _by_leaf(tensors[name] for name in names).items():
                stacked = trained.leaf_on_host(leaf)
                for tensor in members:
                    value = stacked if tensor.layer is None else stacked[tensor.layer]
                    # A copy, so that no view keeps the stacked parameter in memory.
                    content[tensor.name] = shards.convert(tensor.name, tensor.from_ours(value), dtype)
                del stacked, value  # frees the parameter before the next one is read
                done += len(members)
                progress.update(done)
            shards.write(os.path.join(folder, file), content)
            del content  # frees the file's tensors before those of the next file are read


def _by_leaf(tensors):
    """{name of our parameter: its Tensors among these}."""
    out: dict[str, list[tensor_names.Tensor]] = {}
    for tensor in tensors:
        out.setdefault(tensor.leaf, []).append(tensor)
    return out


def _write_tokenizer(trained, folder, source):
    """Writes the tokenizer's files and generation_config.json; files kept from an import replace ours.

    Returns: a clause that says how exact the tokenizer's file is.
    """
    converted = tokenizer_conversion.to_files(trained.tokenizer, trained.context)
    storage.write_bytes(os.path.join(folder, converted.name), converted.content)
    ids = _special_ids(trained.tokenizer)
    ours = {
        "tokenizer_config.json": converted.settings,
        "generation_config.json": {name: i for name, i in ids.items() if i is not None},
    }
    texts = {name: json.dumps(tree, indent=2) + "\n" for name, tree in ours.items()} | source.files
    if "tokenizer_config.json" in source.files:
        tree = records.parse(dict, source.files["tokenizer_config.json"], f"{trained.workdir}: tokenizer_config.json")
        # Its class stays if this is the import's own tokenizer.json, and transformers knows a class for it. It knows
        # none for memory and flex models, and code that the import brought along is not exported.
        if trained.tokenizer.kind != "hf" or trained.config.memory_dim or "auto_map" in tree:
            kept = {name: value for name, value in tree.items() if name not in tokenizer_conversion.CHANGE_IDS}
            texts["tokenizer_config.json"] = json.dumps(kept | converted.settings, indent=2) + "\n"
    source_lib.write_texts(folder, texts)
    return converted.note
