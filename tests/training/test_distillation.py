"""FFN-M of a converted model is fitted to what base's layers add for each token."""

import contextlib
import itertools
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
    """On average over each token's positions, by the equations; and so on a mesh, with micro-batches.

    A signal ends the distillation before the next layer, and layers from there on keep the copy of base's FFN.
    """
    asked, fitted = [], distillation._fitted

    def recorded(config, layer, memory, embedding, sums, counts, ids):
        assert np.asarray(counts)[
            np.asarray(ids)
        ].all()  # ids that the text lacks get what the others' fit makes of them
        copied = jax.tree.map(lambda x: np.asarray(x[layer]), memory)
        asked.append((np.asarray(sums), np.asarray(counts), copied))
        return fitted(config, layer, memory, embedding, sums, counts, ids)

    monkeypatch.setattr(distillation, "_fitted", recorded)
    monkeypatch.setattr(distillation, "_FIT_STEPS", 120)
    base = write_untrained(make_config("base"), str(tmp_path / "base"))
    start = {"start.workdir": base, "start.memory": "distill", "start.distill_tokens": TOKENS - 1.0, "accumulate": 2}
    config = make_config("flex-3", **start, **{"mesh.fsdp": 2, "mesh.tensor": 2, "data.verify": False})

    def opened(name, stopped):
        stop = types.SimpleNamespace(now=stopped)
        return loop.open_run(config, str(tmp_path / name), jax.devices()[:4], stop, at_exit)

    with contextlib.ExitStack() as at_exit:
        of_layer_0 = itertools.repeat(False, 4)  # of 4 micro-batches
        ended = opened("ended", lambda: next(of_layer_0, True)).state["params"]["memory"]
        ended = jax.tree.map(np.asarray, ended)
        asked.clear()
        run = opened("run", lambda: False)
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
    for parts, parts_of_base, (sums, counts, copied) in zip(added, added_by_base, asked, strict=True):
        stream_of_base = stream_of_base + sum(parts_of_base.values())
        wanted = np.asarray(stream_of_base - stream - parts["attention"] - parts["ffn"])
        expected = np.zeros_like(sums)
        np.add.at(expected, tokens, wanted)
        np.testing.assert_allclose(sums, expected, atol=2e-3)
        np.testing.assert_array_equal(counts, np.bincount(tokens.flat, minlength=len(sums)))
        means = (expected / np.maximum(counts, 1)[:, None])[tokens]
        normed = reference.norm(params["embedding"], copied["norm"]["scale"], run.config.model)
        rows = reference.swiglu(normed, copied["ffn"])[tokens]
        missed, missed_by_copy = (np.square(x - means).mean() for x in (parts["memory"], rows))
        assert missed < 0.2 * np.square(means).mean() and missed < 0.5 * missed_by_copy
        stream = stream + sum(parts.values())
    for found, expected in zip(jax.tree.leaves(run.state["params"]), jax.tree.leaves(run.trainer.params_shape)):
        assert found.sharding == expected.sharding  # the compiled step takes no other
    for found, whole, copied in zip(*map(jax.tree.leaves, (ended, params["memory"], asked[1][2])), strict=True):
        np.testing.assert_array_equal(found[0], whole[0])
        np.testing.assert_array_equal(found[1], copied)
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
