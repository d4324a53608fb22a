"""All measurements of one GPU in ten minutes: each part is a process of its own, and writes its record as it goes.

    python benchmarks/gpu.py --out=benchmarks/results/gpu
    python benchmarks/gpu.py --out=DIR --budget=200 --parts=serve
    python benchmarks/gpu.py --out=DIR --rehearse

The parts run in order of worth, within --budget seconds:

    tests   the tests marked gpu: kernels, padded widths, bfloat16, ToL files, resuming
    train   steps of base, memory and flex-3 of size 1b, and of base in transformers under torch.compile (speed.py)
    serve   the build of a ToL file, and decoding from it, live and of base (serving.py)
    peer    decoding of base in transformers

Each part needs the whole GPU, so they do not run at the same time. A part that fails, hangs or finds no time leaves the
others alone, and what it has recorded stays; so does what earlier runs left in --out. gpu.json has the last lines of
each part, gpu.log all of them. If PyTorch or transformers is missing, their sides are left out, and gpu.json
says so. It also lists the package's own requirements that are missing or have other versions: the parts run as far as
they can. requirements.py says how to bring packages to a machine without a network.

The comparison of trained models takes longer: python -m memoryllm_jax.compare --protocol=configs/protocols/gpu.py.

--rehearse measures nothing: it runs all parts at a small size on a CPU.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Annotated

import requirements

HERE = pathlib.Path(__file__).parent
sys.path.insert(1, str(HERE.parent))  # the package need not be installed
try:
    import common
    import gpu_targets
    import workers

    from memoryllm_jax.common import child, cli, records, storage
    from memoryllm_jax.common.errors import ArgumentError, UserError
    from memoryllm_jax.common.options import Option
except ModuleNotFoundError as missing:  # a part that cannot import one is recorded; without these no record is written
    sys.exit(f"error: {missing}; this machine lacks {' '.join(requirements.missing_here())}")

_GRACE_S = 30  # for a part to save and end after SIGTERM
_LEAST_S = _GRACE_S + 20  # a part with less time would be over before it measured anything
_TIMED_OUT, _INTERRUPTED = "as its time was over", "as it was interrupted"
_LOOK_S = 100  # for JAX to start on the GPU
_KILLED_S = 10  # for a killed process to end; one that waits for a broken driver never does


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
        # Without the options of pyproject.toml, which need pytest-xdist.
        ("-m", "pytest", "-q", "-o", "addopts=", "--import-mode=importlib", "-p", "no:cacheprovider", "tests/gpu"),
        limit=120,
        small=("-k", "64"),  # the suite runs the others on a CPU
    ),
    "train": Part(
        ("benchmarks/speed.py", "--platform=gpu"),
        limit=330,
        small=(*_SMALL_MODEL, "--platform=cpu", "--seq_len=64", "--batch_size=2", "--vocab_size=600", "--rounds=1"),
    ),
    "serve": Part(("benchmarks/serving.py",), limit=240, small=(*_SMALL_SERVING, "--sides=device/streamed,base")),
    "peer": Part(
        ("benchmarks/serving.py", "--sides=llama"),
        limit=150,
        small=(*_SMALL_SERVING, "--platform=cpu"),
        needs_torch=True,
    ),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Where records go, and how long it may take."""

    out: Annotated[str, Option("folder for the records")]
    budget: Annotated[float, Option("seconds for all parts together", least=1)] = 570
    parts: Annotated[tuple[str, ...], Option(f"of {', '.join(PARTS)}")] = tuple(PARTS)
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


@functools.cache
def without_gpu(settings: Settings) -> str:
    """Why JAX cannot use a GPU; "" if it can. Without CUDA's plugin, JAX_PLATFORMS=cuda,cpu would mean the CPU."""
    if settings.rehearse:
        return ""
    look = [sys.executable, "-c", "from memoryllm_jax.common import devices; devices.find()"]
    environment = environment_of("train", settings) | {"JAX_PLATFORMS": "cuda"}
    try:
        done = subprocess.run(look, capture_output=True, text=True, timeout=_LOOK_S, env=environment)
    except subprocess.TimeoutExpired:
        return f"JAX did not find a GPU in {_LOOK_S} s"
    return workers.last_line(done.stderr) if done.returncode else ""


def command_of(name: str, settings: Settings) -> list[str]:
    """The command of a part."""
    part, output = PARTS[name], f"{settings.out}/{name}.json"
    command = [sys.executable, *part.command]
    if name == "train":
        ours = ("base", "memory") if settings.rehearse else ("base", "memory", "flex-3")
        # Compilation needs a C compiler: where there is none, the eager side is what ours are compared with.
        peers = ("llama",) if settings.rehearse else ("llama-compile", "llama")
        command.append(f"--sides={','.join(ours if without_torch() else (*ours, *peers))}")
    if name != "tests":  # their record is written by tests/gpu/conftest.py
        command.append(f"--output={output}")
    return command + list(part.small if settings.rehearse else ())


def scratch_of(settings: Settings) -> str:
    """The folder for a part's temporary files, which is removed after it: what was killed leaves up to 27 GB there."""
    return f"{settings.work}/scratch"


def environment_of(name: str, settings: Settings) -> dict[str, str]:
    """The environment of a part. A platform that cannot be used is an error for it, not a reason to use a CPU."""
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    own = {
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        # Beside PyTorch JAX must not reserve the GPU's memory.
        "JAX_PLATFORMS": "cpu" if settings.rehearse or PARTS[name].needs_torch else "cuda,cpu",
        "DEVICE_TESTS_RECORD": f"{settings.out}/tests.json",
        "TMPDIR": scratch_of(settings),
    }
    return {"JAX_COMPILATION_CACHE_DIR": f"{settings.work}/compiled"} | os.environ | own


def run(command: list[str], seconds: float, log, environment: dict[str, str]) -> dict:
    """Runs a part's command, and ends it and all that it started when its time is over or this script is interrupted.

    Args:
      log: file for what it prints.
    Returns: its exit code (None if it could not be killed), seconds, the last lines that it printed, and
      how it ended: "by itself", "as its time was over" or "as it was interrupted".
    """
    begin, start = log.seek(0, os.SEEK_END), time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=log,
        stderr=log,
        stdin=subprocess.DEVNULL,
        env=environment,
        cwd=HERE.parent,
        process_group=0,
        preexec_fn=child.end_with_parent(),
    )
    end = "by itself"
    try:
        try:
            process.wait(seconds - _GRACE_S)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
            end = _INTERRUPTED if isinstance(error, KeyboardInterrupt) else _TIMED_OUT
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_S)
    finally:
        with contextlib.suppress(ProcessLookupError):  # what the part started may run on
            os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_KILLED_S)
    log.seek(begin)
    lines = log.read().decode(errors="replace").splitlines()
    return {"code": process.returncode, "seconds": time.monotonic() - start, "end": end, "last_lines": lines[-12:]}


def run_part(name: str, settings: Settings, seconds: float, log) -> dict:
    """Runs a part. Returns: what gpu.json says about it."""
    reason = without_torch() if PARTS[name].needs_torch else without_gpu(settings)
    if reason:
        print(f"{name}: left out: {reason}", flush=True)
        return {"skipped": reason}
    if seconds < _LEAST_S:
        return {"skipped": "no time left"}
    seconds = min(seconds, PARTS[name].limit)
    print(f"{name}: at most {seconds:.0f} s", flush=True)
    os.makedirs(scratch_of(settings), exist_ok=True)
    result = run(command_of(name, settings), seconds, log, environment_of(name, settings))
    shutil.rmtree(scratch_of(settings), ignore_errors=True)
    print(f"{name}: ended {result['end']} after {result['seconds']:.0f} s, exit code {result['code']}", flush=True)
    if result["code"] != 0:
        print("\n".join(f"    {line[:200]}" for line in result["last_lines"]), flush=True)
    if name == "train" and without_torch():
        result["left out"] = f"llama: {without_torch()}"
    return result


def targets_of(folder: str) -> list[gpu_targets.Row]:
    """The rows about the targets. An error in a record or in their code ends no measurement."""
    try:
        return gpu_targets.rows(folder)
    except Exception as error:
        print(f"no table of targets: {error!r}", file=sys.stderr, flush=True)
        return []


def earlier_parts(path: str) -> dict:
    """The parts in the gpu.json of earlier runs with the same --out."""
    try:
        return records.read(dict, path, "a record of gpu.py").get("parts", {})
    except (UserError, OSError):  # there is none
        return {}


def main(settings: Settings) -> int:
    end = time.monotonic() + settings.budget
    # As Ctrl-C does, whoever lends the machine may end this script: then the part is ended, and gpu.json is written.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # The parts run in the project's folder.
    settings = dataclasses.replace(settings, out=os.path.abspath(settings.out), work=os.path.abspath(settings.work))
    for folder in (settings.out, settings.work):
        os.makedirs(folder, exist_ok=True)
    lacking = requirements.missing_here()
    if lacking:
        print(f"this machine lacks {' '.join(lacking)}; see requirements.py", file=sys.stderr, flush=True)
    record = f"{settings.out}/gpu.json"
    facts = common.facts() | {"rehearsal": settings.rehearse, "budget": settings.budget, "lacking": lacking}
    parts, mine = earlier_parts(record), {}
    with open(f"{settings.out}/gpu.log", "a+b") as log:
        for name in settings.parts:
            mine[name] = run_part(name, settings, end - time.monotonic(), log)
            rows = targets_of(settings.out)
            targets = [dataclasses.asdict(row) for row in rows]
            storage.write_json(record, facts | {"parts": parts | mine, "targets": targets})
            if mine[name].get("end") == _INTERRUPTED:
                raise KeyboardInterrupt
    print("rehearsed: all parts ran on a CPU" if settings.rehearse else gpu_targets.table(targets_of(settings.out)))
    return 1 if without_gpu(settings) or any(part.get("code", 0) != 0 for part in mine.values()) else 0


if __name__ == "__main__":
    cli.run(main)
