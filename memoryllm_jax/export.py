"""Writes a trained model as a Hugging Face directory, and reads one into a workdir.

    python -m memoryllm_jax.export --workdir=DIR --output=HF_DIR [--dtype=bfloat16]
    python -m memoryllm_jax.export --import=HF_DIR --workdir=DIR

base becomes an ordinary Llama. memory and flex-B keep Llama's names and add `model.layers.N.memory.*`; a modeling file
in the directory runs them with AutoModelForCausalLM.from_pretrained(HF_DIR, trust_remote_code=True), with live FFN-M or
with a ToL file (tol="FILE"). --import takes Llama models (safetensors, sharded or not) and what this command wrote. The
workdir then serves evaluate, generate, precompute and export, and training starts from it with configs/start.py.
"""

from absl import flags

from memoryllm_jax.common import legacy
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.hf.export import export
from memoryllm_jax.hf.import_ import import_


def main():
    f = flags.FLAGS
    if bool(f["import"].value) == bool(f.output):
        raise UserError("expected --output=HF_DIR to write, or --import=HF_DIR to read, and not both")
    if f["import"].value:
        print(import_(f["import"].value, f.workdir))
    else:
        print(export(f.workdir, f.output, f.dtype, legacy.size(f.shard_size, "shard_size"), f.step))
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "folder with checkpoints; with --import, made", required=True)
    flags.DEFINE_string("output", "", "Hugging Face directory to write")
    flags.DEFINE_string("import", "", "Hugging Face directory to read")
    flags.DEFINE_string("dtype", "", "float32, bfloat16 or float16; by default that of the import, else float32")
    flags.DEFINE_string("shard_size", "5GB", "largest size of a safetensors file")
    flags.DEFINE_integer("step", None, "checkpoint to export; by default the newest")
    legacy.run(main)
