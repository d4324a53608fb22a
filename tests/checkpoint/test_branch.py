"""Which checkpoints a run may branch off, and what the branch must share with the run that it leaves."""

import dataclasses
import json

import msgspec
import pytest

from memoryllm_jax.checkpoint import branch, description
from memoryllm_jax.common import config_files
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.config import resolve
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.training import chips, plan

STABLE = {"optimizer.schedule": "wsd", "optimizer.warmup_steps": 10, "optimizer.decay_share": 0.5, "tokens": 25600.0}

COSINE = {"optimizer.schedule": "cosine", "optimizer.decay_share": 0.2}


@pytest.fixture
def workdir(make_config, data_path, tmp_path):
    """write(steps, fields): the descriptions of a run's checkpoints at these steps; returns their folder."""

    def write(steps, **fields):
        dataset = Dataset(data_path)
        run = description.describe(make_config("memory", **STABLE | fields), dataset.digest, dataset.tokenizer())
        for step in steps:
            folder = tmp_path / f"{step}/description"
            folder.mkdir(parents=True)
            (folder / "metadata").write_text(json.dumps(description.to_json(run)))
        return str(tmp_path)

    return write


def branched(workdir, **fields):
    """(config of a decay, the description of its checkpoints)"""
    c = config_files.load(f"configs/start.py:decay@{workdir}")
    c.update_from_flattened_dict(fields)
    config = resolve(c)
    dataset = Dataset(config.data.path)
    return config, description.describe(config, dataset.digest, dataset.tokenizer())


def test_a_decay_has_the_settings_of_its_run_and_begins_at_its_newest_stable_step(workdir):
    path = workdir([20, 40, 60, 100])  # of 100 steps, which decay after 50
    config, described = branched(path)
    assert (config.start.step, config.steps, config.decay_begins) == (40, 80, 40)
    assert branch.origin(config, described) == (path, 40, description.read(path, 40))
    run = description.config_of(path)
    changed = {"steps": 80, "tokens": 0.0, "start": config.start}
    assert config == dataclasses.replace(run, **changed, model=dataclasses.replace(run.model, attention="auto"))
    c = config_files.load(f"configs/start.py:decay@{path}")
    for c.optimizer.decay_share in (0.03, 0.1, 0.2, 0.29, 1 / 3, 0.7):
        for c.start.step in (33, 50, 100, 103, 20_000):
            config = resolve(c)
            assert config.decay_begins == c.start.step < config.steps


@pytest.mark.parametrize(
    "steps, fields, asked, message",
    [
        ([100], COSINE, {}, "config.start.workdir: expected a run with the schedule wsd or"),
        (
            [5, 60],
            {},
            {},
            "config.start.step: expected a checkpoint of the stable part of .*, from step 10 to",
        ),
        ([20, 60], {}, {"start.step": 60, "steps": 200}, "config.start.step: expected a checkpoint of the stable part"),
        ([20, 40], {}, {"start.step": 30}, r"config.start.step: expected one of 20, 40 in .*, found 30"),
        ([20], {}, {"seed": 3, "optimizer.b2": 0.9}, "seed: 0 in the checkpoint, 3 in this run; optimizer.b2: 0.95 in"),
        ([20], {}, {"steps": 20}, "config.steps: expected more than config.start.step = 20, found 20"),
        (
            [40],
            {},
            {"steps": 70},
            "config.optimizer.decay_share: expected a decay that begins at config.start",
        ),
        (
            [40],
            {},
            COSINE,
            "config.optimizer.schedule: expected wsd or constant, as of",
        ),
        (
            [40],
            {},
            {"start.workdir": ""},
            "config.start.workdir: expected the workdir of the run that",
        ),
        (
            [40],
            {},
            {"optimizer.decay_share": 1.0},
            "config.optimizer.decay_share: expected more than 0 and less",
        ),
    ],
)
def test_a_branch_that_no_run_would_have_made_is_refused_by_name(workdir, steps, fields, asked, message):
    path = workdir(steps, **fields)
    with pytest.raises(UserError, match="^" + message):
        branch.origin(*branched(path, **asked))


def test_the_plan_of_a_branch_begins_where_the_branch_does_and_is_refused_with_it(workdir):
    path = workdir([20, 40], **{"model.vocab_size": 512})  # saved configs have that of their data
    newest = {"start.step": -1, "steps": 80}
    planned, _ = plan._completed(branched(path, **newest)[0], chips.get("h100"))
    assert planned.start.step == 40
    with pytest.raises(UserError, match=r"^seed: 0 in the checkpoint, 3 in this run"):
        plan._completed(branched(path, **newest, seed=3)[0], chips.get("h100"))


def test_other_data_is_refused(workdir):
    config, described = branched(workdir([40]))
    other = msgspec.structs.replace(described, data=description.Data(digest="0" * 64))
    with pytest.raises(UserError, match=r"^data: .* expected the settings of .*/40, as config.start"):
        branch.origin(config, other)
