"""All measurements of one GPU in ten minutes: each part is a process of its own, and writes its record as it goes.

    python benchmarks/gpu.py --out=benchmarks/results/gpu
    python benchmarks/gpu.py --out=DIR --budget=200 --parts=curves --data=DIR
    python benchmarks/gpu.py --out=DIR --rehearse

The parts run in order of worth, within --budget seconds:

    tests   the tests marked gpu: kernels, padded widths, bfloat16, ToL files, resuming
    train   steps of base, memory and flex-3 of size 1b, and of base in transformers under torch.compile (speed.py)
    serve   the build of a ToL file, and decoding from it, live and of base (serving.py)
    peer    decoding of base in transformers
    curves  base, memory and flex-3 of 30M, trained with the time that is left; --parts=curves goes on (curves.py)

Each needs the whole GPU, so they do not run at the same time. A part that fails, hangs or finds no time does not end
the others, and what it has recorded stays. gpu.json has the last lines that each part printed, gpu.log all of them. If
PyTorch or transformers is missing, their sides are left out, and gpu.json says so. If the package's own requirements
are missing, this script lists them; requirements.py says how to bring them to a machine without a network.

--rehearse measures nothing: it runs all parts at a small size on a CPU.
"""

import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from typing import Annotated

import common
import gpu_targets
import requirements

from memoryllm_jax.common import cli, storage
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.common.options import Option

HERE = pathlib.Path(__file__).parent
_GRACE_S = 30  # for a part to save and end after SIGTERM
_LEAST_S = 20  # a part with less time would be over before it measured anything


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of the measurements.

    Attributes:
      command: arguments of Python.
      limit: most seconds that the part may take, also if more are left.
      small: arguments that replace those of the same name in a rehearsal.
      needs_torch: whether the part measures PyTorch alone.
    """

    command: tuple[str, ...]
    limit: float
    small: tuple[str, ...] = ()
    needs_torch: bool = False


_SMALL_MODEL = ("--dim=32", "--layers=1", "--heads=2")
_SMALL_SERVING = (*_SMALL_MODEL, "--vocab_size=600", "--prompt=8", "--tokens=8", "--batches=2", "--rounds=1")
PARTS = {
    "tests": Part(
        ("-m", "pytest", "-m", "gpu", "-n", "0", "-p", "no:cacheprovider", "tests/gpu"),
        limit=120,
        small=("-k", "64 or widths"),  # the suite runs the others on a CPU
    ),
    "train": Part(
        ("benchmarks/speed.py", "--platform=gpu"),
        limit=330,
        small=(*_SMALL_MODEL, "--platform=cpu", "--seq_len=64", "--batch_size=2", "--vocab_size=600", "--rounds=1"),
    ),
    "serve": Part(("benchmarks/serving.py",), limit=240, small=(*_SMALL_SERVING, "--sides=device/streamed,base")),
    "peer": Part(("benchmarks/serving.py", "--sides=llama"), limit=150, small=_SMALL_SERVING, needs_torch=True),
    "curves": Part(
        ("benchmarks/curves.py",),
        limit=100_000,
        small=(*_SMALL_MODEL, "--tokens=1024", "--seq_len=64", "--batch_size=8", "--sides=base,memory"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Where records go, and how long it may take."""

    out: Annotated[str, Option("folder for the records")]
    budget: Annotated[float, Option("seconds for all parts together", least=1)] = 570
    parts: Annotated[tuple[str, ...], Option(f"of {', '.join(PARTS)}")] = tuple(PARTS)
    data: Annotated[str, Option("prepared data for curves; by default Python's own texts, which are short")] = ""
    work: Annotated[str, Option("folder for checkpoints and compiled functions; at 1b, 40 GB")] = (
        f"{tempfile.gettempdir()}/memoryllm_jax_gpu"
    )
    rehearse: Annotated[bool, Option("run everything at a small size on a CPU")] = False

    def __post_init__(self):
        for part in self.parts:
            if part not in PARTS:
                raise ArgumentError("parts", f"expected parts of {', '.join(PARTS)}, found {part}")


def without_torch() -> str:
    """Why the sides of transformers are left out; "" if they need not be."""
    lacking = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(lacking)} not installed" if lacking else ""


def command_of(name: str, settings: Settings, seconds: float) -> list[str]:
    """The command of a part.

    Args:
      seconds: that it may take.
    """
    part, output = PARTS[name], f"{settings.out}/{name}.json"
    command = [sys.executable, *part.command]
    if name == "train":
        ours = ("base", "memory") if settings.rehearse else ("base", "memory", "flex-3")
        peers = () if without_torch() else ("llama" if settings.rehearse else "llama-compile",)
        command.append(f"--sides={','.join((*ours, *peers))}")
    if name in ("serve", "peer"):
        command.append(f"--scratch={settings.work}")
    if name == "curves":
        command += [f"--workdir={settings.work}/curves", f"--budget={seconds - _GRACE_S}"]
        command += [f"--data={settings.data}"] if settings.data else []
    if name != "tests":  # their record is written by tests/gpu/conftest.py
        command.append(f"--output={output}")
    return command + list(part.small if settings.rehearse else ())


def environment_of(name: str, settings: Settings) -> dict[str, str]:
    """The environment of a part. A platform that cannot be used is an error for it, not a reason to use a CPU."""
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    own = {
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        # Beside PyTorch JAX must not reserve the GPU's memory.
        "JAX_PLATFORMS": "cpu" if settings.rehearse or PARTS[name].needs_torch else "cuda,cpu",
        "DEVICE_TESTS_RECORD": f"{settings.out}/tests.json",
    }
    return {"JAX_COMPILATION_CACHE_DIR": f"{settings.work}/compiled"} | os.environ | own


def run(command: list[str], seconds: float, log, environment: dict[str, str]) -> dict:
    """Runs a part's command, and ends it and all that it started when its time is over.

    Args:
      log: file for what it prints.
    Returns: its exit code, seconds, the last lines that it printed, and whether its time was over.
    """
    begin, start = log.tell(), time.monotonic()
    process = subprocess.Popen(
        command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, cwd=HERE.parent, process_group=0
    )
    timed_out = False
    try:
        process.wait(max(seconds - _GRACE_S, 1))
    except subprocess.TimeoutExpired:
        timed_out = True
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
    finally:
        with contextlib.suppress(ProcessLookupError):  # also when this script is interrupted
            os.killpg(process.pid, signal.SIGKILL)
    code = process.wait()
    log.seek(begin)
    lines = log.read().decode(errors="replace").splitlines()
    return {"code": code, "seconds": time.monotonic() - start, "timed_out": timed_out, "last_lines": lines[-12:]}


def run_part(name: str, settings: Settings, seconds: float, log) -> dict:
    """Runs a part. Returns: what gpu.json says about it."""
    if PARTS[name].needs_torch and without_torch():
        return {"skipped": without_torch()}
    if seconds < _LEAST_S:
        return {"skipped": "no time left"}
    seconds = min(seconds, PARTS[name].limit)
    print(f"{name}: at most {seconds:.0f} s", flush=True)
    result = run(command_of(name, settings, seconds), seconds, log, environment_of(name, settings))
    ended = "its time was over" if result["timed_out"] else f"exit code {result['code']}"
    print(f"{name}: {ended} after {result['seconds']:.0f} s", flush=True)
    if result["code"]:
        print("\n".join(f"    {line[:200]}" for line in result["last_lines"]), flush=True)
    if name == "train" and without_torch():
        result["left out"] = f"llama: {without_torch()}"
    return result


def main(settings: Settings) -> int:
    lacking = requirements.missing(requirements.needed(peers=False), requirements.installed_here())
    if lacking:
        raise UserError(f"expected the package's requirements, found none of {' '.join(lacking)}; see requirements.py")
    end = time.monotonic() + settings.budget
    # The parts run in the project's folder.
    settings = dataclasses.replace(settings, out=os.path.abspath(settings.out), work=os.path.abspath(settings.work))
    for folder in (settings.out, settings.work):
        os.makedirs(folder, exist_ok=True)
    facts, parts = common.facts() | {"rehearsal": settings.rehearse, "budget": settings.budget}, {}
    with open(f"{settings.out}/gpu.log", "w+b") as log:
        for name in settings.parts:
            parts[name] = run_part(name, settings, end - time.monotonic(), log)
            rows = gpu_targets.rows(settings.out)
            targets = [dataclasses.asdict(row) for row in rows]
            storage.write_json(f"{settings.out}/gpu.json", facts | {"parts": parts, "targets": targets})
    print("rehearsed: all parts ran on a CPU" if settings.rehearse else gpu_targets.table(rows))
    return 1 if any(part.get("code") for part in parts.values()) else 0


if __name__ == "__main__":
    cli.run(main)
