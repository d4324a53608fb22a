"""What finished runs of a protocol say: held-out losses, and differences between variants with their intervals.

Variants are compared at equal size, vocabulary, tokens and seeds. Losses of the whole text are in bits per byte, so
that vocabularies can be compared; those of a split are in nats a token.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.config import Config
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.experiments import heldout, intervals, runner, scoring, splits
from memoryllm_jax.experiments.intervals import Estimate, Interval, SeedSpread
from memoryllm_jax.experiments.protocol import Protocol, Run
from memoryllm_jax.experiments.scoring import Scores
from memoryllm_jax.experiments.splits import Split


class Cell(NamedTuple):
    """Where variants are compared."""

    size: str
    vocabulary: str
    tokens: int


class Group(NamedTuple):
    """Held-out targets whose mean loss is taken: all of them, or a group of a split.

    split, group: name of the split and number of the group; (scoring.ALL, 0): all targets, in bits per byte.
    label: of the group.
    """

    split: str
    group: int
    label: str


ALL = Group(scoring.ALL, 0, "all targets")


class Text:
    """The held-out text of a vocabulary, with its splits.

    Attributes:
      vocab_size: number of token ids.
      bytes_per_token: of the training text.
      splits: of the targets.
      documents: resamples the documents.
    Raises: UserError.
    """

    def __init__(self, data: Dataset, context: int):
        self.vocab_size = data.vocab_size
        self.bytes_per_token = data.train.bytes / data.train.tokens
        self._text = heldout.open_text(data, context)
        self.splits: list[Split] = splits.of_text(self._text, data)
        self.documents = intervals.Documents(len(self._text.bytes_D))
        self.tokens = len(self._text.targets)
        self.bytes = float(self._text.bytes_D.sum())
        self.effective = intervals.effective(self._text.bytes_D)
        self._tokens = scoring.sums(np.ones(self.tokens), self._text, self.splits)

    def scores(self, folder: str, permuted: bool = False) -> Scores:
        """The scores of a run.

        Args:
          permuted: those with permuted rows, which have no groups.
        Raises: UserError if they are missing, damaged, or of another text or other groups.
        """
        found = scoring.read(folder, self._text, permuted)
        expected = {name: self._tokens[name].shape for name in ((scoring.ALL,) if permuted else self._tokens)}
        shapes = {name: sums.shape for name, sums in found.items()}
        if shapes != expected:
            raise UserError(f"{folder}: expected scores of the groups {expected}, found {shapes}; score the run again")
        return found

    def units(self, group: Group) -> np.ndarray:
        """What the nats of a group are divided by, in each document: bits of its bytes, or its number of tokens."""
        if group is ALL:
            return self._text.bytes_D * math.log(2)
        return self._tokens[group.split][group.group]

    def tokens_of(self, group: Group) -> int:
        """Number of targets of a group."""
        return int(self._tokens[group.split][group.group].sum())

    def groups(self, split: Split) -> list[Group]:
        """The groups of a split that have targets."""
        every = [Group(split.name, number, label) for number, label in enumerate(split.groups)]
        return [group for group in every if self.tokens_of(group)]


class Difference(NamedTuple):
    """The loss of a variant less that of another one in a cell.

    estimate: with replicates that are drawn together with those of all other differences.
    seeds: number of seeds that both have.
    spread: of the losses over seeds; without freedom, the estimate does not cover the choice of seeds.
    """

    estimate: Estimate
    seeds: int
    spread: SeedSpread


class Results:
    """The finished runs of a protocol.

    Args:
      runs: finished and scored.
      workdir: folder of the protocol, with `data/VOCABULARY` and the runs' folders.
    Attributes:
      texts: {vocabulary: its held-out text}, of the vocabularies that have runs.
      variants: names of those that have runs, in the protocol's order.
    Raises: UserError if there are no runs, or their scores are missing or of another text.
    """

    def __init__(self, protocol: Protocol, runs: Sequence[Run], workdir: str):
        if not runs:
            raise UserError(f"{workdir}: expected finished runs of the protocol, found none")
        self.protocol, self.runs, self.workdir = protocol, list(runs), workdir
        found = {run.variant for run in runs}
        self.variants = [variant.name for variant in protocol.variants if variant.name in found]
        self.texts: dict[str, Text] = {}
        self._runs: dict[tuple[str, Cell], dict[int, Run]] = {}  # by seed
        self._scores: dict[tuple[str, bool], Scores] = {}  # by key, and whether with permuted rows
        contexts: dict[str, int] = {}
        for run in runs:
            context = contexts.setdefault(run.vocabulary, run.config.seq_len)
            if run.config.seq_len != context:
                raise UserError(
                    f"protocol: seq_len: expected {context} in all runs of a vocabulary, which are scored in the same "
                    f"windows, found {run.config.seq_len} in {run}"
                )
            if run.vocabulary not in self.texts:
                data = Dataset(runner.data_path(workdir, run.vocabulary))
                self.texts[run.vocabulary] = Text(data, context)
            text, folder = self.texts[run.vocabulary], run.folder(workdir)
            self._scores[run.key, False] = text.scores(folder)
            if scoring.can_permute(run.config.model):
                self._scores[run.key, True] = text.scores(folder, permuted=True)
            self._runs.setdefault((run.variant, cell_of(run)), {})[run.seed] = run
        self.difference = functools.cache(self._difference)
        self._spread = functools.cache(self._spread_of_cell)

    def config(self, run: Run) -> Config:
        """The config of a run with the number of ids of its data."""
        model = dataclasses.replace(run.config.model, vocab_size=self.texts[run.vocabulary].vocab_size)
        return dataclasses.replace(run.config, model=model)

    def seeds(self, variant: str, cell: Cell) -> dict[int, Run]:
        """{seed: run} of a variant in a cell."""
        return dict(sorted(self._runs.get((variant, cell), {}).items()))

    def cells(self, *variants: str) -> list[Cell]:
        """Where all of these variants have runs of a common seed, in the order of sizes, vocabularies and tokens.

        Args:
          variants: names; without any: all cells. "" stands for the variant before it with permuted rows.
        """
        found = {cell for variant, cell in self._runs if not variants or variant == variants[0]}
        sizes, vocabularies = list(self.protocol.sizes), list(self.protocol.vocabularies)
        found = {cell for cell in found if len(variants) < 2 or self._common(*variants, cell)}
        return sorted(found, key=lambda cell: (sizes.index(cell[0]), vocabularies.index(cell[1]), cell.tokens))

    def megabytes(self, cell: Cell) -> float:
        """The text that a run of the cell reads, in 1e6 bytes."""
        return cell.tokens * self.texts[cell.vocabulary].bytes_per_token / 1e6

    def loss(self, run: Run, group: Group = ALL) -> float:
        """The held-out loss of a run: in bits per byte, or in nats a token of a group."""
        return self._loss(run, group, False)

    def nats(self, run: Run) -> float:
        """The held-out loss of a run in nats a token."""
        return float(self._scores[run.key, False][scoring.ALL].sum() / self.texts[run.vocabulary].tokens)

    def _loss(self, run, group, permuted) -> float:
        units_D = self.texts[run.vocabulary].units(group)
        return float(self._scores[run.key, permuted][group.split][group.group].sum() / units_D.sum())

    def mean(self, variant: str, cell: Cell) -> Interval:
        """The loss of a variant in a cell in bits per byte, averaged over seeds, with its interval over documents."""
        runs, text = self.seeds(variant, cell).values(), self.texts[cell.vocabulary]
        return text.documents.mean(self._sums(runs, ALL, False), text.units(ALL))

    def _difference(self, a: str, b: str, cell: Cell, group: Group = ALL) -> Difference | None:
        """The loss of variant `a` less that of variant `b` in a cell; None if they have no seed in common.

        Args:
          b: "": `a` itself with permuted rows.
          group: the held-out targets that losses are averaged over.
        """
        seeds = self._common(a, b, cell)
        if not seeds:
            return None
        text = self.texts[cell.vocabulary]
        sums_SD = self._sums([self._runs[a, cell][seed] for seed in seeds], group, False)
        sums_SD -= self._sums([self._runs[b or a, cell][seed] for seed in seeds], group, not b)
        spread = self.spread(cell, group, not b)
        # The difference of two runs varies with twice the variance of one. That of one checkpoint from itself with
        # permuted rows has a spread of its own.
        of_seed = spread.times(math.sqrt(2) if b else 1.0)
        draw = zlib.crc32(f"{a} {b} {cell}".encode())
        return Difference(text.documents.estimate(sums_SD, text.units(group), of_seed, draw), len(seeds), spread)

    def spread(self, cell: Cell, group: Group = ALL, permuted: bool = False) -> SeedSpread:
        """The spread of the losses over seeds that differences in a cell are given.

        It is shared by all cells of the vocabulary that are as long or shorter (`intervals.shared_spread`): runs vary
        less with the seed the longer they are, so that the spread of longer ones would be too small.

        Args:
          permuted: of what the losses rise by with permuted rows.
        """
        found = [
            (other.tokens, self._spread(other, group, permuted))
            for other in self.cells()
            if other.vocabulary == cell.vocabulary and other.tokens <= cell.tokens
        ]
        known = sorted((tokens, spread) for tokens, spread in found if spread.freedom)
        return intervals.shared_spread(self._spread(cell, group, permuted), [spread for _, spread in known])

    def own_spreads(self) -> dict[Cell, SeedSpread]:
        """The spread of the losses over seeds in bits per byte, of each cell that has several seeds."""
        found = {cell: self._spread(cell, ALL, False) for cell in self.cells()}
        return {cell: spread for cell, spread in found.items() if spread.freedom}

    def _common(self, a: str, b: str, cell: Cell) -> list[int]:
        """The seeds that two variants have in a cell."""
        runs, others = self._runs.get((a, cell), {}), self._runs.get((b or a, cell), {})
        return sorted(seed for seed, run in runs.items() if seed in others and (b or (run.key, True) in self._scores))

    def _spread_of_cell(self, cell: Cell, group: Group, permuted: bool) -> SeedSpread:
        """The spread of the losses of a cell, or of what its runs lose with permuted rows."""
        found = [list(runs.values()) for (_, other), runs in self._runs.items() if other == cell]
        seeds = sorted({run.seed for runs in found for run in runs})
        table_VS = np.full((len(found), len(seeds)), math.nan)
        for row, runs in enumerate(found):
            for run in runs:
                loss = self.loss(run, group)
                if permuted:
                    known = (run.key, True) in self._scores
                    loss = self._loss(run, group, True) - loss if known else math.nan
                table_VS[row, seeds.index(run.seed)] = loss
        return intervals.spread_of_seeds(table_VS)

    def _sums(self, runs: Iterable[Run], group: Group, permuted: bool) -> np.ndarray:
        """Nats of a group by run and document."""
        return np.array([self._scores[run.key, permuted][group.split][group.group] for run in runs])


def cell_of(run: Run) -> Cell:
    return Cell(run.size, run.vocabulary, run.tokens)
