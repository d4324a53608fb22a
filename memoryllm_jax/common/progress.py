"""Progress of long work, for a terminal or a log."""

import sys
import time

import tqdm


class Progress:
    """Progress with rate and ETA: a bar on a terminal, a plain line every `every_s` seconds in a log.

    Args:
      total: amount of work, in `unit`s.
      initial: amount already done when this process starts; it does not count towards the rate.
      enabled: False on every host but the first.
      stream: where plain lines go, by default stdout.
    """

    def __init__(
        self, label: str, total: int, unit: str, initial: int = 0, every_s: float = 10.0, enabled=True, stream=None
    ):
        self.stream = stream
        self.label, self.total, self.every_s, self.enabled = label, total, every_s, enabled
        self.done = self.initial = initial
        self.start = self.last_line = time.monotonic()
        self.bar = None
        if enabled and sys.stderr.isatty():
            scale = unit == "B"
            self.bar = tqdm.tqdm(
                total=total, initial=initial, unit=unit, unit_scale=scale, desc=label, dynamic_ncols=True
            )

    def update(self, done: int, note: str = "") -> None:
        """Sets the amount done so far and what to show beside it."""
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(done - self.done)
        self.done = done
        now = time.monotonic()
        if self.enabled and self.bar is None and now - self.last_line >= self.every_s:
            self.line(f"{self.label} {100 * done / max(self.total, 1):.1f}%  {note}  ETA {self.eta()}")

    def eta(self) -> str:
        new = self.done - self.initial
        if new <= 0:
            return "unknown"
        return duration((time.monotonic() - self.start) / new * (self.total - self.done))

    def line(self, text: str) -> None:
        """Prints a line without breaking the bar; in a log it stands in for the next progress line."""
        self.last_line = time.monotonic()
        if self.enabled and self.bar is not None:
            self.bar.write(text)
        elif self.enabled:
            print(text, flush=True, file=self.stream)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
