"""How steps are compiled: XLA's options, all steps at once, and whether the device has the memory that they need."""

import concurrent.futures
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jaxlib.version

from memoryllm_jax.common import hosts
from memoryllm_jax.common.errors import OutOfMemoryError, UserError
from memoryllm_jax.common.progress import Progress, duration
from memoryllm_jax.config import Config

T = TypeVar("T")

# The end of an error message about memory
NEED_LESS = (
    "to need less, use a larger config.accumulate, config.model.remat=full or more devices; a dry run estimates the "
    "memory"
)

# Options of XLA for GPUs that config.xla=overlap stands for. A layer's weights are then gathered while the layer before
# it computes, and double buffering spares a copy of them in each turn of the loop over layers. What were switches
# are modes from jaxlib 0.11.1 on.
if jaxlib.version.__version_info__ >= (0, 11, 1):
    _OVERLAP = {
        "xla_gpu_pipeline_all_gather": "COLLECTIVE_PIPELINING_MODE_ON",
        "xla_gpu_pipeline_reduce_scatter": "COLLECTIVE_PIPELINING_MODE_ON",
    }
else:
    _OVERLAP = {"xla_gpu_enable_pipelined_all_gather": True, "xla_gpu_enable_pipelined_reduce_scatter": True}
_OVERLAP["xla_gpu_enable_while_loop_double_buffering"] = True


def options(config: Config, platform: str) -> dict[str, bool | str]:
    """The options of XLA that config.xla stands for.

    Args:
      platform: JAX's name of the devices' platform: cpu, gpu or tpu.
    Raises: UserError if the platform does not have them.
    """
    if config.xla == "default":
        return {}
    if platform != "gpu":
        raise UserError(f"config.xla: {config.xla} needs GPUs, found {platform}")
    return _OVERLAP


def sum_options(device: jax.Device, jaxlib_version: tuple[int, ...] = jaxlib.version.__version_info__) -> dict:
    """The options of XLA with which GPUs before Hopper sum float32 in memory by an instruction of their own.

    The positions that share a row of the token memory sum its gradient. jaxlib 0.10.2 to 0.11.0 would make that a loop
    of compare-and-swap on these GPUs, hundreds of times slower (openxla/xla#46225), as the instruction takes numbers
    below 1.2e-38 for zero. With the options all of the step may.
    """
    is_affected = (0, 10, 2) <= jaxlib_version < (0, 11, 1)
    if device.platform != "gpu" or not is_affected:
        return {}
    is_cuda = re.fullmatch(r"\d+\.\d+", device.compute_capability)  # AMD's are names, such as gfx942
    return {"xla_gpu_ftz": True} if is_cuda and float(device.compute_capability) < 9 else {}


def all_at_once(compilers: Sequence[Callable[[], T]]) -> list[T]:
    """Calls functions that compile, each in a thread, as XLA releases Python's lock; shows on stderr how long it takes.

    All are at work at the same time because hosts exchange results of autotuning for each function: hosts that compiled
    different ones would wait for each other.

    Returns: the results, in order.
    Raises: the error of the first one that fails.
    """
    start = time.monotonic()
    # Without a total, as no time left follows from the first of several that are compiled at the same time.
    shown = Progress("compiled", None, f"of {len(compilers)}", enabled=hosts.is_first(), stream=sys.stderr)
    pool = concurrent.futures.ThreadPoolExecutor(len(compilers))
    try:
        left = futures = [pool.submit(compiler) for compiler in compilers]
        while left:
            done, left = concurrent.futures.wait(futures, 1, concurrent.futures.FIRST_EXCEPTION)
            for future in done:
                future.result()
            shown.update(len(done), f"after {duration(time.monotonic() - start)}")
    finally:
        # XLA cannot be interrupted: a run that is stopped or fails must not wait for it here.
        pool.shutdown(wait=False, cancel_futures=True)
        shown.close()
    return [future.result() for future in futures]


def check_fits(executable: jax.stages.Compiled, size: int, device: jax.Device) -> None:
    """Refuses a step that cannot be run. The GPU's compiler does not compare its memory with the device's.

    Raises: OutOfMemoryError.
    """
    available = (device.memory_stats() or {}).get("bytes_limit")  # CPUs have no statistics
    needed = memory_needed(executable)
    if available and needed > available:
        raise OutOfMemoryError(
            f"a step for {size} distinct ids a shard needs {needed / 1e9:.2f} GB of memory a device, and "
            f"{available / 1e9:.2f} GB can be used; {NEED_LESS}"
        )


def memory_needed(executable: jax.stages.Compiled) -> int:
    """Bytes that one device needs to run a compiled function, arguments included."""
    stats = executable.memory_analysis()
    return (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes  # outputs that are stored in donated arguments
        + stats.temp_size_in_bytes
        + stats.generated_code_size_in_bytes
    )
