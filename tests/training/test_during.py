"""Samples and scores of a model that is still trained, against those of its checkpoint."""

import contextlib
import dataclasses
import json
import sys

import jax
import pytest
from lab import written

from memoryllm_jax.checkpoint import store
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.config import EvalConfig, MeshConfig, SampleConfig
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.inference.decoder import Decoder
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


@pytest.fixture(scope="module")
def training(lab):
    """A function: training(config fields) returns (Trainer of flex-3's run on two devices, its state, tokenizer)."""
    workdir, data = lab.workdir("flex-3"), Dataset(lab.data_path)
    checkpoints = store.Checkpoints(workdir)

    def restored(**fields):
        config = loop.complete(dataclasses.replace(lab.run("flex-3"), mesh=MeshConfig(1, 2, 1), **fields), data)
        trainer = Trainer(config, sharding.make_mesh(config.mesh, jax.devices()[:2]))
        return trainer, checkpoints.restore(16, trainer.state_shape), data.tokenizer()

    yield restored
    checkpoints.close()


def test_a_sample_is_what_generate_makes_of_the_checkpoint_and_compiles_once(lab, training):
    chosen = SampleConfig(every=4, tokens=12, prompt="def ", temperature=0.8)
    trainer, state, tokenizer = training(sample=chosen, seed=3)
    (sample,) = during.observers(trainer, tokenizer, None, lambda: False)
    first = sample(state["params"])
    with compilations() as compiled:
        assert sample(state["params"]) == first
    assert not compiled and sample.every == 4
    with lab.model("flex-3") as model:
        prompt = model.prompt("def ")
        (new,) = written(model, [prompt], 12, Sampling(0.8), seed=3, stop_ids=tokenizer.stop_ids)
        assert first["text"] == tokenizer.decode(prompt + new)


def test_tasks_score_the_parameters_in_place_as_evaluate_scores_the_checkpoint(lab, training, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="the harness is not installed: pip install 'memoryllm_jax[eval]'")
    from memoryllm_jax.evaluation import harness
    from memoryllm_jax.evaluation.while_training import open_tasks

    lines = [{"goal": f"do {n}", "sol1": "a b" * n, "sol2": "return it", "label": n % 2} for n in range(1, 6)]
    (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    chosen = EvalConfig(tasks="piqa_local", tasks_folder=str(tmp_path), tasks_every=8)
    trainer, state, tokenizer = training(eval=chosen)
    asked = []  # whether to stop
    (scores,) = during.observers(trainer, tokenizer, open_tasks(chosen), lambda: len(asked) > 1)
    log_probs, is_whole = Decoder.log_probs, []

    def watched(*args):
        found = log_probs(*args)
        is_whole.extend(x.is_fully_replicated for x in found)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "log_probs", watched)
        during.rehearse([scores], state["params"])
    assert is_whole and all(is_whole)  # so that each of several hosts can read them
    result = scores(state["params"])
    with compilations() as compiled:
        assert scores(state["params"]) == result
    assert not compiled
    asked += [1, 2]
    assert scores(state["params"]) is None
    with lab.model("flex-3") as model:
        whole = harness.Tasks(["piqa_local"], data=str(tmp_path)).run(model, {}, bootstrap_iters=0)["results"]
    expected = {"acc": whole["piqa_local"]["acc,none"], "acc_norm": whole["piqa_local"]["acc_norm,none"], "n": 5}
    assert result == {"piqa_local": expected, "asked": "piqa_local: all examples of each"}
    assert scores.text(result).startswith("tasks\n  piqa_local: acc 0.")


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
