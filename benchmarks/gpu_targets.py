"""What the records of gpu.py say about the targets that are set for one GPU.

    python benchmarks/gpu_targets.py DIR

prints the table of a folder of records as Markdown.
"""

import dataclasses
import operator
import statistics
import sys
from collections.abc import Callable, Iterator

from memoryllm_jax.common import records, storage

_MORE, _LESS = operator.ge, operator.le
_PEERS = {"llama-compile": "torch.compile", "llama": "eager"}  # the first that was measured counts


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure: `reached` is None without a target, or if the figure was not measured."""

    what: str
    target: str
    measured: str
    reached: bool | None = None


def rows(folder: str) -> list[Row]:
    """The rows of the records in a folder; what was not measured is said in its row."""
    return [*_tests(folder), *_training(folder), *_serving(folder)]


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    reached = {True: "yes", False: "no", None: ""}
    lines = ["| on one GPU | target | measured | reached |", "| --- | --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {r.what} | {r.target} | {r.measured} | {reached[r.reached]} |" for r in rows)])


def _read(folder: str, name: str) -> dict:
    """A part's record; {} if there is none."""
    path = f"{folder}/{name}.json"
    return records.read(dict, path, "a record of gpu.py") if storage.exists(path) else {}


def _row(what: str, value: float | None, form: str, compare: Callable | None = None, target: float = 0) -> Row:
    """A row about one number, which may not have been measured."""
    text = ""
    if compare:
        text = f"{'at least' if compare is _MORE else 'at most'} {format(target, form.replace('.3', '.2'))}"
    if value is None:
        return Row(what, text, "not measured")
    return Row(what, text, format(value, form), bool(compare(value, target)) if compare else None)


def _tests(folder: str) -> Iterator[Row]:
    found = _read(folder, "tests")
    if not found:
        yield Row("tests on the device", "all pass", "not measured")
        return
    failed = [name for name, test in found.items() if test["outcome"] != "passed"]
    text = f"{len(found) - len(failed)} of {len(found)} passed" + "".join(f"; failed: {name}" for name in failed)
    yield Row("tests on the device", "all pass", text, not failed)


def _training(folder: str) -> Iterator[Row]:
    """MFU, speed and memory of the training steps."""
    results = {side: r for side, r in _read(folder, "train").get("results", {}).items() if "seconds" in r}

    def of(side: str, value: Callable[[dict], float]) -> float | None:
        try:
            return value(results[side])
        except KeyError:  # the side failed or was left out, or the device's peak is not known
            return None

    for target in (0.5, 0.6):
        yield _row("MFU of base-1b", of("base", lambda r: r["mfu"]), ".1%", _MORE, target)
    for side, target in (("memory", 1.6), ("flex-3", 1.25)):
        value = of(side, lambda r: r["speed_over"]["base"]["median"])
        yield _row(f"speed of {side}-1b over base-1b", value, ".2f", _MORE, target)
    for side in ("base", "memory", "flex-3"):
        # Only a device whose peak FLOP/s are known has a memory of its own that it reports.
        ratio = of(side, lambda r: abs(r["peak_bytes"] / r["planned_bytes"] - 1) if r["mfu"] else None)
        yield _row(f"peak memory of {side}-1b off the plan's", ratio, ".1%", _LESS, 0.1)
    peer = next((name for name in _PEERS if name in results), next(iter(_PEERS)))
    for side in ("base", "memory", "flex-3"):
        value = of(side, lambda r: r["speed_over"][peer]["median"])
        yield _row(f"speed of {side}-1b over Llama in transformers, {_PEERS[peer]}", value, ".2f")


def _serving(folder: str) -> Iterator[Row]:
    """Times of decode steps against the memory's bandwidth, and the build of the ToL file."""
    ours, theirs = _read(folder, "serve"), _read(folder, "peer").get("results", {})
    for batch in (1, 32):
        for side in ("live", "device", "device/streamed", "base", "host", "disk"):
            found = ours.get("results", {}).get(f"{side}, batch {batch}", {})
            compare = _LESS if side in ("live", "device") else None
            name = "base" if side == "base" else f"memory, {side} rows,"
            what = f"decode step of {name} at batch {batch}, over the time to read its bytes"
            yield _row(what, found.get("over_least"), ".2f", compare, 1.3)
        pair = [
            side.get(f"{name}, batch {batch}") for name, side in (("base", ours.get("results", {})), ("llama", theirs))
        ]
        ms = [statistics.median(found["ms_a_step"]) if found else None for found in pair]
        ratio = ms[1] / ms[0] if all(ms) else None
        yield _row(f"decoding speed of base at batch {batch} over Llama in transformers, compiled", ratio, ".2f")
    yield _row("build of the ToL file, s", ours.get("tol_build", {}).get("seconds"), ".0f")


if __name__ == "__main__":
    print(table(rows(sys.argv[1])))
