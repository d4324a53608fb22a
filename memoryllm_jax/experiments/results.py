"""What finished runs of a protocol say: held-out losses, and differences between variants with their intervals.

Variants are compared at equal size, vocabulary, tokens and seeds. Losses of the whole text are in bits per byte, so
that vocabularies can be compared; those of a split are in nats a token.
"""

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.config import Config
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.experiments import heldout, intervals, splits
from memoryllm_jax.experiments.intervals import Interval
from memoryllm_jax.experiments.protocol import Protocol, Run
from memoryllm_jax.experiments.splits import Split


class Cell(NamedTuple):
    """Where variants are compared."""

    size: str
    vocabulary: str
    tokens: int


class Family(NamedTuple):
    """Variants that are shown together.

    name: for headings and files.
    variants: their names.
    """

    name: str
    variants: tuple[str, ...]


class Group(NamedTuple):
    """Held-out targets whose mean loss is taken: all of them, or a group of a split.

    split, group: name of the split and number of the group; ("", 0): all targets, in bits per byte.
    label: of the group.
    """

    split: str
    group: int
    label: str


ALL = Group("", 0, "all targets")


class Text:
    """The held-out text of a vocabulary, with its splits.

    Attributes:
      vocab_size: number of token ids.
      splits: of the targets.
      documents: resamples the documents.
    Raises: UserError.
    """

    def __init__(self, data: Dataset, context: int):
        self.vocab_size = data.vocab_size
        self._text = heldout.open_text(data, context)
        self.splits: list[Split] = splits.of_text(self._text, data)
        self.documents = intervals.Documents(len(self._text.bytes_D))
        self.tokens = len(self._text.targets)
        self.bytes = float(self._text.bytes_D.sum())
        self._tokens = self._sums(np.ones(self.tokens))

    def scores(self, folder: str) -> dict[str, np.ndarray]:
        """Nats by document [1, D], and by group and document of each split [groups, D]. Raises: UserError."""
        return self._sums(heldout.read(folder, self._text))

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

    def _sums(self, values_N):
        by_split = {split.name: split.by_document(values_N, self._text) for split in self.splits}
        return by_split | {"": self._text.by_document(values_N)[None]}


class Compared(NamedTuple):
    """A variant in a cell, beside the variant that it is compared with.

    losses: of each seed, averaged over the held-out text.
    loss: their mean, with its interval over documents.
    against: name of the other variant; "" for a family's reference.
    difference: of the losses, this one's less the other's; None if they have no seed in common.
    """

    losses: dict[int, float]
    loss: Interval
    against: str
    difference: Interval | None


class Results:
    """The finished runs of a protocol.

    Args:
      runs: finished and scored.
      workdir: folder of the protocol, with `data/VOCABULARY` and the runs' folders.
    Attributes:
      texts: {vocabulary: its held-out text}, of the vocabularies that have runs.
    Raises: UserError if there are no runs, or their scores are missing or of another text.
    """

    def __init__(self, protocol: Protocol, runs: Sequence[Run], workdir: str):
        if not runs:
            raise UserError(f"{workdir}: expected finished runs of the protocol, found none")
        self.protocol, self.runs, self.workdir = protocol, list(runs), workdir
        self.texts: dict[str, Text] = {}
        self._scores: dict[str, dict[str, np.ndarray]] = {}
        self._seeds: dict[tuple[str, Cell], dict[int, Run]] = {}
        contexts: dict[str, int] = {}
        for run in runs:
            context = contexts.setdefault(run.vocabulary, run.config.seq_len)
            if run.config.seq_len != context:
                raise UserError(
                    f"protocol: seq_len: expected {context} in all runs of a vocabulary, which are scored in the same "
                    f"windows, found {run.config.seq_len} in {run}"
                )
            if run.vocabulary not in self.texts:
                data = Dataset(os.path.join(workdir, "data", run.vocabulary))
                self.texts[run.vocabulary] = Text(data, context)
            self._scores[run.key] = self.texts[run.vocabulary].scores(run.folder(workdir))
            self._seeds.setdefault((run.variant, cell_of(run)), {})[run.seed] = run

    def config(self, run: Run) -> Config:
        """The config of a run with the number of ids of its data."""
        model = dataclasses.replace(run.config.model, vocab_size=self.texts[run.vocabulary].vocab_size)
        return dataclasses.replace(run.config, model=model)

    def families(self) -> list[Family]:
        """The variants that have runs, and the controls with what they control."""
        names = [variant.name for variant in self.protocol.variants]
        found = {run.variant for run in self.runs}
        variants = [name for name in names if name in found and not self.controlled(name)]
        controls = [name for name in names if name in found and self.controlled(name)]
        with_controls = [name for name in variants if name in map(self.controlled, controls)]
        families = [Family("variants", tuple(variants)), Family("controls", (*with_controls, *controls))]
        return [family for family in families if family.variants]

    def cells(self, family: Family) -> list[Cell]:
        """Where variants of a family can be compared, or else where any has runs.

        They are in the order of sizes, vocabularies and tokens.
        """
        found = {cell for variant, cell in self._seeds if variant in family.variants}
        found = {cell for cell in found if self._compared(family, cell)} or found
        sizes, vocabularies = list(self.protocol.sizes), list(self.protocol.vocabularies)
        return sorted(found, key=lambda cell: (sizes.index(cell[0]), vocabularies.index(cell[1]), cell.tokens))

    def last_cells(self, family: Family) -> list[Cell]:
        """For each size and vocabulary, the fewest cells that have each variant at its longest compared run."""
        chosen, shown = [], set()
        for cell in reversed(self.cells(family)):
            compared = {(cell[:2], name) for name in self._compared(family, cell)}
            if not compared <= shown:
                shown |= compared
                chosen.append(cell)
        return chosen[::-1]

    def _compared(self, family: Family, cell: Cell) -> list[str]:
        """The variants that have runs in a cell, and so has the one that they are compared with."""
        found = self.seeds(family, cell)
        return [variant for variant in found if self.against(family, variant) in found]

    def widest_cells(self, family: Family) -> list[Cell]:
        """For each vocabulary the cell of `last_cells` with the most variants; of several, that of the largest size."""
        widest: dict[str, Cell] = {}
        for cell in self.last_cells(family):
            before = widest.get(cell.vocabulary)
            if before is None or len(self.seeds(family, cell)) >= len(self.seeds(family, before)):
                widest[cell.vocabulary] = cell
        return [widest[name] for name in self.protocol.vocabularies if name in widest]

    def across_vocabularies(self, family: Family) -> dict[str, list[Cell]]:
        """{size: cells of several vocabularies with equally many tokens}, where most vocabularies have runs."""
        found = {}
        for size in dict.fromkeys(cell.size for cell in self.cells(family)):
            of_length: dict[int, list[Cell]] = {}
            for cell in self.cells(family):
                if cell.size == size and self._compared(family, cell):
                    of_length.setdefault(cell.tokens, []).append(cell)
            _, _, cells = max(((len(cells), tokens, cells) for tokens, cells in of_length.items()), default=(0, 0, []))
            if len(cells) > 1:
                found[size] = cells
        return found

    def loss(self, run: Run, group: Group = ALL) -> float:
        """The held-out loss of a run: in bits per byte, or in nats a token of a group."""
        units_D = self.texts[run.vocabulary].units(group)
        return float(self._scores[run.key][group.split][group.group].sum() / units_D.sum())

    def nats(self, run: Run) -> float:
        """The held-out loss of a run in nats a token."""
        return float(self._scores[run.key][""].sum() / self.texts[run.vocabulary].tokens)

    def seeds(self, family: Family, cell: Cell) -> dict[str, dict[int, Run]]:
        """{variant: {seed: run}} of a family's variants that have runs in a cell."""
        found = {variant: self._seeds.get((variant, cell), {}) for variant in family.variants}
        return {variant: dict(sorted(runs.items())) for variant, runs in found.items() if runs}

    def controlled(self, name: str) -> str:
        """The variant that a variant is a control of: one of the same architecture, whose rate it takes; "" if none."""
        variant = self.protocol.variant(name)
        if not variant.rate_of:
            return ""
        other = self.protocol.variant(variant.rate_of)
        same = (variant.architecture or variant.name) == (other.architecture or other.name)
        return other.name if same else ""

    def against(self, family: Family, variant: str) -> str:
        """The variant that a variant is compared with: what it is a control of, or else the protocol's first one."""
        other = self.controlled(variant) or self.protocol.variants[0].name
        return other if other != variant and other in family.variants else ""

    def compare(self, family: Family, cell: Cell, group: Group = ALL) -> dict[str, Compared]:
        """Compares the variants of a family in a cell.

        Args:
          group: the held-out targets that losses are averaged over.
        """
        found = self.seeds(family, cell)
        seeds = sorted({seed for runs in found.values() for seed in runs})
        text = self.texts[cell.vocabulary]
        units_D = text.units(group)
        losses = {
            variant: {seed: self.loss(run, group) for seed, run in runs.items()} for variant, runs in found.items()
        }
        table_VS = np.array([[losses[variant].get(seed, math.nan) for seed in seeds] for variant in found])
        spread = intervals.spread_of_seeds(table_VS)
        out = {}
        for variant, runs in found.items():
            other = self.against(family, variant)
            common = [seed for seed in runs if seed in found.get(other, {})]
            difference = None
            if common:
                a_SD, b_SD = (self._sums(found[name], common, group) for name in (variant, other))
                difference = text.documents.difference(a_SD, b_SD, units_D, spread)
            loss = text.documents.mean(self._sums(runs, list(runs), group), units_D)
            out[variant] = Compared(losses[variant], loss, other, difference)
        return out

    def _sums(self, runs, seeds, group) -> np.ndarray:
        """Nats of a group by seed and document."""
        return np.array([self._scores[runs[seed].key][group.split][group.group] for seed in seeds])


def cell_of(run: Run) -> Cell:
    return Cell(run.size, run.vocabulary, run.tokens)
