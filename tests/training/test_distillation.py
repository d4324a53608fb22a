"""FFN-M of a converted model is fitted to what base's layers add for each token."""

import contextlib
import types

import jax
import numpy as np
import pytest
import reference
from lab import stacked, write_untrained

from memoryllm_jax.checkpoint.trained import TrainedModel
from memoryllm_jax.training import distillation, loop

TOKENS = 2 * 8 * 32  # two batches


def test_rows_bring_each_layer_to_the_stream_of_base(make_config, tmp_path, monkeypatch, capsys):
    """On average over each token's positions, by the equations; and so on a mesh, with micro-batches."""
    asked, fitted = [], distillation._fitted

    def recorded(config, layer, memory, embedding, sums, counts, ids):
        asked.append((np.asarray(sums), np.asarray(counts)))
        return fitted(config, layer, memory, embedding, sums, counts, ids)

    monkeypatch.setattr(distillation, "_fitted", recorded)
    monkeypatch.setattr(distillation, "_FIT_STEPS", 60)
    base = write_untrained(make_config("base"), str(tmp_path / "base"))
    start = {"start.workdir": base, "start.memory": "distill", "start.distill_tokens": TOKENS - 1.0, "accumulate": 2}
    config = make_config("flex-3", **start, **{"mesh.fsdp": 2, "mesh.tensor": 2})
    with contextlib.ExitStack() as at_exit:
        stop = types.SimpleNamespace(now=lambda: False)
        run = loop.open_run(config, str(tmp_path / "run"), jax.devices()[:4], stop, at_exit)
        read = run.batches.windows([(step, shard) for step in range(2) for shard in range(2)])
    tokens = np.concatenate([windows.ids[:, :-1] for windows in read])
    assert tokens.size == TOKENS

    with contextlib.closing(TrainedModel(base)) as trained:
        of_base, base_model = stacked(trained.load(lambda _: True)), trained.config
    params = jax.tree.map(np.asarray, run.state["params"])
    added, added_by_base = [], []
    reference.logits(params, tokens, run.config.model, added)
    reference.logits(of_base, tokens, base_model, added_by_base)

    stream = stream_of_base = params["embedding"][tokens]
    for parts, parts_of_base, (sums, counts) in zip(added, added_by_base, asked, strict=True):
        stream_of_base = stream_of_base + sum(parts_of_base.values())
        wanted = np.asarray(stream_of_base - stream - parts["attention"] - parts["ffn"])
        expected = np.zeros_like(sums)
        np.add.at(expected, tokens, wanted)
        np.testing.assert_allclose(sums, expected, atol=2e-3)
        np.testing.assert_array_equal(counts, np.bincount(tokens.flat, minlength=len(sums)))
        means = (expected / np.maximum(counts, 1)[:, None])[tokens]
        assert np.square(parts["memory"] - means).mean() < 0.2 * np.square(means).mean()
        stream = stream + sum(parts.values())
    for found, expected in zip(jax.tree.leaves(run.state["params"]), jax.tree.leaves(run.trainer.params_shape)):
        assert found.sharding == expected.sharding  # the compiled step takes no other
    assert f"{TOKENS} tokens with {np.count_nonzero(counts)} ids" in capsys.readouterr().out


@pytest.mark.parametrize("trained", ["all", "memory"])
def test_the_work_is_a_forward_pass_of_both_models_and_the_fit(make_config, trained):
    start = {"start.workdir": "base", "start.memory": "distill", "start.distill_tokens": TOKENS - 1.0}
    config = make_config("memory", **start, **{"optimizer.train": trained})
    tokens, rows, m = 2 * 8 * 32, 2 * 60, config.model
    attention = 2 * (4 * m.dim**2 + m.dim * 32 + m.vocab_size * m.dim / m.layers)  # of a token in a layer
    ffn = 2 * 3 * m.dim * m.ffn_dim
    passes = m.layers * (tokens * (2 * attention + ffn) + rows * ffn)
    fit = m.layers * distillation._FIT_STEPS * distillation._fit_ids(m.vocab_size) * 3 * ffn
    assert distillation.work(config, 60) == pytest.approx(passes + fit)
