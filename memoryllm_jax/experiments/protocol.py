"""The protocol of a comparison: which models are trained, at which sizes, vocabularies, lengths and seeds.

A protocol is a Python file whose `get_protocol()` returns a `Protocol`, such as configs/protocols/small.py. Its runs
follow from it: those of the sweep, which finds a peak learning rate, and those of the experiments, which use it.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import re
import runpy
from collections.abc import Collection, Iterator, Mapping

import ml_collections

from memoryllm_jax import config as config_lib
from memoryllm_jax.common import config_files
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.common.fields import did_you_mean, flatten
from memoryllm_jax.config import RESUMABLE_FIELDS, Config

Fields = Mapping[str, object]  # {dotted name of a config field: value}
_NAME = re.compile(r"[A-Za-z0-9][-A-Za-z0-9_.]*")  # of what a protocol names, as names become folders and options


@dataclasses.dataclass(frozen=True)
class Variant:
    """What is compared: an architecture with config fields.

    Attributes:
      rate_of: the variant whose sweep finds this one's peak rate; "": its own sweep.
      rate_factor: the peak rate is that of the sweep times this.
      control_of: the variant that this one is a control of and compared with, so that no law is fitted to it; "": none.
    """

    name: str
    architecture: str = ""  # "": as `name`
    fields: Fields = dataclasses.field(default_factory=dict)
    rate_of: str = ""
    rate_factor: float = 1.0
    control_of: str = ""

    def rate(self, swept: float) -> float:
        """The peak rate, if the best of the sweep is `swept`."""
        return swept if self.rate_factor == 1 else rounded(swept * self.rate_factor)


@dataclasses.dataclass(frozen=True)
class Contrast:
    """A question that is stated before the runs: the loss of variant `a` less that of variant `b`.

    Where `b` is "", `a` is compared with itself, each token with the row of another one (`scoring.PERMUTED_FILE`).
    """

    question: str
    a: str
    b: str


@dataclasses.dataclass(frozen=True)
class Sweep:
    """How peak learning rates are found: short runs of seed 0, each with its own cosine to its end.

    Attributes:
      tokens: {vocabulary: length of each run}.
      rates: the rates that are tried first, a geometric row in rising order, at least three. If the best lies at an
        edge, the row is extended there until it does not.
      sizes: {size: the size whose rates it takes}. Sizes that stand for themselves are swept.
      most: number of rates after which a row is not extended any more.
    """

    tokens: Mapping[str, float]
    rates: tuple[float, ...]
    sizes: Mapping[str, str]
    most: int = 7


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Runs that answer one question: the product of all of these."""

    name: str
    variants: tuple[str, ...]
    sizes: tuple[str, ...]
    vocabularies: tuple[str, ...]
    tokens: tuple[float, ...]  # lengths of the runs; each is a whole run, whose learning rate decays to its end
    seeds: tuple[int, ...] = (0,)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a peak learning rate is chosen for, by name."""

    variant: str
    size: str
    vocabulary: str

    def __str__(self) -> str:
        return f"{self.variant} {self.size} {self.vocabulary}"


@dataclasses.dataclass(frozen=True)
class Run:
    """A run: one training from its first to its last step.

    Attributes:
      tokens: length of the run, rounded up to whole steps.
      config: the resolved config, without the path of the data.
      fields: what `train` is given beside the config file, without the path of the data.
      key: hash of all that decides what is trained, and the name of the run's folder.
      experiments: names of the experiments that use it; none for a run of the sweep.
    """

    setting: Setting
    tokens: int
    seed: int
    rate: float
    architecture: str
    config: Config
    fields: Fields
    key: str
    experiments: tuple[str, ...] = ()

    @property
    def variant(self) -> str:
        return self.setting.variant

    @property
    def size(self) -> str:
        return self.setting.size

    @property
    def vocabulary(self) -> str:
        return self.setting.vocabulary

    def folder(self, workdir: str) -> str:
        """The run's folder in the workdir of the protocol."""
        return os.path.join(workdir, "runs", self.key)

    def __str__(self) -> str:
        return f"{self.setting}, {self.tokens / 1e6:.2f}M tokens, rate {self.rate:g}, seed {self.seed}"


@dataclasses.dataclass(frozen=True, eq=False)  # compared by identity, so that `run` can remember its results
class Protocol:
    """All that a comparison depends on but its texts.

    Attributes:
      config: the config file that all runs share, without an architecture.
      fields: what all runs change in it.
      sizes: {size: its fields}.
      vocabularies: {vocabulary: a tokenizer as `prepare` takes it, such as sentencepiece:train:4096}.
      contrasts: what the comparison is to answer.
      warmup: warm-up as a share of the steps.
      final: the last learning rate as a share of the peak.
      held_out_sizes: sizes that fits leave out, to be checked on.
      keep: names of experiments whose runs keep their last checkpoint.
    """

    config: str
    fields: Fields
    sizes: Mapping[str, Fields]
    vocabularies: Mapping[str, str]
    variants: tuple[Variant, ...]
    sweep: Sweep
    experiments: tuple[Experiment, ...]
    contrasts: tuple[Contrast, ...] = ()
    warmup: float = 0.05
    final: float = 0.1
    held_out_sizes: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()

    def __post_init__(self):
        _check(self)

    def variant(self, name: str) -> Variant:
        return {variant.name: variant for variant in self.variants}[name]

    def swept(self, setting: Setting) -> Setting:
        """The setting in whose sweep the rate of this one is found."""
        variant = self.variant(setting.variant).rate_of or setting.variant
        return Setting(variant, self.sweep.sizes[setting.size], setting.vocabulary)

    def settings(self, of: Collection[str] = ()) -> list[Setting]:
        """The settings of the experiments, without duplicates, in the protocol's order.

        Args:
          of: names of experiments; none: all.
        """
        found = {
            Setting(*names): None
            for experiment in self.experiments
            if not of or experiment.name in of
            for names in itertools.product(experiment.variants, experiment.sizes, experiment.vocabularies)
        }
        return list(found)

    def sweep_run(self, setting: Setting, rate: float) -> Run:
        """The run that tries a rate. Raises: UserError if its config is not valid."""
        return self.run(setting, self.sweep.tokens[setting.vocabulary], 0, rate)

    def experiment_runs(self, rates: Mapping[Setting, float]) -> list[Run]:
        """The runs of all experiments, each once.

        Args:
          rates: the chosen rate of each swept setting. Runs whose rate is not chosen yet are left out.
        Raises: UserError if a config is not valid.
        """
        found: dict[str, Run] = {}
        for experiment in self.experiments:
            for setting, tokens, seed in _product(experiment):
                rate = rates.get(self.swept(setting))
                if rate is None:
                    continue
                run = self.run(setting, tokens, seed, self.variant(setting.variant).rate(rate))
                same = found.get(run.key, run)
                if same.setting != setting:
                    raise UserError(
                        f"protocol: expected runs that differ, found one run of {same.setting} and {setting}"
                    )
                names = same.experiments
                found[run.key] = dataclasses.replace(run, experiments=(*names, experiment.name))
        return list(found.values())

    @functools.cache  # noqa: B019  a process has one protocol
    def run(self, setting: Setting, tokens: float, seed: int, rate: float) -> Run:
        """One run. Raises: UserError if its config is not valid."""
        variant = self.variant(setting.variant)
        architecture = variant.architecture or variant.name
        tree = config_files.load(f"{self.config}:{architecture}")
        given = {**self.fields, **self.sizes[setting.size], **variant.fields, "seed": seed}
        _change(tree, given)
        steps = math.ceil(tokens / (tree.batch_size * tree.seq_len))
        schedule = {
            "steps": steps,
            "optimizer.peak_lr": rate,
            "optimizer.final_lr": rate * self.final,
            "optimizer.warmup_steps": round(steps * self.warmup),
        }
        _change(tree, schedule)
        given |= schedule
        config = config_lib.resolve(tree, given)
        return Run(
            setting=setting,
            tokens=steps * config.batch_size * config.seq_len,
            seed=seed,
            rate=rate,
            architecture=architecture,
            config=config,
            fields=given,
            key=_key(config, setting.vocabulary),
        )


def rounded(rate: float) -> float:
    """The rate as people write it: rates become names of runs, and 9 times 0.001 must be 0.009."""
    return float(f"{rate:.6g}")


def load(path: str) -> Protocol:
    """Reads a protocol file. Raises: UserError."""
    path = config_files.locate(path, "protocol", "configs/protocols")
    try:
        found = runpy.run_path(path)["get_protocol"]()
    except UserError:
        raise
    except Exception as error:
        problem = f"expected a file whose get_protocol() returns a Protocol, found {path}: "
        raise ArgumentError("protocol", problem + f"{type(error).__name__}: {error}") from error
    if not isinstance(found, Protocol):
        raise ArgumentError("protocol", f"expected get_protocol() to return a Protocol, found {found!r} in {path}")
    return found


def _product(experiment: Experiment) -> Iterator[tuple[Setting, float, int]]:
    # The short runs of all variants come first, so that a report of an unfinished comparison is even.
    for tokens, seed in itertools.product(sorted(experiment.tokens), experiment.seeds):
        for names in itertools.product(experiment.vocabularies, experiment.sizes, experiment.variants):
            yield Setting(names[2], names[1], names[0]), tokens, seed


def _change(tree: ml_collections.ConfigDict, given: Fields) -> None:
    """Sets fields, as the command line does. Raises: UserError that names a field that does not exist."""
    for name, value in given.items():
        config_files.check_field(tree, name)
        *groups, last = name.split(".")
        node = functools.reduce(getattr, groups, tree)
        with node.ignore_type():  # `resolve` names a value of the wrong type better
            node[last] = value


def _key(config: Config, vocabulary: str) -> str:
    """The name of a run: a hash of what decides what it trains.

    Fields with their defaults are left out, so that a new field, which changes nothing by default, changes no name.
    Neither do fields that only say where and how fast a run is computed.
    """
    defaults = flatten(Config())
    decides = {
        name: value
        for name, value in flatten(config).items()
        if value != defaults[name] and name not in RESUMABLE_FIELDS
    }
    identity = json.dumps({"vocabulary": vocabulary, "config": decides}, sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


def _check(protocol: Protocol) -> None:
    """Raises: UserError that names the part of the protocol that is not valid."""
    names = [variant.name for variant in protocol.variants]
    of_experiments = [experiment.name for experiment in protocol.experiments]
    all_names = [*names, *protocol.sizes, *protocol.vocabularies, *of_experiments]
    for name in all_names:  # --only takes names of all kinds
        if not _NAME.fullmatch(name) or all_names.count(name) > 1:
            raise UserError(
                "protocol: expected different names of letters, digits and -_. for variants, sizes, vocabularies and "
                f"experiments, found {name}{' twice' if all_names.count(name) > 1 else ''}"
            )
    swept = [variant.name for variant in protocol.variants if not variant.rate_of]
    for variant in protocol.variants:
        if variant.rate_of:
            _need(f"variant {variant.name}: rate_of", [variant.rate_of], swept, "a variant with a rate of its own")
        if variant.rate_factor <= 0:
            raise UserError(
                f"protocol: variant {variant.name}: rate_factor: expected more than 0, found {variant.rate_factor}"
            )
        if variant.control_of:
            _need(f"variant {variant.name}: control_of", [variant.control_of], names, "another variant")
    for contrast in protocol.contrasts:
        _need(f"contrast {contrast.question!r}", filter(None, (contrast.a, contrast.b)), names, "variants")
    _need("held_out_sizes", protocol.held_out_sizes, protocol.sizes)
    _need("keep", protocol.keep, of_experiments)
    for experiment in protocol.experiments:
        where = f"experiment {experiment.name}"
        _need(f"{where}: variants", experiment.variants, names)
        _need(f"{where}: sizes", experiment.sizes, protocol.sizes)
        _need(f"{where}: sizes", experiment.sizes, protocol.sweep.sizes, "sizes of the sweep")
        _need(f"{where}: vocabularies", experiment.vocabularies, protocol.vocabularies)
    _check_sweep(protocol.sweep, protocol.sizes, protocol.vocabularies)


def _check_sweep(sweep: Sweep, sizes: Mapping[str, Fields], vocabularies: Collection[str]) -> None:
    _need("sweep: tokens", vocabularies, sweep.tokens, "a length for each vocabulary")
    _need("sweep: sizes", sweep.sizes, sizes)
    for size, swept in sweep.sizes.items():
        if sweep.sizes.get(swept) != swept:
            raise UserError(f"protocol: sweep: sizes: {size}: expected a size that is swept, found {swept}")
    ratios = [b / a for a, b in itertools.pairwise(sweep.rates)]
    is_row = len(ratios) >= 2 and ratios[0] > 1 and all(math.isclose(ratio, ratios[0]) for ratio in ratios)
    if not is_row or sweep.rates[0] <= 0:
        raise UserError(
            f"protocol: sweep: rates: expected at least three, each the one before times a factor, found {sweep.rates}"
        )


def _need(where: str, names, known, what: str = "names of the protocol") -> None:
    """Raises: UserError if one of the names is not known."""
    for name in names:
        if name not in known:
            raise UserError(f"protocol: {where}: expected {what}, found {name}{did_you_mean(name, known)}")
