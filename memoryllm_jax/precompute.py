"""Precomputes the token memory of a trained model: one ToL file with the rows of every token.

    python -m memoryllm_jax.precompute --workdir=DIR --output=tol.safetensors
    python -m memoryllm_jax.precompute --workdir=DIR --output=tol.safetensors --bits=4 --data=DATA
    python -m memoryllm_jax.precompute --workdir=DIR --output=tol.safetensors --bytes_per_token=12KiB --data=DATA

Runs on all devices of this machine. Stop it at any time and run the same line again: it continues where it stopped. The
file gets its name only when it is complete.
"""

import contextlib
import ctypes
from typing import Annotated

from memoryllm_jax.common import cli
from memoryllm_jax.common.options import Option
from memoryllm_jax.tol import compress

_M_MMAP_THRESHOLD = -3  # number of this setting in glibc's malloc.h


def main(
    workdir: Annotated[str, Option("folder with the trained model's checkpoints")],
    output: Annotated[str, Option("file to write, NAME.safetensors", writes=True)],
    choices: compress.Options,
    step: Annotated[int | None, Option("checkpoint to read; by default the newest")] = None,
    dtype: Annotated[str, Option("float32 or bfloat16, for the computation; by default that of the training")] = "",
) -> None:
    return_freed_memory()
    print(compress.precompute(workdir, output, choices, step, dtype))


def return_freed_memory() -> None:
    """Makes glibc return freed arrays of some megabytes to the system. At 1b it would keep about a gigabyte of them."""
    # By default glibc raises this threshold when large arrays are freed, and later keeps such arrays for itself. A
    # threshold that was set stays. Other C libraries lack mallopt, and are left as they are.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


if __name__ == "__main__":
    cli.run(main)
