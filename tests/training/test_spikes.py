"""Steps that are skipped, against a rolling window in NumPy, and runs that skip steps and resume."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from lab import records

from memoryllm_jax.checkpoint import store
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.training import loop, spikes


def _expected(values_N2, deviations) -> list[bool]:
    """Which of some steps' (loss, gradient norm) are skipped, by the definition."""
    skipped, applied = [], []
    for pair in values_N2:
        is_good = bool(np.isfinite(pair).all())
        window = np.array(applied[-spikes.WINDOW :])
        if is_good and len(window) >= spikes.FEWEST:
            is_good = bool(np.all(pair <= window.mean(0) + deviations * window.std(0, ddof=1)))
        skipped.append(not is_good)
        if is_good:
            applied.append(pair)
    return skipped


def test_a_step_is_skipped_by_the_mean_and_deviation_of_the_last_applied_steps(make_config):
    config = make_config(**{"optimizer.max_skipped": 9, "optimizer.spike_deviations": 3.0})
    values_N2 = np.random.default_rng(0).normal([3, 1], [0.1, 0.3], (300, 2)).astype("f")
    values_N2[:60, 0] += np.linspace(5, 0, 60)  # the loss falls first
    put = {9: (np.nan, 1), 30: (99, 1), 70: (99, 1), 71: (3, np.inf), 200: (3, 50), 201: (-np.inf, 1)}
    for step, pair in put.items():
        values_N2[step] = pair
    tx = optax.adamw(lambda count: 1e-2 * (count + 1))
    params = {"w": jnp.ones(3)}
    state = {"params": params, "opt_state": tx.init(params), "spikes": spikes.init()}

    @jax.jit
    def step(state, loss, grad_norm):
        grads = {"w": jnp.full(3, loss * grad_norm)}  # not finite where one of them is not
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        after = {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}
        return spikes.guard(config, state, after, loss, grad_norm)

    skipped = []
    for loss, grad_norm in values_N2:
        before = jax.device_get(state)
        state, metrics = step(state, loss, grad_norm)
        skipped.append(bool(metrics["is_skipped"]))
        (adam, _, schedule), (adam_before, _, schedule_before) = state["opt_state"], before["opt_state"]
        assert schedule.count == schedule_before.count + 1 and adam.count == adam_before.count + (not skipped[-1])
        if skipped[-1]:
            np.testing.assert_array_equal(state["params"]["w"], before["params"]["w"])
            jax.tree.map(np.testing.assert_array_equal, (adam.mu, adam.nu), (adam_before.mu, adam_before.nu))
    expected = _expected(values_N2, 3.0)
    assert skipped == expected and [n for n in put if skipped[n]] == [9, 70, 71, 200, 201]
    assert state["spikes"]["skipped"] == sum(expected) and state["spikes"]["applied"] == 300 - sum(expected)
    assert np.isfinite(state["params"]["w"]).all()


@pytest.fixture
def damage(monkeypatch, shared_trainers):
    """A set of steps, from 1 on, whose batches give a loss that is not a number."""
    steps, make = set(), loop.Trainer

    def damaging(*args):
        trainer = make(*args)
        train = trainer.train

        def step(state, batch):
            is_damaged = int(state["step"]) + 1 in steps
            return train(state, batch._replace(weights_SAN=batch.weights_SAN * np.nan) if is_damaged else batch)

        trainer.train = step
        return trainer

    monkeypatch.setattr(loop, "Trainer", damaging)
    return steps


def _run(config, workdir):
    return loop.train(config, str(workdir), jax.devices()[:1])


def _saved(workdir, step) -> dict[str, np.ndarray]:
    """The digests of the arrays of a checkpoint."""
    checkpoints = store.Checkpoints(str(workdir))
    digests = checkpoints.description(step).digests
    checkpoints.close()
    return digests


@pytest.mark.parametrize("saved_most, most", [(0, 0), (0, 2), (2, 0), (2, 2)])
def test_the_statistics_begin_anew_are_dropped_or_go_on(make_config, saved_most, most):
    shapes = {"step": jax.ShapeDtypeStruct((), jnp.int32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))}
    kept = shapes | {"spikes": jax.eval_shape(spikes.init)}

    class Saved:
        def restore(self, step, wanted):
            assert jax.tree.structure(wanted) == jax.tree.structure(kept if saved_most else shapes)
            return jax.tree.map(lambda x: np.full(x.shape, step, x.dtype), wanted)

    saved = make_config(**{"optimizer.max_skipped": saved_most})
    state = spikes.restore(Saved(), 7, kept if most else shapes, saved)
    assert state["step"] == 7 and ("spikes" in state) == bool(most)
    if most:
        assert state["spikes"]["skipped"] == (7 if saved_most else 0)


def test_a_run_skips_steps_resumes_bitwise_and_ends_after_the_last_that_it_may_skip(
    make_config, tmp_path, capfd, damage
):
    """Of a run without the option, one with it, and one that goes on after either has ended in an error."""
    chosen = {"accumulate": 2, "checkpoint.every": 1, "checkpoint.keep": 9}
    off = make_config("flex-3", **chosen)
    on = make_config("flex-3", **chosen, **{"optimizer.max_skipped": 1})
    sequences = "on sequences 16 to 23 of the shuffled data"
    damage.add(3)
    assert _run(on, tmp_path / "whole") == 0
    printed = capfd.readouterr().out
    assert f"step 3: the loss is nan and the gradient norm nan, {sequences}" in printed
    assert "; skipped, 1 of at most 1\n" in printed
    assert json.loads((tmp_path / "whole" / "result.json").read_text())["skipped"] == 1
    third, fourth = records(tmp_path / "whole")[2:]
    assert (third["skipped"], fourth["skipped"]) == (1, 1) and "loss" not in third and math.isfinite(fourth["loss"])
    second, after = _saved(tmp_path / "whole", 2), _saved(tmp_path / "whole", 3)
    differ = {name for name in second if second[name] != after[name]}
    assert differ == {"step", "spikes/skipped", "opt_state/1/2/count"}  # the last one is the schedule's

    with pytest.raises(
        UserError, match=rf"^step 3: the loss is nan .*, {sequences} .*; the last good .* is .*/parts/2$"
    ):
        _run(off, tmp_path / "parts")
    assert not (tmp_path / "parts" / "3").exists()
    damage.add(4)
    bound = r"^step 4: .*; expected at most .*max_skipped = 1 such steps, found one more; the last good .*/parts/3$"
    with pytest.raises(UserError, match=bound):
        _run(on, tmp_path / "parts")
    assert not (tmp_path / "parts" / "4").exists()
    damage.remove(4)
    assert _run(on, tmp_path / "parts") == 0
    whole, parts = _saved(tmp_path / "whole", 4), _saved(tmp_path / "parts", 4)
    assert {name for name in whole if whole[name] != parts[name]} == {
        f"spikes/{name}"
        for name in ("applied", "loss", "grad_norm")  # they began at step 3
    }
