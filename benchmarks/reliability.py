"""What kills, flipped bits, damaged files, a full disk and many processes at once do to everything that is written.

    python benchmarks/reliability.py --work=DIR --output=benchmarks/results/reliability_cpu.json

Makes a small model with the commands, and then runs these parts. Each result is written as soon as it is there:

  kills: each command is started, killed with SIGKILL at a random moment, and given again. It must end as if it had not
    been killed: the same bytes, or for a training the same parameters.
  flips: one random bit of a file is flipped. Whoever reads the file must refuse it, or get the same values.
  disk: each command writes to a file system that is too small. It must say so in one sentence, leave nothing
    half-written under a final name, and succeed as soon as there is room. Needs the right to mount (root).
  load: many processes read one ToL file at once, while others train and precompute. Each must write the same text.
  fuzz: the tests of damaged files, many for each reader (tests/test_damaged_files.py, -m long).

What an earlier run with the same output has finished is not repeated.
"""

import collections
import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Callable, Iterator
from typing import Annotated, NamedTuple

import common
import jax
import numpy as np

from memoryllm_jax.checkpoint.store import Checkpoints
from memoryllm_jax.checkpoint.trained import Digest, TrainedModel
from memoryllm_jax.common import cli
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.common.options import Option
from memoryllm_jax.data.dataset import SPLITS, Dataset
from memoryllm_jax.tol import sources, verify
from memoryllm_jax.tol.format import TolFile
from memoryllm_jax.tol.memory import FileMemory
from memoryllm_jax.tol.overlay import Overlay
from memoryllm_jax.training.step import Trainer

PARTS = ("kills", "flips", "disk", "load", "fuzz")
ROOT = pathlib.Path(__file__).parent.parent
STEPS = 30  # of the training


class Command(NamedTuple):
    """A command of which the parts try what happens to its output.

    Attributes:
      arguments: of `python -m memoryllm_jax.`; {out} stands for the folder that it writes to, {made} for whole files.
      digest: of what it wrote in that folder.
    """

    arguments: str
    digest: Callable[[pathlib.Path], str]


def of_files(folder: pathlib.Path) -> str:
    """The digest of all files that are not hidden."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            total.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return total.hexdigest()


def of_parameters(folder: pathlib.Path) -> str:
    """The digest of the newest checkpoint's parameters, all 32 bits of each."""
    total = hashlib.sha256()
    with contextlib.closing(TrainedModel(str(folder / "run"))) as model:
        total.update(f"step {model.step}".encode())
        for name in model.names():
            total.update(model.leaf_on_host(name).tobytes())
    return total.hexdigest()


def of_edited_rows(folder: pathlib.Path) -> str:
    """The digest of all rows with the edits. An edit that is given twice is listed twice, but gives the same rows."""
    with contextlib.closing(TolFile(str(folder.parent / "made" / "tol.safetensors"))) as tol:
        overlay = Overlay.open(str(folder / "edits.safetensors"), FileMemory(tol))
        return hashlib.sha256(overlay.rows(np.arange(tol.vocab_size)).tobytes()).hexdigest()


SMALL = "--config={configs}/tiny.py:flex-3 --config.model.dim=48 --config.model.layers=2 --config.model.heads=4 "
SMALL += "--config.seq_len=64 --config.batch_size=8 --config.log.tensorboard=false --config.eval.batches=2 "
TRAIN = "train " + SMALL + f"--workdir={{out}}/run --config.data.path={{made}}/data --config.steps={STEPS} "
TRAIN += "--config.optimizer.warmup_steps=3 --config.checkpoint.every=5 --config.log.every=1"
EDIT = "tol edit {made}/tol.safetensors --overlay={out}/edits.safetensors --replace=#5,#9"
COMMANDS = {
    "prepare": Command(
        "prepare --input={made}/text/*.jsonl --tokenizer=sentencepiece:{made}/data/tokenizer.model --output={out}/data "
        "--workers=2",
        of_files,
    ),
    "train": Command(TRAIN, of_parameters),
    "precompute": Command("precompute --workdir={made}/run --output={out}/tol.safetensors", of_files),
    "tol compress": Command(
        "tol compress {made}/tol.safetensors --output={out}/small.safetensors --bits=4 --rank=24", of_files
    ),
    "tol edit": Command(EDIT, of_edited_rows),
    "export": Command("export --workdir={made}/run --output={out}/hf", of_files),
    "import": Command("export --import={made}/hf --workdir={out}/run", of_parameters),
    "evaluate": Command("evaluate --workdir={made}/run --data={made}/data --output={out}/quality.json", lambda _: ""),
}


class Run(NamedTuple):
    """How a command ended: its exit status, negative for a signal; what it printed; and its seconds."""

    status: int
    printed: str
    seconds: float

    @property
    def is_clean_error(self) -> bool:
        """Whether it refused with a sentence and without a traceback."""
        return self.status > 0 and "error: " in self.printed and "Traceback" not in self.printed


class Lab:
    """The whole files, and a way to run commands on them.

    Args:
      work: the folder of all files.
    """

    def __init__(self, work: pathlib.Path):
        self.work, self.made = work, work / "made"
        self.environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(work / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": str(ROOT),
        }

    def start(self, arguments: str, out: pathlib.Path) -> subprocess.Popen:
        """Starts a command whose output, and error messages, are piped."""
        filled = arguments.format(out=out, made=self.made, configs=ROOT / "configs").split()
        return subprocess.Popen(
            [sys.executable, "-m", f"memoryllm_jax.{filled[0]}", *filled[1:]],
            env=self.environment,
            cwd=self.work,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, arguments: str, out: pathlib.Path, kill_after: float | None = None) -> Run:
        """Runs a command, and kills it and its children after some seconds if it has not ended by then."""
        begin = time.monotonic()
        process = self.start(arguments, out)
        try:
            printed, _ = process.communicate(timeout=kill_after)
        except subprocess.TimeoutExpired:
            # Only the process itself: its children must end by themselves.
            process.send_signal(signal.SIGKILL)
            printed, _ = process.communicate()
        return Run(process.returncode, printed, time.monotonic() - begin)

    def make(self) -> None:
        """Makes the whole files, unless an earlier run has."""
        if (self.made / "whole").exists():
            return
        shutil.rmtree(self.made, ignore_errors=True)
        (self.made / "text").mkdir(parents=True)
        from memoryllm_jax.data import documents

        texts = [text for text, _ in documents.read("embedded")][:240]
        for number in range(4):
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[number::4])
            (self.made / "text" / f"{number}.jsonl").write_text(lines)
        steps = [
            "prepare --input={out}/text/*.jsonl --tokenizer=sentencepiece:train:512 --output={out}/data",
            TRAIN,
            "precompute --workdir={out}/run --output={out}/tol.safetensors",
            "export --workdir={out}/run --output={out}/hf",
            EDIT,
        ]
        for step in steps:
            done = self.run(step, self.made)
            if done.status:
                raise UserError(f"{step.split()[0]} failed: {done.printed[-1000:]}")
        (self.made / "whole").touch()

    def fresh(self, name: str) -> pathlib.Path:
        """An empty folder."""
        folder = self.work / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder


Outcomes = dict[str, int | float | str]  # {outcome: how often}
Wanted = Callable[[str], bool]  # whether the result of a command, place or reader is still missing


def kills(lab: Lab, tries: int, draw: random.Random, wanted: Wanted) -> Iterator[tuple[str, Outcomes]]:
    """Kills each command at random moments."""
    for name, command in COMMANDS.items():
        if not wanted(name):
            continue
        whole = lab.fresh("whole")
        clean = lab.run(command.arguments, whole)
        clean = lab.run(command.arguments, lab.fresh("whole"))  # again, as the first run has compiled
        expected = command.digest(whole)
        counts: collections.Counter = collections.Counter()
        for _ in range(tries):
            folder = lab.fresh("killed")
            lab.run(command.arguments, folder, kill_after=draw.uniform(0, clean.seconds))
            if _has_finished(command, folder, expected):
                counts["finished before the kill"] += 1
            else:
                counts[_after_kill(command, folder, lab.run(command.arguments, folder), expected)] += 1
        yield name, dict(counts) | {"seconds": round(clean.seconds, 1)}


def _has_finished(command, folder, expected) -> bool:
    """Whether a run has written all of its result."""
    try:
        return command.digest(folder) == expected != ""
    except (UserError, OSError):
        return False


def _after_kill(command, folder, again, expected) -> str:
    if again.status:
        return f"second run failed: {again.printed.strip()[-200:]}"
    if command.digest(folder) != expected:
        return "another result"
    left = [path.name for path in folder.rglob("*") if ".part" in path.name or "orbax-checkpoint-tmp" in path.name]
    if left:
        return f"left over: {left[0]}"
    return "same result"


def _values_of_data(made: pathlib.Path) -> str:
    data = Dataset(str(made / "data"))
    data.verify()
    total = hashlib.sha256(data.tokenizer().content)
    for split in SPLITS:
        tokens = getattr(data, split)
        total.update(f"{tokens.tokens} {tokens.bytes} {tokens.documents} {data.vocab_size}".encode())
        total.update(tokens.read(0, tokens.tokens).tobytes())
    return total.hexdigest()


def _values_of_checkpoint(made: pathlib.Path) -> str:
    """All that a resumed training and a served model read."""
    run = made / "run"
    total = hashlib.sha256()
    with contextlib.closing(TrainedModel(str(run))) as model, contextlib.closing(Checkpoints(str(run))) as checkpoints:
        total.update(f"{model.step} {model.run} {model.tokenizer.digest}".encode())
        digest = Digest()
        params = model.load(lambda _: True, digest)
        total.update(digest.text().encode())
        state = checkpoints.restore(model.step, Trainer(model.run, model.mesh).state_shape)
    for leaf in jax.tree.leaves([params, state]):
        total.update(np.asarray(leaf).tobytes())
    return total.hexdigest()


def _values_of_tol(made: pathlib.Path) -> str:
    with contextlib.closing(TolFile(str(made / "tol.safetensors"))) as tol:
        verify.check_file(tol)
        total = hashlib.sha256(json.dumps([tol.metadata, tol.layout.to_json()]).encode())
        total.update(tol.tokenizer().content)
        total.update(sources.read_rows(tol, np.arange(tol.vocab_size)).tobytes())
    return total.hexdigest()


def _values_of_overlay(made: pathlib.Path) -> str:
    with contextlib.closing(TolFile(str(made / "tol.safetensors"))) as tol:
        overlay = Overlay.open(str(made / "edits.safetensors"), FileMemory(tol))
    total = hashlib.sha256()
    for edit in overlay.edits:
        total.update(f"{edit.text} {edit.mix} {edit.layers} {edit.layer}".encode())
        for array in (edit.ids, edit.rows, edit.coefficients, edit.value):
            total.update(b"" if array is None else array.tobytes())
    return total.hexdigest()


class Place(NamedTuple):
    """Where bits are flipped, and who reads them.

    Attributes:
      pattern: of the files, below the folder of whole files.
      read: returns a digest of all that a reader gets from them.
      but: pattern of files that are left out.
      part: of each file: all, header or data.
    """

    pattern: str
    read: Callable[[pathlib.Path], str]
    but: str = ""
    part: str = "all"


PLACES = {
    "file shards": Place("data/*.bin", _values_of_data),
    "dataset.json": Place("data/dataset.json", _values_of_data),
    "tokenizer.model": Place("data/tokenizer.model", _values_of_data),
    "checkpoint, arrays": Place(f"run/{STEPS}/state/**/d/*", _values_of_checkpoint),
    "checkpoint, its other files": Place(f"run/{STEPS}/**/*", _values_of_checkpoint, but="**/d/*"),
    "ToL, header": Place("tol.safetensors", _values_of_tol, part="header"),
    "ToL, data": Place("tol.safetensors", _values_of_tol, part="data"),
    "overlay": Place("edits.safetensors", _values_of_overlay),
}


def flips(lab: Lab, tries: int, draw: random.Random, wanted: Wanted) -> Iterator[tuple[str, Outcomes]]:
    """Flips random bits in each place."""
    for name, place in PLACES.items():
        if not wanted(name):
            continue
        left_out = set(lab.made.glob(place.but)) if place.but else set()
        files = [path for path in lab.made.glob(place.pattern) if path.is_file() and path.stat().st_size]
        files = [path for path in files if path not in left_out]
        expected = place.read(lab.made)
        counts: collections.Counter = collections.Counter()
        for _ in range(tries):
            (path,) = draw.choices(files, [file.stat().st_size for file in files])
            with _flipped(path, place.part, draw):
                counts[_after_flip(place, lab.made, expected)] += 1
        yield name, dict(counts)


@contextlib.contextmanager
def _flipped(path: pathlib.Path, part: str, draw: random.Random) -> Iterator[None]:
    """A file with one bit flipped, which is put right at the end."""
    whole = path.read_bytes()
    first, last = 0, len(whole)
    data_start = 8 + int.from_bytes(whole[:8], "little")
    if part == "header":
        last = data_start
    elif part == "data":
        first = data_start
    at, bit = draw.randrange(first, last), draw.randrange(8)
    changed = bytearray(whole)
    changed[at] ^= 1 << bit
    path.write_bytes(changed)
    try:
        yield
    finally:
        path.write_bytes(whole)


def _after_flip(place: Place, made: pathlib.Path, expected: str) -> str:
    try:
        found = place.read(made)
    except UserError:
        return "refused"
    except Exception as error:
        return f"traceback of {type(error).__name__}"
    return "same values" if found == expected else "OTHER VALUES"


def disk(lab: Lab, tries: int, draw: random.Random, wanted: Wanted) -> Iterator[tuple[str, Outcomes]]:
    """Lets each command write to a file system that is too small."""
    for name, command in COMMANDS.items():
        if not wanted(name):
            continue
        whole = lab.fresh("whole")
        lab.run(command.arguments, whole)
        expected = command.digest(whole)
        needed = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
        counts: collections.Counter = collections.Counter()
        for _ in range(tries):
            size = max(4096, int(needed * draw.uniform(0.05, 0.8)) // 4096 * 4096)
            with _small_disk(lab.fresh("small"), size) as folder:
                full = lab.run(command.arguments, folder)
                _resize(folder, needed * 4 + (64 << 20))
                again = lab.run(command.arguments, folder)
                counts[_after_full(command, folder, full, again, expected)] += 1
        yield name, dict(counts)


@contextlib.contextmanager
def _small_disk(folder: pathlib.Path, size: int) -> Iterator[pathlib.Path]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def _resize(folder, size):
    subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)


def _after_full(command, folder, full, again, expected) -> str:
    if full.status == 0:
        return "there was room"
    if not full.is_clean_error:
        return f"no clean error: {full.printed.strip()[-300:]}"
    if again.status:
        return f"second run failed: {again.printed.strip()[-300:]}"
    return "one sentence, then the same result" if command.digest(folder) == expected else "another result"


def load(lab: Lab, tries: int, draw: random.Random, wanted: Wanted) -> Iterator[tuple[str, Outcomes]]:
    """Starts many processes at once, `tries` of them readers of one ToL file."""
    if not wanted("readers"):
        return
    read = "generate --workdir={made}/run --tol={made}/tol.safetensors --rows=disk --cache=64KiB --max_tokens=40 "
    read += "--temperature=0 --prompt="
    alone = {}
    for prompt in ("The_file", "def_main", "A_class_is", "import_os"):
        done = lab.run(read + prompt, lab.work)
        if done.status:
            raise UserError(f"generate failed: {done.printed[-1000:]}")
        alone[prompt] = done.printed
    running = []
    for name in ("train", "prepare"):
        running.append((name, "writer", lab.start(COMMANDS[name].arguments, lab.fresh(f"load_{name}"))))
    for prompt in itertools.islice(itertools.cycle(alone), tries):
        running.append((prompt, "reader", lab.start(read + prompt, lab.work)))
    counts: dict[str, collections.Counter] = {"readers": collections.Counter(), "writers": collections.Counter()}
    for name, kind, process in running:
        printed, _ = process.communicate()
        if process.returncode:
            outcome = f"failed: {printed[-200:]}"
        elif kind == "reader":
            outcome = "same text" if printed == alone[name] else "another text"
        else:
            outcome = "ended"
        counts[f"{kind}s"][outcome] += 1
    yield from ((kind, dict(found)) for kind, found in counts.items())


def fuzz(lab: Lab, tries: int, draw: random.Random, wanted: Wanted) -> Iterator[tuple[str, Outcomes]]:
    """Runs the long tests of damaged files."""
    if not wanted("ToL"):
        return
    record = lab.work / "fuzz.xml"
    command = [sys.executable, "-m", "pytest", "-m", "long", "tests/test_damaged_files.py", f"--junitxml={record}"]
    subprocess.run(command, cwd=ROOT, env=lab.environment, stdout=subprocess.DEVNULL)
    for case in xml.etree.ElementTree.parse(record).iter("testcase"):
        reader = case.get("name").partition("[")[2].removesuffix("]")
        files = next(int(entry.get("value")) for entry in case.iter("property") if entry.get("name") == "tries")
        failures = [*case.iter("failure"), *case.iter("error")]
        outcome = failures[0].get("message")[:300] if failures else "a value or one error"
        yield reader, {outcome: files}


def table(results: dict[str, Outcomes]) -> str:
    """The results of one part as Markdown: a row for each command, place or reader, a column for each outcome."""
    columns = list(dict.fromkeys(outcome for outcomes in results.values() for outcome in outcomes))
    lines = [f"| | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    for name, outcomes in results.items():
        lines.append(f"| {name} | {' | '.join(str(outcomes.get(column, '')) for column in columns)} |")
    return "\n".join(lines)


def main(
    work: Annotated[str, Option("folder for all files, which may stay for the next run")],
    output: Annotated[str, Option("JSON file for the record", writes=True)],
    only: Annotated[tuple[str, ...], Option(f"parts to run, of {','.join(PARTS)}")] = PARTS,
    tries: Annotated[
        int, Option("kills of each command; flips are twenty times as many, full disks half", least=2)
    ] = 12,
    seed: Annotated[int, Option("of the random moments and bits")] = 0,
) -> None:
    unknown = set(only) - set(PARTS)
    if unknown:
        raise ArgumentError("only", f"expected parts among {', '.join(PARTS)}, found {', '.join(sorted(unknown))}")
    lab = Lab(pathlib.Path(work).absolute())
    lab.make()
    before = json.loads(pathlib.Path(output).read_text())["results"] if os.path.exists(output) else {}
    counts = {"kills": tries, "flips": 20 * tries, "disk": max(1, tries // 2), "load": 2 * tries, "fuzz": 1}
    for part in only:
        done = before.setdefault(part, {})
        for name, outcomes in globals()[part](lab, counts[part], random.Random(seed), lambda x, d=done: x not in d):
            print(f"{part}, {name}: {outcomes}", flush=True)
            done[name] = outcomes
            common.write(output, before, {"tries": counts, "seed": seed})
    for part in only:
        print(f"\n{part}\n\n{table(before[part])}")


if __name__ == "__main__":
    cli.run(main)
