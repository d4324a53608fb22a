"""What the benchmarks' records share: the command, the versions and the machine."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys

PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "numpy", "xxhash")
_PATH_FLAGS = re.compile(r"^(--(?:\w*data|\w*workdir|tol|base))=.*")


def facts() -> dict:
    git = ["git", "rev-parse", "--short", "HEAD"]
    return {
        "command": "python " + " ".join(_PATH_FLAGS.sub(r"\1=PATH", a) for a in sys.argv),
        "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "python": platform.python_version(),
        "versions": {p: importlib.metadata.version(p) for p in PACKAGES if importlib.util.find_spec(p)},
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
    }


def write(path: str, results: dict, more: dict) -> None:
    """Writes the record as JSON, if a path is given."""
    if path:
        with open(path, "w") as file:
            file.write(json.dumps(facts() | more | {"results": results}, indent=1) + "\n")
