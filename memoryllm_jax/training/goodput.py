"""Where the wall time of a run goes: its goodput, and what took the rest.

Goodput is the share of a run's wall time that went into training steps whose result was kept (Google, ML Goodput
Measurement, https://docs.cloud.google.com/tpu/docs/goodput). The rest is "badput", by cause. Differences from Google's
definition: time in which no process of the run was alive is not counted, as it belongs to the scheduler; and a process
is counted from the call of `train` on, so that Python's imports and the wait for other hosts come before it.

At each moment one activity is counted. Steps are computed while the host does other things, so what the host waits for
counts only where the devices wait too: they are given their next step before the last one ends.
"""

import concurrent.futures
import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Literal, TypeVar

import jax
import msgspec

from memoryllm_jax.common.progress import duration
from memoryllm_jax.common.records import Count, Record

# start: opening data, devices and checkpoints, initialising or restoring, until the first step, except for `compile`
# compile: XLA
# step: training steps, skipped ones and the host's work between two of them included
# input: the devices had no step to compute, because the next batch was not there
# validation, save, sample, tasks: between two steps; a save goes on in the background, which counts as `step`
# lost: steps that were trained again, because the process that trained them first ended before it saved them
Activity = Literal["start", "compile", "step", "input", "validation", "save", "sample", "tasks", "lost"]

T = TypeVar("T")


class GoodputRecord(Record, tag_field="kind", tag="goodput"):
    """Where the time of a run went until `step`, in all of its processes.

    seconds: by `Activity`.
    """

    step: Count
    seconds: dict[str, Annotated[float, msgspec.Meta(ge=0)]]


def earlier_seconds(records: Sequence[GoodputRecord], step: int) -> dict[str, float]:
    """The seconds of the processes before one that goes on from a step: what they trained after it is lost.

    What a process did after its last record is not known, and counts nowhere.

    Args:
      records: of the run so far, in the order in which they were written.
      step: steps done before this process.
    """
    if not records:
        return {}
    seconds = dict(records[-1].seconds)
    at_step = [record for record in records if record.step <= step]
    kept = at_step[-1].seconds.get("step", 0.0) if at_step else 0.0
    trained = seconds.get("step", 0.0)
    return seconds | {"step": kept, "lost": seconds.get("lost", 0.0) + max(0.0, trained - kept)}


class Goodput:
    """Counts the wall time of a run by activity. The first is `start`."""

    def __init__(self):
        self._seconds: dict[str, float] = {}
        self._activity: Activity = "start"
        self._since = time.monotonic()
        self._lap = 0.0  # seconds in steps at the end of the last lap
        self._ends = _Ends()

    def add_earlier(self, seconds: dict[str, float]) -> None:
        """Adds what `earlier_seconds` returns."""
        for activity, earlier in seconds.items():
            self._seconds[activity] = self._seconds.get(activity, 0.0) + earlier
        self._lap = self._in_steps()

    def begin(self, activity: Activity) -> None:
        """Ends the current activity, and begins another."""
        now = time.monotonic()
        self._seconds[self._activity] = self._seconds.get(self._activity, 0.0) + now - self._since
        self._activity, self._since = activity, now

    @contextlib.contextmanager
    def during(self, activity: Activity) -> Iterator[None]:
        """A context whose time belongs to another activity.

        The devices go on with steps that they were given before. So the caller waits for them first.
        """
        # No try/finally: an error in the context ends the run, and nothing reads the times after it.
        before = self._activity
        self.begin(activity)
        yield
        self.begin(before)

    def lap(self) -> float:
        """Ends a lap and begins the next. Returns: seconds of the lap in steps and input, more than 0."""
        self.begin(self._activity)
        in_steps = self._in_steps()
        seconds, self._lap = in_steps - self._lap, in_steps
        return max(seconds, 1e-9)  # speeds divide by it

    def _in_steps(self) -> float:
        return self._seconds.get("step", 0.0) + self._seconds.get("input", 0.0)

    def dispatched(self, result: jax.Array) -> None:
        """Notes that the devices were given a step.

        Args:
          result: of the step, on the devices. Not a dict that the caller may change: a thread waits for it.
        """
        self._ends.watch(result)

    def inputs(self, feeds: Iterable[T]) -> Iterator[T]:
        """Yields from `feeds`. The time in which the devices waited for the next of them too counts as `input`."""
        feeds = iter(feeds)
        while True:
            start = time.monotonic()
            try:
                feed = next(feeds)
            except StopIteration:
                return
            idle_since = self._ends.last()
            if idle_since is not None:
                waited = time.monotonic() - max(start, idle_since)
                self.begin("step")
                self._seconds["step"] -= waited
                self._seconds["input"] = self._seconds.get("input", 0.0) + waited
            yield feed

    def record(self) -> dict:
        """The times so far: {"share": of steps in the wall time, "wall_seconds", "seconds": {activity: seconds}}."""
        self.begin(self._activity)
        seconds = {activity: round(spent, 3) for activity, spent in self._seconds.items()}
        wall = round(sum(seconds.values()), 3)
        return {"share": round(seconds.get("step", 0.0) / max(wall, 1e-9), 6), "wall_seconds": wall, "seconds": seconds}

    def close(self) -> None:
        """Ends the thread that waits for steps, when its step ends."""
        self._ends.close()


class _Ends:
    """Notes when the last step ended.

    A thread waits for it. The train loop must not: it would give the devices their next step too late.
    """

    def __init__(self):
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="end-of-step")
        self._end: concurrent.futures.Future | None = None

    def watch(self, result: jax.Array) -> None:
        self._end = self._thread.submit(_wait, result)

    def last(self) -> float | None:
        """When the last step ended, by `time.monotonic`; 0 if there was none, and None if it has not ended."""
        if self._end is None:
            return 0.0
        return self._end.result() if self._end.done() else None

    def close(self) -> None:
        self._thread.shutdown(wait=False)


def _wait(result: jax.Array) -> float:
    """Waits for an array. Returns: the time when it was there."""
    # The train loop meets an error of the step when it reads its metrics.
    with contextlib.suppress(Exception):
        jax.block_until_ready(result)
    return time.monotonic()


def text(record: dict) -> str:
    """What `Goodput.record` returns as a line to print, the largest shares first."""
    rest = {activity: spent for activity, spent in record["seconds"].items() if activity != "step"}
    shares = []
    for activity, spent in sorted(rest.items(), key=lambda item: -item[1]):
        share = 100 * spent / max(record["wall_seconds"], 1e-9)
        if share >= 0.05:
            shares.append(f"{activity} {share:.1f}%")
    line = f"goodput: {100 * record['share']:.1f}% of {duration(record['wall_seconds'])} in steps"
    return f"{line}; {', '.join(shares)}" if shares else line
