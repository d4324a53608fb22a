"""Protocols: the runs that follow from them, and what is refused."""

import dataclasses
import itertools

import pytest

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.experiments import protocol as protocol_lib
from memoryllm_jax.experiments.protocol import Experiment, Protocol, Setting, Sweep, Variant
from memoryllm_jax.model import flops

TOKENS = {"512": 640, "600": 640}
RATES = (1e-3, 2e-3, 4e-3)


def protocol(**changes) -> Protocol:
    parts = {
        "config": "configs/tiny.py",
        "fields": {"batch_size": 2, "seq_len": 16, "log.every": 5},
        "sizes": {"S": {"model.dim": 64}, "L": {"model.dim": 128}},
        "vocabularies": {"512": "sentencepiece:train:512"},
        "variants": (
            Variant("memory"),
            Variant("wide", "memory", {"model.ffn_dim": 256}, rate_of="memory", rate_factor=2),
        ),
        "sweep": Sweep(TOKENS, (0.001, 0.002, 0.004), {"S": "S", "L": "S"}),
        "experiments": (
            Experiment("one", ("memory", "wide"), ("S",), ("512",), (640, 1280), (0, 1)),
            Experiment("two", ("memory",), ("S", "L"), ("512",), (1280,)),
        ),
    }
    return Protocol(**parts | changes)


def test_runs_are_the_product_of_an_experiment_and_experiments_share_them():
    p = protocol()
    small, wide, large = (Setting(*names, "512") for names in (("memory", "S"), ("wide", "S"), ("memory", "L")))
    assert p.settings() == [small, wide, large] and {p.swept(setting) for setting in p.settings()} == {small}
    assert p.experiment_runs({}) == []
    runs = p.experiment_runs({small: 0.002})
    assert [(run.setting, run.tokens, run.seed, run.experiments) for run in runs] == [
        (small, 640, 0, ("one",)),
        (wide, 640, 0, ("one",)),
        (small, 640, 1, ("one",)),
        (wide, 640, 1, ("one",)),
        (small, 1280, 0, ("one", "two")),
        (wide, 1280, 0, ("one",)),
        (small, 1280, 1, ("one",)),
        (wide, 1280, 1, ("one",)),
        (large, 1280, 0, ("two",)),
    ]
    assert runs[0].key == p.sweep_run(small, 0.002).key  # trained once
    config = runs[-1].config
    assert (config.steps, config.optimizer.warmup_steps, config.model.dim) == (40, 2, 128)
    # Fields that follow from others do so as on the command line.
    assert (config.model.ffn_dim, config.model.table_dim) == (344, 16)
    assert config.optimizer.final_lr == pytest.approx(0.0002) and runs[1].config.model.ffn_dim == 256
    assert [run.rate for run in runs[:2]] == [0.002, 0.004]  # that of the sweep, and twice that


def test_a_multiple_of_a_rate_is_written_as_people_write_it():
    assert Variant("memory", rate_factor=9).rate(0.001) == 0.009 != 0.001 * 9


def test_a_run_of_two_variants_is_refused():
    p = protocol(variants=(Variant("memory"), Variant("wide", "memory", rate_of="memory")))
    with pytest.raises(UserError, match="expected runs that differ, found one run of memory S 512 and wide S 512"):
        p.experiment_runs({Setting("memory", "S", "512"): 0.002})


def test_a_run_is_named_by_what_it_trains():
    def key(rate=0.002, **changes):
        p = protocol(**changes)
        return p.sweep_run(p.settings()[0], rate).key

    # The name of a run that exists: if it changes, all runs of this protocol would be trained again.
    small = protocol_lib.load("configs/protocols/small.py")
    assert small.sweep_run(Setting("base", "S", "512"), 0.002).key == "b323bb221b803d27"
    fields = protocol().fields
    same = [
        {"fields": {**fields, "log.every": 9, "data.path": "elsewhere"}},  # where and how fast it is computed
        {"fields": {**fields, "optimizer.b1": 0.9}},  # the default
    ]
    assert {key(**changes) for changes in same} == {key()}
    others = [{"rate": 0.004}, {"warmup": 0.1}, {"fields": {**fields, "optimizer.b1": 0.8}}]
    others += [
        {"experiments": (Experiment("one", ("memory",), ("S",), ("600",), (640,)),), "vocabularies": {"600": ""}}
    ]
    assert len({key(), *(key(**changes) for changes in others)}) == 1 + len(others)


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"fields": {"model.dimm": 8}}, r"config\.model\.dimm: no such field; did you mean dim\?"),
        ({"fields": {"model.layers": "many"}}, "config.model.layers: expected int, found 'many'"),
        ({"keep": ("three",)}, "protocol: keep: expected names of the protocol, found three"),
        ({"variants": (Variant("memory", rate_factor=0.0),)}, "memory: rate_factor: expected more than 0, found 0.0"),
        ({"variants": (Variant("memory"),)}, "experiment one: variants: expected names of the protocol, found wide"),
        ({"sizes": {"S": {}, "S/2": {}}}, "expected different names of letters, digits .*, found S/2"),
        ({"sizes": {"S": {}, "512": {}}}, "expected different names of letters, digits .*, found 512 twice"),
        (
            {"variants": (Variant("a", "base", {}, "b"), Variant("b", "base", {}, "a"))},
            "a variant with a rate of its own",
        ),
        (
            {"sweep": Sweep(TOKENS, (1e-3, 2e-3), {"S": "S", "L": "S"})},
            "rates: expected at least three, each the one before",
        ),
        (
            {"sweep": Sweep(TOKENS, (1e-3, 2e-3, 3e-3), {"S": "S", "L": "S"})},
            "rates: expected at least three, each the",
        ),
        (
            {"sweep": Sweep(TOKENS, RATES, {"S": "L", "L": "S"})},
            "S: expected a size that is swept, found L",
        ),
        (
            {"sweep": Sweep(TOKENS, RATES, {"S": "S"})},
            "experiment two: sizes: expected sizes of the sweep",
        ),
    ],
)
def test_what_is_not_valid_is_named(changes, problem):
    with pytest.raises(UserError, match=problem):
        p = protocol(**changes)
        p.sweep_run(p.settings()[0], 0.002)


def test_a_protocol_file_is_found_among_the_packages_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = protocol_lib.load("configs/protocols/small.py")
    larger = protocol_lib.load("configs/protocols/gpu.py")
    assert larger.contrasts == small.contrasts and all(larger.sweep_run(one, 1e-3) for one in larger.settings())
    with pytest.raises(
        UserError, match=r"protocol: expected FILE\.py, found no file small\.py .* are configs/protocols/"
    ):
        protocol_lib.load("small.py")
    (tmp_path / "p.py").write_text("def get_protocol():\n    return 1")
    with pytest.raises(UserError, match=r"expected get_protocol\(\) to return a Protocol, found 1"):
        protocol_lib.load("p.py")


def test_the_small_protocol_can_answer_its_questions():
    p = protocol_lib.load("configs/protocols/small.py")
    cells: dict[str, dict[tuple, set[int]]] = {variant.name: {} for variant in p.variants}
    for experiment in p.experiments:
        for name in experiment.variants:
            for cell in itertools.product(experiment.sizes, experiment.vocabularies, experiment.tokens):
                cells[name].setdefault(cell, set()).update(experiment.seeds)
    for contrast in p.contrasts:
        both = cells[contrast.a].keys() & cells[contrast.b or contrast.a].keys()
        found = {vocabulary for size, vocabulary, _ in both if size == "S"}
        expected = {"4096"}
        for name in ("letters", "words"):
            (experiment,) = (one for one in p.experiments if one.name == name)
            if {contrast.a, contrast.b or contrast.a} <= set(experiment.variants):
                expected |= set(experiment.vocabularies)
        assert found == expected, contrast
    for variant in p.variants:  # wherever there is a control, there is what it controls
        assert cells[variant.name].keys() <= cells[variant.control_of or variant.name].keys(), variant
    several = {cell[1] for of_cells in cells.values() for cell, seeds in of_cells.items() if len(seeds) >= 3}
    assert several == set(p.vocabularies)  # so that a spread over seeds is known in each
    counts = {}
    for name in {name for contrast in p.contrasts for name in (contrast.a, contrast.b) if name}:
        config = p.sweep_run(Setting(name, "S", "4096"), 0.004).config
        counts[name] = flops.parameters(
            dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=4096))
        )
    for contrast in p.contrasts:
        if contrast.b:  # what the question calls equal
            kind = "total" if "total" in contrast.question else "active"
            rel = 0.02 if contrast.a in ("ple-3", "bov-3") else 1e-3  # FFN-C makes up for gates and values
            assert counts[contrast.a][kind] == pytest.approx(counts[contrast.b][kind], rel=rel), contrast
    assert max(tokens for size, _, tokens in cells["base"] if size == "S") >= 20 * counts["base"]["active"]
