"""The order of a run's sequences: which window of the training text each one is.

The training text is one stream of tokens cut into windows of seq_len; in a mixture, one stream for each source. Grain
shuffles the windows of a source anew each epoch and gives random access to the shuffled order, and the shares alone say
which source a sequence comes from (`mixture.Interleave`). So a sequence is a function of (data, seed, its number).
"""

import math
from typing import NamedTuple

import grain

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.config import Config
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.data.mixture import Interleave


class SourceUse(NamedTuple):
    """How much a run trains on a source.

    name, share: as of `dataset.Source`.
    sequences: in one epoch of the source.
    epochs: that the whole run makes of it.
    is_validated: whether it has held-out tokens to predict.
    """

    name: str
    share: float
    sequences: int
    epochs: float
    is_validated: bool

    @property
    def text(self) -> str:
        """A line to print."""
        line = f"{100 * self.share:.4g}% {self.name}: {self.epochs:.2f} epochs of {self.sequences:,} sequences"
        return line if self.is_validated else line + "; not validated, as it has no held-out tokens"


class Order:
    """The sequences of a run, numbered from 0.

    Attributes:
      sources: what the sequences are drawn from.
      windows_of: number of windows of each source in an epoch.
    Raises: UserError that names a source too short for a sequence, or for the steps of the run.
    """

    def __init__(self, config: Config, dataset: Dataset):
        self._config = config
        self.sources = dataset.sources
        self.windows_of = [(source.train.tokens - 1) // config.seq_len for source in self.sources]
        self._interleave = Interleave([source.share for source in self.sources])
        self._check_enough()
        # Windows are shuffled as numbers. Grain seeds the shuffle of each epoch anew. Sources have seeds of their own,
        # as equally large ones would be shuffled alike.
        self._shuffled = []
        for number, windows in enumerate(self.windows_of):
            source = grain.MapDataset.range(windows).seed(config.seed + number).shuffle()
            self._shuffled.append(source.repeat(config.data.epochs) if config.data.epochs > 1 else source)

    def _check_enough(self) -> None:
        config = self._config
        for source, windows in zip(self.sources, self.windows_of):
            if not windows:
                raise UserError(
                    f"config.seq_len: expected less than the {source.train.tokens} training tokens of {source.name}, "
                    f"found {config.seq_len}"
                )
        epochs = self.epochs(config.steps)
        most = max(epochs)
        if most > config.data.epochs:
            source, windows = list(zip(self.sources, self.windows_of))[epochs.index(most)]
            less = "" if len(self.sources) == 1 else f", or give {source.name} less weight in the mixture"
            raise UserError(
                f"config.data.epochs: {config.steps} steps of {config.batch_size} sequences need {most:.2f} epochs "
                f"of {source.name}, which has {windows} sequences; set it to {math.ceil(most)}, "
                f"or train fewer steps{less}"
            )

    def epochs(self, step: int) -> list[float]:
        """Number of passes over the training tokens of each source that are made before this step."""
        counts = self._interleave.counts(step * self._config.batch_size)
        return [count / windows for count, windows in zip(counts, self.windows_of)]

    def uses(self) -> list[SourceUse]:
        """How much the run trains on each source."""
        epochs = self.epochs(self._config.steps)
        return [
            SourceUse(source.name, float(source.share), windows, of_source, source.validation.tokens > 1)
            for source, windows, of_source in zip(self.sources, self.windows_of, epochs)
        ]

    def start(self, number: int) -> int:
        """The position in the training split at which a sequence begins."""
        source, of_source = self._interleave.place(number)
        window = int(self._shuffled[source][of_source])
        return self.sources[source].train.start + window * self._config.seq_len
