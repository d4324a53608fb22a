"""FFNs scaled and dropped in several models: the changes that experiments find, and their groups of tasks."""

import math

import numpy as np
import pytest
from lab import TOKENS, loss_on, run_experiment

from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.evaluation.measure import Measure, TextOptions
from memoryllm_jax.evaluation.scores import Change
from memoryllm_jax.experiments import contribution
from memoryllm_jax.experiments.models import Models
from memoryllm_jax.inference.engine import Contribution


@pytest.fixture
def measure(lab):
    return Measure(TextOptions(lab.data_path, max_tokens=TOKENS))


def test_alpha_scales_each_kind_of_ffn(lab, tmp_path, measure):
    models = Models([lab.workdir("memory"), lab.workdir("flex-3")])
    found, page = run_experiment(contribution.alpha, models, tmp_path, measure=measure, alphas=("0.5",))
    assert list(found["quality"]) == ["memory", "flex-3, FFN-M", "flex-3, FFN-C"] and page.count("<img") == 1
    with lab.model("flex-3") as model:
        model.contribute(Contribution(alpha_compute=0.5))
        half = math.exp(loss_on(model, lab.data_path))
    assert found["quality"]["flex-3, FFN-C"]["0.5"]["perplexity"] == pytest.approx(half, rel=1e-5)
    full = found["quality"]["flex-3, FFN-C"]["1.0"]["perplexity"]
    assert found["changes"]["flex-3, FFN-C"]["0.5"]["perplexity"] == pytest.approx(100 * (half / full - 1), abs=2e-3)
    assert found["errors"]["flex-3, FFN-C"]["0.5"]["perplexity"] is None  # the text is the start of one document
    with pytest.raises(ArgumentError, match="alphas: expected numbers of zero or more, found -1"):
        contribution.alpha(models, None, measure=measure, alphas=("-1",))


def test_layers_are_dropped_alone_and_least_harmful_first(lab, tmp_path, measure):
    models = Models([lab.workdir("memory")])
    found, page = run_experiment(contribution.layers, models, tmp_path, measure=measure)
    one, both = found["cumulative"]["memory"]
    singles = [quality["perplexity"] for quality in found["without_layer"]["memory"]]
    assert one == [int(np.argmin(singles)), min(singles)] and page.count("<img") == 2
    whole = found["whole"]["memory"]["perplexity"]
    changes = [of_layer["perplexity"] for of_layer in found["changes"]["memory"]]
    assert changes == pytest.approx([100 * (single / whole - 1) for single in singles], abs=2e-3)
    assert found["errors"]["memory"][0]["perplexity"] is None and "1 documents of the text" in page
    with lab.model("memory") as model:
        model.contribute(Contribution(drop_layers=(0, 1)))
        assert both[1] == pytest.approx(math.exp(loss_on(model, lab.data_path)), rel=1e-5)
    with pytest.raises(ArgumentError, match="cumulative: expected at most 2 layers, as the models have, found 3"):
        contribution.layers(models, None, measure=measure, cumulative=3)


def test_the_greedy_order_measures_each_layer_without_those_dropped_before():
    costs = {(0,): 3, (1,): 2, (2,): 4, (1, 0): 9, (1, 2): 5, (1, 2, 0): 10}
    drops = contribution.greedy(lambda gone: costs[tuple(gone)], [3, 2, 4], 3)
    assert drops == [(1, 2), (2, 5), (0, 10)]


def test_tasks_are_grouped_as_in_the_paper_and_groups_are_means():
    assert contribution.group_of("lambada_local") == "recall" and contribution.group_of("piqa_local") == "reasoning"
    assert contribution.group_of("wikitext word_perplexity") is None
    assert contribution.group_of("recall_stated") == "recall" and contribution.group_of("reasoning_copy") == "reasoning"
    found = {"sciq": Change(-10.0, 3.0), "arc_easy": Change(-20.0, 4.0), "piqa": Change(1.0, 2.0)}
    means = contribution.group_means(found | {"perplexity": Change(5.0, 1.0)})
    assert means == {"recall": Change(-15.0, 2.5), "reasoning": Change(1.0, 2.0)}
    found = {"lambada_local": Change(math.nan, math.nan), "sciq": Change(-10.0, 3.0)}
    assert contribution.group_means(found) == {"recall": Change(-10.0, 3.0)}


def test_rows_that_are_values_of_attention_have_no_factor(make_config):
    assert contribution.parts(make_config("ple-3").model, "ple-3")[0].name == "ple-3, rows"
    with pytest.raises(ArgumentError, match=r"workdir: expected models .*, found bov-3, whose rows are values of"):
        contribution.parts(make_config("bov-3").model, "bov-3")
