"""Samples and scores of a model that is still trained, against those of its checkpoint."""

import contextlib
import dataclasses
import json
import sys
from typing import NamedTuple

import jax
import pytest
from lab import written

from memoryllm_jax.checkpoint import store
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.config import Config, EvalConfig, MeshConfig, SampleConfig
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.inference.decoder import Decoder
from memoryllm_jax.inference.generation import STEPS_PER_CALL
from memoryllm_jax.inference.sampling import Sampling
from memoryllm_jax.model import sharding
from memoryllm_jax.training import during, loop
from memoryllm_jax.training.step import Trainer


@contextlib.contextmanager
def compilations():
    """Yields a list of the functions that are compiled inside."""
    found = []

    def note(event, seconds, fun_name="", **_):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


SAMPLE = SampleConfig(every=4, tokens=12, prompt="def ", temperature=0.8)


class Training(NamedTuple):
    """A run of flex-3 on two devices after its last step, as its observers see it."""

    config: Config
    params: dict
    model: during.LiveModel


@pytest.fixture(scope="module")
def training(lab):
    data = Dataset(lab.data_path)
    chosen = dataclasses.replace(lab.run("flex-3"), mesh=MeshConfig(2, 1, 1), sample=SAMPLE, seed=3)
    config = loop.complete(chosen, data)
    trainer = Trainer(config, sharding.make_mesh(config.mesh, jax.devices()[:2]))
    with contextlib.closing(store.Checkpoints(lab.workdir("flex-3"))) as checkpoints:
        params = checkpoints.restore(16, trainer.state_shape)["params"]
    return Training(config, params, during.LiveModel(trainer, data.tokenizer()))


def test_a_sample_is_what_generate_makes_of_the_checkpoint_and_compiles_once(lab, training):
    sample = during.Sample(training.config, training.model)
    first = sample(training.params)
    with compilations() as compiled:
        assert sample(training.params) == first
    assert not compiled and sample.every == 4
    with lab.model("flex-3", devices=2) as model:
        prompt = model.prompt("def ")
        how = {"seed": 3, "stop_ids": model.tokenizer.stop_ids, "steps_per_call": STEPS_PER_CALL}
        (new,) = written(model, [prompt], 12, Sampling(0.8), **how)
        assert first["text"] == model.tokenizer.decode(prompt + new)


def test_tasks_score_the_parameters_in_place_as_evaluate_scores_the_checkpoint(lab, training, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="the harness is not installed: pip install 'memoryllm_jax[eval]'")
    from memoryllm_jax.evaluation import harness
    from memoryllm_jax.evaluation.while_training import open_tasks

    lines = [{"goal": f"do {n}", "sol1": "a b" * n, "sol2": "return it", "label": n % 2} for n in range(1, 6)]
    (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    chosen = EvalConfig(tasks="piqa_local", tasks_folder=str(tmp_path), tasks_every=8)
    asked = []  # whether to stop
    scores = during.Scores(chosen, open_tasks(chosen), training.model, lambda: len(asked) > 1)
    scores.check()
    log_probs, is_whole = Decoder.log_probs, []

    def watched(*args):
        found = log_probs(*args)
        is_whole.extend(x.is_fully_replicated for x in found)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "log_probs", watched)
        result = scores(training.params)
    assert is_whole and all(is_whole)  # so that each of several hosts can read them
    with compilations() as compiled:
        assert scores(training.params) == result
    assert not compiled
    asked += [1, 2]
    assert scores(training.params) is None
    with lab.model("flex-3", devices=2) as model:
        whole = harness.Tasks(["piqa_local"], data=str(tmp_path)).scores(model)
    assert result["piqa_local"]["acc"] == whole["piqa_local"].value
    assert (
        result == {"piqa_local": result["piqa_local"] | {"n": 5}} and scores.asked == "piqa_local: all examples of each"
    )
    assert set(result["piqa_local"]) == {"acc", "acc_norm", "n"}
    assert scores.text(result).startswith("tasks\n  piqa_local: acc 0.")
    lines.append(lines[0] | {"sol1": "too long " * training.config.seq_len})
    (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for limit in (5, 6):  # the last example is one of those that the run scores, or not
        chosen = dataclasses.replace(chosen, tasks_limit=limit)
        scores = during.Scores(chosen, open_tasks(chosen), training.model, lambda: False)
        refusal = r"config.eval.tasks: a request: expected a context and a continuation of 1 to"
        with pytest.raises(ArgumentError, match=refusal) if limit == 6 else contextlib.nullcontext():
            scores.check()


def test_missing_tasks_and_data_are_refused_by_the_name_of_the_field(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="the harness is not installed: pip install 'memoryllm_jax[eval]'")
    from memoryllm_jax.evaluation.while_training import open_tasks

    with pytest.raises(ArgumentError, match=r"config.eval.tasks_folder: expected a folder .* found none at nowhere"):
        open_tasks(EvalConfig(tasks="piqa_local", tasks_folder="nowhere"))
    with pytest.raises(ArgumentError, match=r"config.eval.tasks_folder: expected the folder that holds piqa.jsonl"):
        open_tasks(EvalConfig(tasks="piqa_local"))
    with pytest.raises(UserError, match=r"piqa.jsonl: expected a file of JSON lines: No such file or directory"):
        open_tasks(EvalConfig(tasks="piqa_local", tasks_folder=str(tmp_path)))
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"config.eval.tasks: needs lm_eval: pip install 'memoryllm_jax\[eval\]'"):
        open_tasks(EvalConfig(tasks="piqa_local"))
