"""Batches are a function of (data, seed, step), on any number of hosts."""

import numpy as np
import pytest
from lab import read_all

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.training.batches import TrainBatches, ValidationBatches, smallest_size


def global_batch(batches, step):
    """(inputs [B, T], targets [B, T]) of all shards, whatever ids and index they are stored as."""
    shards = batches[step]
    inputs = [ids[index].reshape(-1) for ids, index, *_ in shards.values()]
    return np.concatenate(inputs), np.concatenate([t.reshape(-1) for _, _, t, _ in shards.values()])


def test_global_batches_do_not_depend_on_hosts_and_windows_cover_the_data(make_config):
    config = make_config("memory", steps=200, **{"data.epochs": 2})
    dataset = Dataset(config.data.path)
    one = TrainBatches(config, dataset, 1, [0])
    stream = read_all(dataset)
    for step in (0, 7, 199):
        inputs, targets = global_batch(one, step)
        for shards, hosts in ((2, 1), (4, 2), (8, 4)):
            share = shards // hosts
            parts = [
                global_batch(TrainBatches(config, dataset, shards, range(h * share, (h + 1) * share)), step)
                for h in range(hosts)
            ]
            np.testing.assert_array_equal(np.concatenate([p[0] for p in parts]), inputs)
            np.testing.assert_array_equal(np.concatenate([p[1] for p in parts]), targets)
    # One epoch takes every window once, shuffled; the next epoch in another order.
    T, B = config.seq_len, config.batch_size
    steps = one.windows_an_epoch // B
    rows = np.concatenate([global_batch(one, s)[0].reshape(B, T) for s in range(steps)])
    expected = stream[: one.windows_an_epoch * T].reshape(-1, T)
    assert len({r.tobytes() for r in rows} - {r.tobytes() for r in expected}) == 0
    unique = {r.tobytes() for r in expected}
    assert len({r.tobytes() for r in rows}) >= len(unique) - B and not np.array_equal(rows, expected[: len(rows)])


def test_reading_goes_on_from_any_step_and_errors_reach_the_reader(make_config, copied):
    config = make_config("memory", steps=50, **{"data.path": str(copied)})
    dataset = Dataset(str(copied))
    batches = TrainBatches(config, dataset, 2, [0, 1])
    reader = batches.iterate(30)
    for step in range(30, 50):
        for (ids, index, *_), (ids2, index2, *_) in zip(next(reader).values(), batches[step].values()):
            np.testing.assert_array_equal(ids[index], ids2[index2])
    with pytest.raises(StopIteration):
        next(reader)
    shard = next(copied.glob("train-*.bin"))
    shard.write_bytes(b"\xff" * shard.stat().st_size)
    with pytest.raises(UserError, match="expected an id below 512, found 65535"):
        next(TrainBatches(config, Dataset(str(copied)), 2, [0, 1]).iterate(0))


def test_end_of_data_is_refused_before_training(make_config):
    config = make_config("memory", steps=100_000)
    with pytest.raises(UserError, match=r"config.data.epochs: 100000 steps of 8 sequences need .* set it to \d+"):
        TrainBatches(config, Dataset(config.data.path), 1, [0])


def test_validation_scores_every_token_once(make_config):
    config = make_config("memory", **{"eval.batches": 0})
    dataset = Dataset(config.data.path)
    batches = ValidationBatches(config, dataset, 2, [0, 1])
    scored = []
    for step in range(len(batches)):
        for _, _, targets, weights in batches[step].values():
            scored.append(targets[weights == 1])
    np.testing.assert_array_equal(np.concatenate(scored), read_all(dataset, "validation")[1:])


def test_sizes_end_with_all_ids_that_a_shard_can_have(make_config):
    """By its positions, or by the vocabulary; what a batch holds beyond the first size takes a larger one."""
    for batch_size, most in ((8, 8 * 32), (64, 512)):
        config = make_config("memory", batch_size=batch_size, **{"model.vocab_size": 512})
        sizes = TrainBatches(config, Dataset(config.data.path), 1, [0]).sizes()
        assert sizes == sorted(set(sizes)) and sizes[-1] == most and len(sizes) > 1
        assert [smallest_size(sizes, count) for count in (sizes[0], sizes[0] + 1, most)] == [*sizes[:2], most]


def test_without_unique_tokens_each_position_brings_its_own_id(make_config):
    distinct, plain = (make_config("memory", **{"model.unique_tokens": unique}) for unique in (True, False))
    dataset = Dataset(plain.data.path)
    batches = TrainBatches(plain, dataset, 2, [0, 1])
    np.testing.assert_array_equal(
        global_batch(batches, 3)[0], global_batch(TrainBatches(distinct, dataset, 1, [0]), 3)[0]
    )
    positions = plain.batch_size // 2 * plain.seq_len
    assert [len(shard.ids_U) for shard in batches[3].values()] == [positions] * 2 and batches.sizes() == [positions]
