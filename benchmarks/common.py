"""What the benchmarks' records share: the command, the versions, the machine, ratios and memory."""

import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "numpy",
    "xxhash",
    "torch",
    "transformers",
    "litgpt",
    "keras",
    "keras-hub",
    "lm_eval",
)
# Paths of this machine do not belong in a committed record.
_PATH_FLAGS = re.compile(r"^(--(?:\w*data|hf|\w*workdir|tol|base|output|scratch|work))=.*")


def facts() -> dict:
    """The command, machine, versions and commit of this measurement."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    installed = {d.name.lower(): d.version for d in importlib.metadata.distributions()}
    return {
        "command": "python " + " ".join(_PATH_FLAGS.sub(r"\1=PATH", a) for a in sys.argv),
        "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "python": platform.python_version(),
        "versions": {p: installed[p] for p in PACKAGES if p in installed},
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
    }


def write(path: str, results: dict, more: dict) -> None:
    """Writes the record as JSON, if a path is given."""
    if path:
        with open(path, "w") as file:
            file.write(json.dumps(facts() | more | {"results": results}, indent=1) + "\n")


def ratio(of: list[float], by: list[float]) -> dict:
    """Median, minimum and maximum of the ratios `of` / `by`, each within one round."""
    values = sorted(a / b for a, b in zip(of, by))
    return {"median": statistics.median(values), "min": values[0], "max": values[-1]}


def peak_memory(device=None) -> int:
    """Peak memory in bytes: that of the device if its statistics have it, else that of this process."""
    stats = device and device.memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
