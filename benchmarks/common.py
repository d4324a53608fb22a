"""What the benchmarks' records share: the command, the versions, the machine, ratios and memory."""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from memoryllm_jax.common import provenance, storage
from memoryllm_jax.common.errors import UserError

PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "nvidia-cudnn-cu13",
    "flax",
    "optax",
    "numpy",
    "xxhash",
    "torch",
    "triton",
    "transformers",
    "litgpt",
    "keras",
    "keras-hub",
    "lm_eval",
    "openai",
    "starlette",
    "uvicorn",
)
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHORT_RUN = {  # config fields of runs of some million tokens whose held-out losses are compared
    "batch_size": 8,
    "seq_len": 256,
    "sample.tokens": 0,
    "checkpoint.every": 1000,
    "eval.every": 1_000_000,  # at the end only
    "eval.batches": 64,
    "log.every": 100,
    "log.tensorboard": False,
}
STEP_TOKENS = SHORT_RUN["batch_size"] * SHORT_RUN["seq_len"]
# Paths of this machine do not belong in a committed record.
_PATH_FLAGS = re.compile(
    r"^(--(?:\w*data|english|hf|\w*workdir|tol|base|before|other|out|output|scratch|work|texts|comparison))=.*"
)


def facts() -> dict:
    """The command, machine, versions and commit of this measurement."""
    installed = {d.name.lower(): d.version for d in importlib.metadata.distributions() if d.name}
    return {
        "command": " ".join(["python", _script(), *(_PATH_FLAGS.sub(r"\1=PATH", a) for a in sys.argv[1:])]),
        "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "python": platform.python_version(),
        "versions": {p: installed[p] for p in PACKAGES if p in installed},
        "commit": provenance.commit(),
    } | gpu_facts()


def _script() -> str:
    """Path of the script that runs, in the project's folder."""
    path = os.path.abspath(sys.argv[0])
    return os.path.relpath(path, ROOT) if path.startswith(f"{ROOT}/") else os.path.basename(path)


def gpu_facts() -> dict[str, str]:
    """Name, memory and driver of each GPU, as the driver reports them; {} without one. Does not start JAX."""
    found = _printed_by("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    return {"gpu": found} if found else {}


def _printed_by(program: str, *arguments: str) -> str:
    """What a program prints; "" if it is not installed or fails."""
    if shutil.which(program) is None:
        return ""
    done = subprocess.run([program, *arguments], capture_output=True, text=True)
    return "" if done.returncode else done.stdout.strip()


def write(path: str, results: dict, more: dict) -> None:
    """Writes the record as JSON, if a path is given. A process that is killed meanwhile leaves the record before."""
    if path:
        storage.write_json(path, facts() | more | {"results": results})


def train(folder: str, config: str, fields: dict) -> dict:
    """Trains in a folder, or goes on with the run there. A finished run is only read.

    The output of `train` goes to FOLDER.log.

    Args:
      config: a file of configs/ with its argument, such as "tiny.py:base".
      fields: fields of the config, such as {"model.dim": 64}.
    Returns: the run's result.json.
    Raises: UserError if training fails, or the folder holds a run of another config or other fields.
    """
    asked = {"config": config} | {name: str(value) for name, value in fields.items()}
    asked_path = os.path.join(folder, "asked.json")
    os.makedirs(folder, exist_ok=True)
    if not os.path.exists(asked_path):
        storage.write_json(asked_path, asked)
    found = _read(asked_path)
    for name in sorted(asked.keys() | found.keys()):
        if asked.get(name) != found.get(name):
            raise UserError(f"{asked_path}: {name}: expected {asked.get(name)} of this run, found {found.get(name)}")
    if not os.path.exists(os.path.join(folder, "result.json")):
        command = [sys.executable, "-m", "memoryllm_jax.train", f"--config={ROOT}/configs/{config}"]
        command += [f"--workdir={folder}", *(f"--config.{name}={value}" for name, value in fields.items())]
        with open(f"{folder}.log", "a") as log:
            code = subprocess.run(command, env=os.environ | {"PYTHONPATH": ROOT}, stdout=log, stderr=log).returncode
        if code:
            raise UserError(f"{folder}.log: expected exit code 0 of the training, found {code}")
    return result(folder)


def result(folder: str) -> dict:
    """The result.json of a finished run."""
    return _read(os.path.join(folder, "result.json"))


def best_rate(losses: dict[float, float]) -> dict:
    """The peak rate with the lowest of these losses, and whether it is the lowest or the highest that was tried."""
    best = min(losses, key=losses.get)
    return {"best": best, "is_at_edge": best in (min(losses), max(losses)), "losses": losses}


def _read(path: str) -> dict:
    return json.loads(storage.read_bytes(path, "JSON"))


def seconds(run: Callable[[], object], count: int) -> dict[str, float]:
    """Seconds of a call by the clock, and of all processors, divided by `count`. The call must wait for its results."""
    clock, processors = time.perf_counter(), time.process_time()
    run()
    clock, processors = time.perf_counter() - clock, time.process_time() - processors
    return {"seconds": clock / count, "processor_seconds": processors / count}


def spread(values: list[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(of: list[float], by: list[float]) -> dict[str, float]:
    """Median, minimum and maximum of the ratios `of` / `by`, each within one round."""
    return spread([a / b for a, b in zip(of, by)])


def peak_memory(device=None) -> int:
    """Peak memory in bytes: that of the device if its statistics have it, else that of this process."""
    stats = device and device.memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def bandwidth(size: int = 0) -> float:
    """Memory bandwidth of JAX's device in bytes a second: the fastest of several sums over a large array.

    Args:
      size: bytes of the array, which must not fit a cache; 0: 1 GiB on a CPU and 4 GiB elsewhere.
    """
    import jax
    import jax.numpy as jnp

    size = size or (1 << (30 if jax.default_backend() == "cpu" else 32))
    x = jnp.ones(size // 4, jnp.float32)
    add = jax.jit(jnp.sum)
    add(x).block_until_ready()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        add(x).block_until_ready()
        times.append(time.perf_counter() - start)
    return x.nbytes / min(times)
