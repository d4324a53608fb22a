"""What the law says of the runs that configs/protocols/small.py plans, with losses that were made up by a law."""

import dataclasses
import math

import numpy as np
import pytest

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.experiments import laws
from memoryllm_jax.experiments import protocol as protocol_lib
from memoryllm_jax.experiments.fits import Law
from memoryllm_jax.model import flops

LAW = Law(
    ("ffn", "rows"), np.array([math.log(0.9), math.log(25), 0.33, math.log(150), 0.4, 0.3, 0.02, 0.9, 0.5]), (1, 1)
)
VARIANTS = ("memory", "flex-3", "flex-1", "flex-2", "flex-6")  # that the protocol compares with base


class Made:
    """As `Results`, with a loss of 0.2% noise.

    Args:
      more_sizes: at which plain tables and no memory are trained too.
    """

    def __init__(self, vocabulary: str, more_sizes: tuple[str, ...] = ()):
        protocol = protocol_lib.load("configs/protocols/small.py")
        experiments = [
            dataclasses.replace(
                experiment,
                sizes=experiment.sizes + (more_sizes if experiment.name == "worth" else ()),
                vocabularies=(vocabulary,),
                seeds=(0,),
            )
            for experiment in protocol.experiments
            if vocabulary in experiment.vocabularies
        ]
        self.protocol = dataclasses.replace(protocol, experiments=tuple(experiments), keep=())
        rates = dict.fromkeys(map(self.protocol.swept, self.protocol.settings()), 4e-3)
        self.runs, self._rng = self.protocol.experiment_runs(rates), np.random.default_rng(0)

    def config(self, run):
        return dataclasses.replace(run.config, model=dataclasses.replace(run.config.model, vocab_size=4096))

    def loss(self, run) -> float:
        counts, model = flops.parameters(self.config(run)), run.config.model
        kind = model.token_memory if model.row_dim else ""
        if kind not in ("", *LAW.kinds):
            kind = "rows"
        loss = LAW.loss(counts["active"], counts["memory"], run.tokens, kind)
        return loss * (1 + self._rng.normal(0, 0.002))


def test_a_kind_of_two_curves_is_left_out():
    found = laws.of_vocabulary(Made("4096"), "4096", replicates=2)
    assert found.fit.law.kinds == ("ffn",) and "rows" in found.without


def test_the_protocols_runs_and_plain_tables_of_three_sizes_determine_the_law_at_4096_ids():
    found = laws.of_vocabulary(Made("4096", more_sizes=("L",)), "4096", replicates=6)
    assert found.fit.law.kinds == LAW.kinds and found.fit.dropped < 3
    assert found.without == ["bigram", "bov", "per_layer", "value"]  # of one size
    numbers = found.fit.numbers()
    for name, value in LAW.named().items():
        assert numbers[name].value == pytest.approx(value, rel=0.25, abs=0.02), name
    assert {point.size for point in found.left_out} == {"XL"} and not {p.size for p in found.points} & {"XL"}
    for prediction in found.predictions:
        assert prediction.predicted.value == pytest.approx(prediction.measured, rel=0.01)
    crossings = {(crossing.variant, crossing.size): crossing.tokens.value for crossing in found.crossings}
    assert set(crossings) == {(variant, size) for variant in VARIANTS for size in ("S", "M", "L", "XL")}
    assert crossings["memory", "S"] < crossings["memory", "L"] < math.inf


def test_the_protocols_runs_determine_no_law_at_512_ids():
    with pytest.raises(UserError, match=r"expected at least 3 sizes without a memory, .* found 1"):
        laws.of_vocabulary(Made("512"), "512")
