"""The part of a protocol that is run, and how much of it is done."""

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.common.fields import did_you_mean
from memoryllm_jax.experiments import outcomes, rates, scoring
from memoryllm_jax.experiments.protocol import Protocol, Run, Setting


class Selection:
    """The part of a protocol that is run: all of it, or what --only names.

    Args:
      only: names of experiments, variants, sizes and vocabularies. Of each kind of which one is named, only the named
        ones are selected.
    Raises: ArgumentError for an unknown name.
    """

    def __init__(self, protocol: Protocol, only: Collection[str] = ()):
        kinds = {
            "experiments": [experiment.name for experiment in protocol.experiments],
            "variants": [variant.name for variant in protocol.variants],
            "sizes": list(protocol.sizes),
            "vocabularies": list(protocol.vocabularies),
        }
        known = [name for names in kinds.values() for name in names]
        for name in only:
            if name not in known:
                raise ArgumentError("only", f"expected names of the protocol, found {name}{did_you_mean(name, known)}")
        self._chosen = {kind: [name for name in names if name in only] or names for kind, names in kinds.items()}
        self.protocol = protocol
        settings = self.settings()
        if not settings:
            raise ArgumentError("only", f"expected names that share runs, found {', '.join(only)}")
        for setting in settings:  # a config that is not valid is refused before any run
            protocol.sweep_run(setting, protocol.sweep.rates[0])

    @property
    def experiments(self) -> list[str]:
        return self._chosen["experiments"]

    @property
    def vocabularies(self) -> list[str]:
        return list(dict.fromkeys(setting.vocabulary for setting in self.settings()))

    def settings(self, experiment: str = "") -> list[Setting]:
        """The selected settings of an experiment; "": of all that are selected."""
        found = self.protocol.settings([experiment] if experiment else self.experiments)
        return [setting for setting in found if self._takes(setting)]

    def swept(self, experiment: str = "") -> list[Setting]:
        """The settings whose sweeps these need."""
        return list(dict.fromkeys(map(self.protocol.swept, self.settings(experiment))))

    def takes(self, run: Run) -> bool:
        """Whether a run of an experiment is selected."""
        return self._takes(run.setting) and not set(self.experiments).isdisjoint(run.experiments)

    def _takes(self, setting: Setting) -> bool:
        return (
            setting.variant in self._chosen["variants"]
            and setting.size in self._chosen["sizes"]
            and setting.vocabulary in self._chosen["vocabularies"]
        )


class Work(NamedTuple):
    """The selected runs by their state.

    Attributes:
      to_do: what can be trained or scored now, in this order.
      waiting: runs whose rate is not chosen yet, with the middle rate of the sweep in its place.
      done: runs of sweeps that are trained, and runs of experiments that are scored.
      failed: runs that diverged, and those that the caller of `read_work` names as failed.
      unneeded: done runs whose checkpoints nothing needs any more.
      without_rate: settings for which no rate can be chosen, as all diverged or a run of the sweep failed.
    """

    to_do: list[Run]
    waiting: list[Run]
    done: list[Run]
    failed: list[Run]
    unneeded: list[Run]
    without_rate: list[Setting]

    @property
    def left(self) -> list[Run]:
        return [*self.to_do, *self.waiting]


def read_work(selection: Selection, workdir: str, failed: Collection[str] = ()) -> Work:
    """Reads from the files what is done.

    Args:
      failed: keys of runs that are not tried again.
    """
    protocol = selection.protocol
    choices = {setting: outcomes.sweep_choice(protocol, workdir, setting) for setting in selection.swept()}
    chosen = {setting: choice.rate for setting, choice in choices.items() if choice.rate is not None}
    of_experiments = protocol.experiment_runs(chosen)
    needed = {run.key for run in of_experiments}  # also by experiments that are not selected
    to_do, done, gave_up, unneeded = [], [], [], []
    for run in _runs(selection, choices, of_experiments):
        if run.key in failed:
            gave_up.append(run)
        elif not run.experiments:
            missing = choices[run.setting].missing
            if run.rate in missing:
                to_do.append(run)
            else:
                done.append(run)
            if not missing and run.key not in needed:
                unneeded.append(run)
        elif scoring.is_scored(run.folder(workdir)):
            if not set(run.experiments) & set(protocol.keep):
                unneeded.append(run)
            done.append(run)
        elif outcomes.has_diverged(run, workdir):
            gave_up.append(run)
        else:
            to_do.append(run)
    still_swept = {run.setting for run in to_do if not run.experiments}
    without_rate = [setting for setting in choices if setting not in chosen and setting not in still_swept]
    known = {run.key for run in (*to_do, *done, *gave_up)}
    row = protocol.sweep.rates
    expected = {setting: row[len(row) // 2] for setting, choice in choices.items() if choice.missing}
    waiting = [run for run in protocol.experiment_runs(expected) if selection.takes(run) and run.key not in known]
    return Work(to_do, waiting, done, gave_up, unneeded, without_rate)


def _runs(selection: Selection, choices: Mapping[Setting, rates.Choice], of_experiments: list[Run]) -> Iterable[Run]:
    """The selected runs, each once: experiment by experiment, the sweeps that it needs first.

    Args:
      of_experiments: all runs of experiments that are known so far.
    """
    of_experiments = [run for run in of_experiments if selection.takes(run)]
    found = {}
    for name in selection.experiments:
        for setting in selection.swept(name):
            for rate in (*choices[setting].losses, *choices[setting].missing):
                run = selection.protocol.sweep_run(setting, rate)
                found.setdefault(run.key, run)
        found |= {run.key: run for run in of_experiments if name in run.experiments}
    return found.values()
