"""What the runs of a protocol cost, before they are trained."""

import dataclasses
import functools
import itertools

import numpy as np

from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.experiments import runner
from memoryllm_jax.experiments.protocol import Run
from memoryllm_jax.experiments.runner import Selection
from memoryllm_jax.model.flops import train_flops

_BATCHES = 16  # whose distinct ids are counted


class Plan:
    """The cost of the selected runs.

    Args:
      workdir: has the prepared data of all their vocabularies.
    """

    def __init__(self, selection: Selection, workdir: str):
        self._selection, self._workdir = selection, workdir
        self._data = functools.cache(lambda vocabulary: Dataset(runner.data_path(workdir, vocabulary)))
        self._rows = functools.cache(self._count_rows)

    def cost(self, run: Run) -> float:
        """FLOPs of training a run, by the formula of model/flops.py, without its validation."""
        model = dataclasses.replace(run.config.model, vocab_size=self._data(run.vocabulary).vocab_size)
        config = dataclasses.replace(run.config, model=model)
        step = config.batch_size * config.seq_len
        return config.steps * train_flops(config, step, self._rows(run.vocabulary, step))

    def text(self, jobs: int, speed: float) -> str:
        """A table of the runs, done or not.

        Args:
          jobs: number of processes at a time.
          speed: FLOP/s of a process.
        """
        lines = [f"{'':32}  runs  M tokens   TFLOP"]
        total = 0.0
        for name, runs in self._parts():
            flops = sum(map(self.cost, runs))
            total += flops
            longest = max(map(self.cost, runs)) / speed / 60
            lines.append(
                f"{name:32} {len(runs):5} {sum(run.tokens for run in runs) / 1e6:9.1f} {flops / 1e12:7.0f}"
                f"   the longest {longest:.0f} minutes"
            )
        hours = total / speed / jobs / 3600
        lines.append(f"{hours:.1f} hours for {jobs} processes of {speed / 1e9:g} GFLOP/s each; a start takes time too")
        return "\n".join(lines)

    def _parts(self) -> list[tuple[str, list[Run]]]:
        """The runs by experiment, size and vocabulary. For a rate that is not chosen, the middle of the row stands."""
        protocol = self._selection.protocol
        middle = protocol.sweep.rates[len(protocol.sweep.rates) // 2]
        rates = {setting: middle for setting in self._selection.swept()}
        rates |= runner.chosen_rates(protocol, self._workdir, rates)
        parts: dict[str, list[Run]] = {}
        for setting, rate in itertools.product(self._selection.swept(), protocol.sweep.rates):
            name = f"sweep {setting.size} {setting.vocabulary}"
            parts.setdefault(name, []).append(protocol.sweep_run(setting, rate))
        swept = {run.key for runs in parts.values() for run in runs}
        for run in protocol.experiment_runs(rates):
            if self._selection.takes(run) and run.key not in swept:
                parts.setdefault(f"{run.experiments[0]} {run.size} {run.vocabulary}", []).append(run)
        return list(parts.items())

    def _count_rows(self, vocabulary: str, step: int) -> float:
        """Mean number of distinct ids in a batch of `step` tokens."""
        stream = self._data(vocabulary).train
        batches = min(_BATCHES, stream.tokens // step)
        ids = stream.read(0, batches * step).reshape(batches, step)
        return float(np.mean([len(np.unique(batch)) for batch in ids]))
