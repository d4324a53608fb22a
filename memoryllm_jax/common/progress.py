"""Progress of long work, for a terminal or a log."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

import tqdm


class Progress:
    """Progress with ETA: a bar on a terminal, a plain line every `every_s` seconds in a log.

    Args:
      label: what is being done; each line begins with it.
      total: amount of work, in units of `unit`; None: unknown.
      unit: name of the unit; "B" is shown as kB, MB and so on.
      initial: amount that was done before this process started. The ETA is computed without it.
      every_s: seconds between lines in a log.
      enabled: False in every process but the first, so that a run prints once.
      stream: where plain lines are written, by default stdout.
      quiet_s: seconds until the bar or the first line is shown, for work that may be short; None: the bar is shown
        at once, the first line after `every_s`.
      report: called at each update with the share that is done, from 0 to 1. An exception of it ends the work.
    """

    def __init__(
        self,
        label: str,
        total: int | None,
        unit: str,
        initial: int = 0,
        every_s: float = 10.0,
        enabled: bool = True,
        stream: TextIO | None = None,
        quiet_s: float | None = None,
        report: Callable[[float], None] | None = None,
    ):
        self.label, self.total, self.unit = label, total, unit
        self.every_s, self.enabled, self.stream, self._report = every_s, enabled, stream, report
        self.done = self._initial = initial
        self._start = self._last_line = time.monotonic()
        self._bar = None
        if quiet_s is not None:
            self._last_line += quiet_s - every_s
        if enabled and sys.stderr.isatty():
            self._bar = tqdm.tqdm(
                total=total,
                initial=initial,
                unit=unit,
                unit_scale=unit == "B",
                desc=label,
                dynamic_ncols=True,
                delay=quiet_s or 0,
            )

    def update(self, done: int, note: str = "") -> None:
        """Sets the amount done so far and the note that is shown with it."""
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(done - self.done)
        self.done = done
        if self._report is not None:
            self._report(done / max(self.total, 1))
        if self._bar is None and time.monotonic() - self._last_line >= self.every_s:
            if self.total is None:
                self.line(f"{self.label} {done:,} {self.unit}  {note}")
            else:
                self.line(f"{self.label} {100 * done / max(self.total, 1):.1f}%  {note}  ETA {self.eta()}")

    def restart(self, done: int, note: str = "") -> None:
        """`update`, and measures the rate from here on: what was done so far took a time that the rest will not."""
        self._initial, self._start = done, time.monotonic()
        self.update(done, note)
        if self._bar is not None:
            self._bar.unpause()

    def eta(self) -> str:
        """Time left at the mean rate since the start or `restart`, such as 1h05m; unknown if nothing was done since."""
        done_here = self.done - self._initial
        if done_here <= 0 or self.total is None:
            return "unknown"
        return duration((time.monotonic() - self._start) / done_here * (self.total - self.done))

    def line(self, text: str) -> None:
        """Prints a line above the bar. In a log, the next progress line comes `every_s` seconds later."""
        self._last_line = time.monotonic()
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True, file=self.stream)

    def close(self) -> None:
        """Ends the bar; lines can still be printed."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def duration(seconds: float) -> str:
    """The duration as text: 1h05m, or 5m07s if it is less than an hour."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
