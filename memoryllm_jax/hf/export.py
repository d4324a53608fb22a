"""Writes a trained model as a Hugging Face directory."""

import contextlib
import json
import math
import os
import shutil
from importlib import resources

from memoryllm_jax.checkpoint.trained import TrainedModel
from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.common.progress import Progress
from memoryllm_jax.data import tokenizer_conversion
from memoryllm_jax.hf import card, config_json, shards, tensor_names

FILE_BYTES = 5 * 10**9  # largest safetensors file, as in transformers before 5


def export_model(
    workdir: str, output: str, dtype: str = "", file_bytes: int = FILE_BYTES, step: int | None = None
) -> str:
    """Writes a workdir's newest checkpoint, or that of `step`, as a Hugging Face directory.

    Files are written one after another. The host holds the tensors of one file, and beside them one parameter at a
    time, stacked over the layers, in float32; before that, two copies of the largest parameter of the decoder. An
    imported model keeps its dtype, its special token ids and the files that import_ lists.

    Args:
      output: local folder, missing or empty.
      dtype: float32, bfloat16 or float16; "" takes that of the import, else float32.
      file_bytes: largest size of a safetensors file.
    Returns: one line that says what was written.
    Raises: UserError.
    """
    if dtype not in ("", *shards.DTYPES):
        raise ArgumentError("dtype", f"expected one of {', '.join(shards.DTYPES)}, found {dtype!r}")
    if storage.is_url(output):
        raise ArgumentError("output", f"expected a local folder, found the URL {output}")
    if os.path.exists(output) and (not os.path.isdir(output) or os.listdir(output)):
        raise ArgumentError("output", f"expected a folder that does not exist yet or is empty, found {output}")
    trained = TrainedModel(workdir, step, "float32")
    try:
        with storage.replaced(output.rstrip("/")) as part:
            shutil.rmtree(part, ignore_errors=True)  # of an export that was killed
            os.makedirs(part)
            text = _write(trained, part, dtype, file_bytes)
    finally:
        trained.close()
    return f"{output}: {text}"


def _write(trained, folder, dtype, file_bytes):
    source = trained.description.get("source", {})  # what import_ kept of a Hugging Face directory
    stored = _dtype_of(source)
    dtype = dtype or stored
    tensors = tensor_names.tensors(trained.config)
    sizes = {name: math.prod(t.shape) * shards.DTYPES[dtype].itemsize for name, t in tensors.items()}
    files = shards.plan(sizes, file_bytes)

    # First what may refuse the model, as the weights take longest.
    settings = _settings(trained, dtype, source)
    _write_tokenizer(trained, folder, source)
    if trained.config.memory_dim:
        # Before the weights: the allocator may keep the memory of their last file.
        settings["decoder_digest"] = trained.digest(lambda name: not trained.is_memory(name))
        code = resources.files("memoryllm_jax.hf").joinpath("modeling_memoryllm.py").read_bytes()
        storage.write_bytes(os.path.join(folder, "modeling_memoryllm.py"), code)
    storage.write_json(os.path.join(folder, "config.json"), settings)
    _write_weights(trained, folder, files, tensors, dtype)
    if len(files) > 1:
        shards.write_index(folder, files, sum(sizes.values()))
    storage.write_bytes(os.path.join(folder, "README.md"), card.text(trained, dtype).encode())
    if dtype == stored:
        about_weights = source.get("of_these_weights", {})
        # Imports of earlier versions hold the index of the files that were imported.
        _write_texts(folder, {name: text for name, text in about_weights.items() if name != shards.INDEX})

    parameters = sum(math.prod(t.shape) for t in tensors.values())
    count = "1 file" if len(files) == 1 else f"{len(files)} files"
    return f"{trained.config.architecture}, {parameters / 1e6:,.1f}M parameters as {dtype} in {count}"


def _dtype_of(source):
    """The dtype that holds every imported tensor exactly; float32 for a model that was trained here."""
    dtypes = source.get("dtypes", [])
    return dtypes[0] if len(dtypes) == 1 else "float32"


def _settings(trained, dtype, source):
    special = {"bos_token_id": trained.tokenizer.bos_id, "eos_token_id": trained.tokenizer.eos_id}
    return config_json.to_json(trained.config, trained.context, dtype, source.get("special", special))


def _write_weights(trained, folder, files, tensors, dtype):
    """Writes the safetensors files.

    A parameter of the layers is stacked over them, and a file has the tensors of some layers. So each file reads all
    parameters that it has a part of, one at a time, and copies its tensors out of them.
    """
    done = 0
    with contextlib.closing(Progress("export", len(tensors), "tensor")) as progress:
        for file, names in files.items():
            content = {}
            for leaf, members in _by_leaf(tensors[name] for name in names).items():
                stacked = trained.leaf_on_host(leaf)
                for tensor in members:
                    value = stacked if tensor.layer is None else stacked[tensor.layer]
                    content[tensor.name] = shards.convert(tensor.name, tensor.from_ours(value), dtype)
                del stacked, value  # frees the parameter before the next one is read
                done += len(members)
                progress.update(done)
            shards.write(os.path.join(folder, file), content)
            del content  # likewise


def _by_leaf(tensors):
    out: dict[str, list[tensor_names.Tensor]] = {}
    for tensor in tensors:
        out.setdefault(tensor.leaf, []).append(tensor)
    return out


def _write_tokenizer(trained, folder, source):
    content, settings = tokenizer_conversion.to_json(trained.tokenizer, trained.context)
    storage.write_bytes(os.path.join(folder, "tokenizer.json"), content)
    ids = {"bos_token_id": trained.tokenizer.bos_id, "eos_token_id": trained.tokenizer.eos_id}
    ours = {
        "tokenizer_config.json": settings,
        "generation_config.json": {name: i for name, i in ids.items() if i is not None},
    }
    texts = {name: json.dumps(tree, indent=2) + "\n" for name, tree in ours.items()}
    _write_texts(folder, texts | source.get("files", {}))


def _write_texts(folder, texts):
    for name, text in texts.items():
        # import_ keeps bytes that are not UTF-8, such as those of an old licence, as surrogates.
        storage.write_bytes(os.path.join(folder, name), text.encode(errors="surrogateescape"))
