"""Writes a trained model as a Hugging Face directory, and reads one into a workdir.

    python -m memoryllm_jax.export --workdir=DIR --output=HF_DIR [--dtype=bfloat16]
    python -m memoryllm_jax.export --import=HF_DIR --workdir=DIR

A base model becomes an ordinary Llama, or a Qwen3 if it has qk_norm. memory and flex-B keep Llama's tensor names and
add `model.layers.N.memory.*`. The directory then holds modeling files, so that transformers loads it with
AutoModelForCausalLM.from_pretrained(HF_DIR, trust_remote_code=True), and with tol="FILE" from a ToL file.

--import reads Llama and Qwen3 models in safetensors files, and directories that this command wrote. evaluate, generate,
precompute and export then take the workdir, and training can start from it with configs/start.py.
"""

from typing import Annotated

from memoryllm_jax.common import cli, options
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.options import Option
from memoryllm_jax.hf.export import export_model
from memoryllm_jax.hf.import_ import import_model


def main(
    workdir: Annotated[str, Option("folder with checkpoints; --import writes it")],
    output: Annotated[str, Option("Hugging Face directory to write")] = "",
    import_: Annotated[str, Option("Hugging Face directory to read")] = "",
    dtype: Annotated[str, Option("float32, bfloat16 or float16; by default the imported model's, else float32")] = "",
    shard_size: Annotated[str, Option("largest size of a safetensors file")] = "5GB",
    step: Annotated[int | None, Option("checkpoint to export; by default the newest")] = None,
) -> None:
    if bool(import_) == bool(output):
        found = "both" if output else "neither"
        raise UserError(f"expected --output=HF_DIR to write, or --import=HF_DIR to read, found {found}")
    if import_:
        print(import_model(import_, workdir))
    else:
        print(export_model(workdir, output, dtype, options.size(shard_size, "shard_size"), step))


if __name__ == "__main__":
    cli.run(main)
