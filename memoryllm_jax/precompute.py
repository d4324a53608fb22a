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

from memoryllm_jax.common import hosts, legacy
from memoryllm_jax.tol import compress
from memoryllm_jax.tol.compress import precompute

_M_MMAP_THRESHOLD = -3  # of glibc's mallopt


def return_freed_memory() -> None:
    """Keeps glibc from holding on to freed arrays of a few megabytes: at 1b, a gigabyte of them."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def main():
    return_freed_memory()
    hosts.join_hosts()
    f = flags.FLAGS
    line = precompute(f.workdir, f.output, compress.from_flags(), f.step, f.dtype)
    if jax.process_index() == 0:
        print(line)
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "folder with the trained model's checkpoints", required=True)
    flags.DEFINE_string("output", None, "file to write, NAME.safetensors", required=True)
    flags.DEFINE_integer("step", None, "checkpoint to read; by default the newest")
    flags.DEFINE_string("dtype", "", "float32 or bfloat16, of the computation; by default that of the training")
    compress.define_flags()
    hosts.define_multihost_flags()
    legacy.run(main)
