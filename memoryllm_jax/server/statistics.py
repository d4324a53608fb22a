"""What the scheduler counts, for /metrics."""

import bisect
import dataclasses

_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Durations:
    """A histogram of times.

    Attributes:
      bounds: upper bounds of the buckets in seconds; one more bucket has no bound.
      counts: number of times in each bucket, which leaves out those of the buckets before.
      sum: of all times, in seconds.
    """

    def __init__(self):
        self.bounds = _BOUNDS
        self.counts = [0] * (len(_BOUNDS) + 1)
        self.sum = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(_BOUNDS, seconds)] += 1
        self.sum += seconds


@dataclasses.dataclass
class Statistics:
    """Totals since the start.

    Attributes:
      sequences: sequences that ended, by how: stop, length, cancelled (also by the time limit) or failed.
      prompt_tokens: tokens of prompts that were read.
      new_tokens: tokens that were generated, without stop ids.
      steps: decode steps.
      queue_s: time from submission to a slot.
      first_token_s: time from submission to the first new token.
    """

    sequences: dict[str, int] = dataclasses.field(
        default_factory=lambda: dict.fromkeys(("stop", "length", "cancelled", "failed"), 0)
    )
    prompt_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    queue_s: Durations = dataclasses.field(default_factory=Durations)
    first_token_s: Durations = dataclasses.field(default_factory=Durations)
