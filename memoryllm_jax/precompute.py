"""Precomputes the token memory of a trained model: every token's rows of all layers in one ToL file.

    python -m memoryllm_jax.precompute --workdir=DIR --output=tol.safetensors
    python -m memoryllm_jax.precompute --workdir=DIR --output=tol.safetensors --bits=4 --data=DATA
    python -m memoryllm_jax.precompute --workdir=DIR --output=tol.safetensors --bytes_per_token=12KiB --data=DATA

Runs on all devices, and on several hosts with --multihost, where --output must be on a disk that all of them share.
Kill it at any time and run the same line again: it goes on. The file appears under its name only when it is whole.
"""

import contextlib
import ctypes

import jax
from absl import flags

from memoryllm_jax import cli, config, sharding
from memoryllm_jax.cli import UserError
from memoryllm_jax.saved import SavedModel
from memoryllm_jax.tol import build, options, quality

_M_MMAP_THRESHOLD = -3  # of glibc's mallopt


def precompute(workdir: str, output: str, choices: options.Options, step: int | None = None, dtype: str = "") -> str:
    """Writes the file. Returns: one line on it. Raises: UserError."""
    mesh = sharding.make_mesh(config.MeshConfig(1, -1, 1))
    saved = SavedModel(workdir, step, dtype, mesh)
    if not saved.config.memory_dim:
        raise UserError(f"{workdir}: expected a memory or flex model, found {saved.config.architecture}, without FFN-M")
    if saved.config.dim % mesh.size:
        raise UserError(f"{workdir}: expected a number of devices that divides the width {saved.config.dim}")
    budget = choices.bytes_per_token or choices.total_size
    scorer = quality.scorer(saved, choices.data) if budget and choices.data else None
    return options.write(build.LiveSource(saved), choices, output, scorer)


def return_freed_memory() -> None:
    """Keeps glibc from holding on to freed arrays of a few megabytes: at 1b, a gigabyte of them."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def main():
    return_freed_memory()
    cli.join_hosts()
    f = flags.FLAGS
    line = precompute(f.workdir, f.output, options.from_flags(), f.step, f.dtype)
    if jax.process_index() == 0:
        print(line)
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "folder with the trained model's checkpoints", required=True)
    flags.DEFINE_string("output", None, "file to write, NAME.safetensors", required=True)
    flags.DEFINE_integer("step", None, "checkpoint to read; by default the newest")
    flags.DEFINE_string("dtype", "", "float32 or bfloat16, of the computation; by default that of the training")
    options.define_flags()
    cli.define_multihost_flags()
    cli.run(main)
