"""A model's quality on a text or a task, with standard errors of it and of its changes from one model to another."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

FEWEST = 10  # units that a standard error takes: it is itself known to a quarter only, from so few


class Change(NamedTuple):
    """A change from one score to another, in percent of the other or in points, and its standard error.

    The error is over documents or examples. NaN stands for what is not known: a change from 0, or an error of fewer
    than `FEWEST` units.
    """

    amount: float
    error: float


@dataclasses.dataclass(frozen=True)
class Score:
    """A model's quality, with what it is made of, so that changes between models are taken unit by unit.

    The value is the mean of `sums_N` over `sizes_N`, or exp of it: of a perplexity each unit is a document, of a task
    an example. Standard errors are those of the ratio of two sums over units drawn at random (Cochran 1977, "Sampling
    Techniques", section 6.4).

    Attributes:
      value: the quality.
      sums_N: of each unit, such as nats of a document; None: not known, so that errors are not either.
      sizes_N: units' sizes, such as tokens of a document.
      is_log: whether the value is exp of the mean, as of a perplexity.
    """

    value: float
    sums_N: np.ndarray | None = None
    sizes_N: np.ndarray | None = None
    is_log: bool = False

    @classmethod
    def of_losses(cls, nats_D: np.ndarray, tokens_D: np.ndarray) -> "Score":
        """A perplexity, from the sums of nats and the numbers of tokens of documents."""
        mean = nats_D.sum() / tokens_D.sum()
        return cls(math.exp(min(mean, 700.0)), nats_D, tokens_D, is_log=True)  # exp overflows a float from 710 on

    @classmethod
    def of_examples(cls, scores_N: Sequence[float]) -> "Score":
        """The mean over examples, such as an accuracy from zeros and ones."""
        return cls(float(np.mean(scores_N)), np.asarray(scores_N, float), np.ones(len(scores_N)))

    @property
    def error(self) -> float:
        """Standard error of the value; NaN where it is not known."""
        if self.sums_N is None:
            return math.nan
        return _ratio_error(self.sums_N, self.sizes_N) * (self.value if self.is_log else 1)

    def change(self, full: "Score") -> Change:
        """The change from the score `full` to this one. Both must have the same units."""
        percent = 100 * (self.value / full.value - 1) if full.value else math.nan
        if self.sums_N is None or full.sums_N is None or not full.value:
            return Change(percent, math.nan)
        if self.is_log:  # exp(a) / exp(b) - 1, where a - b is one mean
            error = (1 + percent / 100) * _ratio_error(self.sums_N - full.sums_N, self.sizes_N)
        else:
            error = _ratio_error(self.sums_N, full.sums_N)
        return Change(percent, 100 * error)

    def points(self, full: "Score") -> Change:
        """The difference from the score `full` to this one, in hundredths. Both must have the same units, of one size.

        Of an accuracy near chance, a change in percent is small whatever the model loses: a difference is not.
        """
        difference = 100 * (self.value - full.value)
        if self.sums_N is None or full.sums_N is None:
            return Change(difference, math.nan)
        return Change(difference, 100 * _ratio_error(self.sums_N - full.sums_N, self.sizes_N))


def _ratio_error(sums_N: np.ndarray, sizes_N: np.ndarray) -> float:
    """Standard error of sum(sums) / sum(sizes), both over N units; NaN for fewer than `FEWEST`."""
    units, total = len(sums_N), sizes_N.sum()
    if units < FEWEST:
        return math.nan
    residuals_N = sums_N - sums_N.sum() / total * sizes_N
    return float(math.sqrt(units / (units - 1) * np.square(residuals_N).sum()) / total)


def values(found: dict[str, Score]) -> dict[str, float]:
    """The value of each metric."""
    return {metric: score.value for metric, score in found.items()}


def changes(found: dict[str, Score], full: dict[str, Score]) -> dict[str, Change]:
    """The change of each metric from the scores `full`, in percent."""
    return {metric: score.change(full[metric]) for metric, score in found.items()}


def points(found: dict[str, Score], full: dict[str, Score]) -> dict[str, Change]:
    """The change of each accuracy from the scores `full`, in points."""
    return {metric: score.points(full[metric]) for metric, score in found.items() if not score.is_log}


def amounts(changes: dict[str, Change]) -> dict[str, float]:
    """The change of each metric."""
    return {metric: change.amount for metric, change in changes.items()}


def errors(changes: dict[str, Change]) -> dict[str, float]:
    """The standard error of each metric's change."""
    return {metric: change.error for metric, change in changes.items()}


def facts(found: dict[str, Score]) -> dict[str, str]:
    """A fact for the caption of a page: the documents and examples that its standard errors are over."""
    counts = []
    for metric, score in found.items():
        if score.sums_N is not None:
            units = "documents of the text" if score.is_log else f"examples of {metric}"
            counts.append(f"{len(score.sums_N)} {units}")
    return {"standard errors are over": f"{', '.join(counts)}; fewer than {FEWEST} have none"} if counts else {}


def change_columns(metrics: Iterable[str], unit: str = "%") -> list[str]:
    """Names of the columns that `change_cells` fills."""
    return [column for metric in metrics for column in (f"{metric} change, {unit}", "its error")]


def change_cells(changes: dict[str, Change]) -> list[float]:
    """The cells of a table that show changes with their standard errors."""
    return [number for change in changes.values() for number in change]


def text(found: dict[str, Score]) -> str:
    """One line for the terminal."""
    return ", ".join(f"{metric} {score.value:.4f}" for metric, score in found.items())
