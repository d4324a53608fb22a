"""The answers to the contrasts of a protocol: all their differences together, and the crossings that were measured."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from memoryllm_jax.experiments import costs, intervals
from memoryllm_jax.experiments.intervals import Interval
from memoryllm_jax.experiments.protocol import Contrast, Protocol
from memoryllm_jax.experiments.results import Cell, Difference, Results
from memoryllm_jax.model import flops


class Answer(NamedTuple):
    """A contrast in a cell.

    difference: in bits per byte, simultaneous over all answers.
    seeds: number of seeds that both variants have.
    covers_seeds: whether the interval covers the choice of seeds. Without it, a difference is no finding.
    """

    contrast: Contrast
    cell: Cell
    difference: Interval
    seeds: int
    covers_seeds: bool

    @property
    def finds(self) -> bool:
        """Whether a difference was found."""
        return self.covers_seeds and self.difference.finds


class Answers(NamedTuple):
    """All answers of a comparison.

    factor: how much wider the intervals are than they would be alone.
    """

    answers: list[Answer]
    factor: float

    def contrasts(self) -> list[Contrast]:
        """The contrasts that have answers."""
        return list(dict.fromkeys(answer.contrast for answer in self.answers))

    def of(self, contrast: Contrast) -> dict[Cell, Answer]:
        """The answers to one contrast."""
        return {answer.cell: answer for answer in self.answers if answer.contrast == contrast}

    def last(self, contrast: Contrast) -> dict[tuple[str, str], Answer]:
        """{(size, vocabulary): the answer after the most tokens}."""
        return {(cell.size, cell.vocabulary): answer for cell, answer in self.of(contrast).items()}


def of_results(results: Results) -> Answers:
    """The answers to all contrasts in all cells where both variants have runs."""
    found: list[tuple[Contrast, Cell, Difference]] = []
    for contrast in results.protocol.contrasts:
        for cell in results.cells(contrast.a, contrast.b):
            found.append((contrast, cell, results.difference(contrast.a, contrast.b, cell)))
    widened, factor = intervals.simultaneous([difference.estimate for _, _, difference in found])
    answers = [
        Answer(contrast, cell, interval, difference.seeds, difference.spread.freedom > 0)
        for (contrast, cell, difference), interval in zip(found, widened)
    ]
    return Answers(answers, factor)


def at_equal_text(results: Results, answers: dict[Cell, Answer]) -> dict[str, list[Answer]]:
    """{size: answers of several vocabularies, after as equal an amount of text as there is}.

    The amount is the largest that all vocabularies have runs of. Of each vocabulary, the cell nearest to it is taken.
    """
    found: dict[str, dict[str, list[Cell]]] = {}
    for cell in answers:
        found.setdefault(cell.size, {}).setdefault(cell.vocabulary, []).append(cell)
    chosen = {}
    for size, of_vocabulary in found.items():
        if len(of_vocabulary) < 2:
            continue
        amount = min(max(map(results.megabytes, cells)) for cells in of_vocabulary.values())
        chosen[size] = [
            answers[min(cells, key=lambda cell: abs(math.log(results.megabytes(cell) / amount)))]
            for cells in of_vocabulary.values()
        ]
    return chosen


class Crossing(NamedTuple):
    """Tokens after which base is ahead of a variant.

    variant: the one that base is compared with.
    parameters: those of base's attention, FFNs and norms.
    tokens: 0 where base is ahead from the first length on, infinite where it is not ahead at the last one.
    first, last: the lengths between which it was looked for; of a law, 0 and infinity.
    covers_seeds: as of `Answer`.
    """

    variant: str
    size: str
    vocabulary: str
    parameters: int
    tokens: Interval
    first: float
    last: float
    covers_seeds: bool


def crossings(results: Results) -> list[Crossing]:
    """Where base overtakes each variant that a contrast compares it with, by size and vocabulary.

    The measured differences are interpolated against the logarithm of tokens, in each replicate over documents and
    seeds. No law is assumed, so nothing is said beyond the shortest and the longest run.
    """
    found = []
    for base, variant in with_base(results.protocol):
        cells = results.cells(variant, base)
        for size, vocabulary in dict.fromkeys((cell.size, cell.vocabulary) for cell in cells):
            row = [cell for cell in cells if cell[:2] == (size, vocabulary)]
            if len(row) < 2:
                continue
            differences = [results.difference(variant, base, cell) for cell in row]
            tokens_L = np.array([cell.tokens for cell in row], float)
            values = zero_crossings(tokens_L, np.array([[difference.estimate.value] for difference in differences]))
            replicates_R = zero_crossings(tokens_L, np.stack([d.estimate.replicates_R for d in differences]))
            interval = intervals.of_replicates(float(values[0]), replicates_R)
            run = next(iter(results.seeds(base, row[0]).values()))
            parameters = flops.parameters(run.config)["active"]
            known = all(difference.spread.freedom for difference in differences)
            found.append(Crossing(variant, size, vocabulary, parameters, interval, tokens_L[0], tokens_L[-1], known))
    return found


def with_base(protocol: Protocol) -> list[tuple[str, str]]:
    """Pairs of a variant of base and a variant of another architecture that a contrast compares."""
    is_base = {variant.name for variant in protocol.variants if (variant.architecture or variant.name) == "base"}
    pairs = [(c.b, c.a) for c in protocol.contrasts if c.b in is_base and c.a not in is_base]
    return pairs + [(c.a, c.b) for c in protocol.contrasts if c.a in is_base and c.b not in ("", *is_base)]


def zero_crossings(tokens_L: np.ndarray, differences_LR: np.ndarray) -> np.ndarray:
    """Tokens after which each column of differences stays above 0, interpolated against the logarithm of tokens.

    Args:
      tokens_L: in rising order.
    Returns: float [R]; 0 where all differences are above 0, and infinity where the last one is not. NaN where a
      difference is.
    """
    below_LR = differences_LR <= 0
    crossings_R = np.where(below_LR[-1], np.inf, 0.0)
    for low in range(len(tokens_L) - 1):  # a later crossing replaces an earlier one
        rises_R = below_LR[low] & ~below_LR[low + 1]
        at, after = differences_LR[low, rises_R], differences_LR[low + 1, rises_R]
        share = -at / (after - at)
        logs = np.log(tokens_L[low]) + share * np.log(tokens_L[low + 1] / tokens_L[low])
        crossings_R[rises_R] = np.where(below_LR[-1, rises_R], np.inf, np.exp(logs))
    crossings_R[np.isnan(differences_LR).any(0)] = math.nan
    return crossings_R


def equal_costs(results: Results, contrast: Contrast) -> list[str]:
    """Names of the costs that both variants of a contrast share, at the fewest token ids that both have runs with.

    Embedding and head make up most of the parameters with many ids, where totals are nearly equal anyway.
    """
    cells = results.cells(contrast.a, contrast.b)
    cell = min(cells, key=lambda cell: results.texts[cell.vocabulary].vocab_size)
    runs: Sequence = [next(iter(results.seeds(name, cell).values())) for name in (contrast.a, contrast.b or contrast.a)]
    return costs.equal(*(costs.of_run(results.config(run), run.folder(results.workdir)) for run in runs))
