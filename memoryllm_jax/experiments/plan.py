"""What the runs of a protocol cost, before they are trained."""

import dataclasses
import functools

import numpy as np

from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.experiments import outcomes, runner
from memoryllm_jax.experiments.protocol import Run
from memoryllm_jax.experiments.work import Selection, Work
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

    def text(self, work: Work, jobs: int, speed: float) -> str:
        """A table of the runs, and the cost of those that are left: of training, as scoring takes seconds.

        A run that a sweep and an experiment share stands with the experiment, once the rate is chosen.

        Args:
          work: the selected runs.
          jobs: number of processes at a time.
          speed: FLOP/s of a process.
        """
        left = {run.key for run in work.left if outcomes.loss(run, self._workdir) is None}
        order = ["sweep", *self._selection.experiments]
        parts: dict[tuple[str, str, str], list[Run]] = {}
        for run in (*work.done, *work.failed, *work.left):
            names = [name for name in self._selection.experiments if name in run.experiments]
            parts.setdefault((names[0] if names else "sweep", run.size, run.vocabulary), []).append(run)
        lines = [f"{'':32}  runs  left  M tokens   TFLOP"]
        total = 0.0
        for part in sorted(parts, key=lambda part: order.index(part[0])):
            to_do = [run for run in parts[part] if run.key in left]
            costs = list(map(self.cost, to_do))
            total += sum(costs)
            tokens = sum(run.tokens for run in to_do) / 1e6
            longest = f"   the longest {max(costs) / speed / 60:.0f} minutes" if costs else ""
            counts = f"{len(parts[part]):5} {len(to_do):5} {tokens:9.1f} {sum(costs) / 1e12:7.0f}"
            lines.append(f"{' '.join(part):32} {counts}{longest}")
        lines += [f"has diverged: {run}" for run in work.failed]
        lines += [f"has no rate, as all diverged: {setting}" for setting in work.without_rate]
        hours = total / speed / jobs / 3600
        lines.append(f"{hours:.1f} hours for {jobs} processes of {speed / 1e9:g} GFLOP/s each; a start takes time too")
        return "\n".join(lines)

    def _count_rows(self, vocabulary: str, step: int) -> float:
        """Mean number of distinct ids in a batch of `step` tokens."""
        stream = self._data(vocabulary).train
        batches = min(_BATCHES, stream.tokens // step)
        ids = stream.read(0, batches * step).reshape(batches, step)
        return float(np.mean([len(np.unique(batch)) for batch in ids]))
