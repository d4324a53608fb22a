"""Batches depend on (data, seed, step) only, whatever the number of hosts."""

import numpy as np
import pytest
from lab import read_all

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.data import document_starts
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.model import bigrams
from memoryllm_jax.training.batches import TrainBatches, ValidationBatches


def global_batch(batches, step):
    """(inputs, targets), [B * T] each, of all batch shards that `batches` makes."""
    shards = batches[step].values()
    inputs = [shard.ids_U[shard.index_AN].reshape(-1) for shard in shards]
    targets = [shard.targets_AN.reshape(-1) for shard in shards]
    return np.concatenate(inputs), np.concatenate(targets)


@pytest.mark.parametrize("path", ["DATA", "DATA:0.9,SMALL:0.1"])
def test_global_batches_do_not_depend_on_hosts_or_shards(make_config, data_path, swapped, path):
    config = make_config("memory", steps=200, **{"data.epochs": 3})
    dataset = Dataset(path.replace("DATA", data_path).replace("SMALL", str(swapped)))
    one = TrainBatches(config, dataset, 1, [0])
    for step in (0, 7, 199):
        inputs, targets = global_batch(one, step)
        for shards, hosts in ((2, 1), (4, 2), (8, 4)):
            share = shards // hosts
            parts = []
            for host in range(hosts):
                local = range(host * share, (host + 1) * share)
                parts.append(global_batch(TrainBatches(config, dataset, shards, local), step))
            np.testing.assert_array_equal(np.concatenate([part[0] for part in parts]), inputs)
            np.testing.assert_array_equal(np.concatenate([part[1] for part in parts]), targets)


def test_an_epoch_takes_every_window_once_in_shuffled_order(make_config):
    config = make_config("memory", steps=200, **{"data.epochs": 2})
    dataset = Dataset(config.data.path)
    batches = TrainBatches(config, dataset, 1, [0])
    T, B = config.seq_len, config.batch_size
    (windows_an_epoch,) = batches.order.windows_of
    steps = windows_an_epoch // B
    found = np.concatenate([global_batch(batches, step)[0].reshape(B, T) for step in range(steps)])
    windows = read_all(dataset)[: windows_an_epoch * T].reshape(-1, T)
    assert not np.array_equal(found, windows[: len(found)])
    distinct_found, distinct_windows = ({window.tobytes() for window in all_} for all_ in (found, windows))
    assert distinct_found <= distinct_windows
    assert len(distinct_found) >= len(distinct_windows) - B  # windows left for the epoch's last, shared batch


def test_a_mixture_takes_each_window_of_its_sources_in_their_shares(make_config, data_path, swapped):
    alone = Dataset(str(swapped))
    small = (alone.train.tokens - 1) // 32  # its windows
    config = make_config("memory", steps=small, batch_size=8, seq_len=32, **{"data.epochs": 9})
    batches = TrainBatches(config, Dataset(f"{data_path}:3,{swapped}:1"), 1, [0])
    found = np.concatenate([global_batch(batches, step)[0].reshape(8, 32) for step in range(small)])
    of_small = {window.tobytes() for window in read_all(alone)[: small * 32].reshape(-1, 32)}
    is_small = np.array([window.tobytes() in of_small for window in found])
    assert is_small.reshape(-1, 8).sum(1).tolist() == [2] * small
    # Each of its epochs has every window once, in an order of its own.
    first, second = found[is_small].reshape(2, small, 32)
    for epoch in (first, second):
        assert {window.tobytes() for window in epoch} == of_small
    assert not np.array_equal(first, second)
    assert batches.order.epochs(small) == [6 * small / batches.order.windows_of[0], 2]


def bigram_row(pair, size=512):
    """The row of (token before, token); the last one where there is no token before."""
    before, token = pair
    return size - 1 if before is None else (36313 * token % 2**32 ^ 27191 * before % 2**32) % (size - 1)


def test_bigrams_begin_anew_in_each_document(make_config, monkeypatch):
    config = make_config("bigram-3", **{"model.vocab_size": 512, "data.document_mask": True})
    dataset = Dataset(config.data.path)
    frequent = int(np.bincount(read_all(dataset)).argmax())
    monkeypatch.setattr(document_starts, "first_id", lambda *_: frequent)
    shard = TrainBatches(config, dataset, 1, [0])[0][0]
    found, rows = (x_U[shard.index_AN].reshape(8, 32) for x_U in (shard.ids_U, shard.row_ids_U))
    for ids_T, rows_T in zip(found.tolist(), rows.tolist()):
        before = [None, *ids_T[:-1]]
        assert rows_T == [511 if id == frequent else bigram_row(pair) for id, pair in zip(ids_T, zip(before, ids_T))]
    pairs = set(zip(shard.ids_U.tolist(), shard.row_ids_U.tolist()))
    assert len(shard.ids_U) == len(pairs) > len(set(shard.ids_U.tolist()))
    large = 160_000, 200_000  # whose products with the hash's numbers wrap
    assert bigrams.row_ids(np.array([large]), 1000).tolist() == [[999, bigram_row(large, 1000)]]


def test_reading_starts_at_any_step(make_config):
    config = make_config("memory", steps=50)
    batches = TrainBatches(config, Dataset(config.data.path), 2, [0, 1])
    reader = batches.iterate(30)
    for step in range(30, 50):
        for read, expected in zip(next(reader).values(), batches[step].values()):
            np.testing.assert_array_equal(read.ids_U[read.index_AN], expected.ids_U[expected.index_AN])
    with pytest.raises(StopIteration):
        next(reader)


def test_errors_of_the_threads_reach_the_reader(make_config, copied):
    config = make_config("memory", **{"data.path": str(copied)})
    shard = next(copied.glob("train-*.bin"))
    shard.write_bytes(b"\xff" * shard.stat().st_size)
    with pytest.raises(UserError, match="expected an id below 512, found 65535"):
        next(TrainBatches(config, Dataset(str(copied)), 2, [0, 1]).iterate(0))


def test_more_steps_than_the_data_has_are_refused_before_training(make_config):
    config = make_config("memory", steps=100_000)
    with pytest.raises(UserError, match=r"config.data.epochs: 100000 steps of 8 sequences need .* set it to \d+"):
        TrainBatches(config, Dataset(config.data.path), 1, [0])


def test_a_source_that_is_too_small_is_named(make_config, data_path, swapped):
    dataset = Dataset(f"{data_path}:0.5,{swapped}:0.5")
    small = (dataset.sources[1].train.tokens - 1) // 32  # of its sequences, four of which each step takes
    with pytest.raises(
        UserError,
        match=r"config.data.epochs: .* epochs of small, which has \d+ sequences; .* or give small less weight",
    ):
        TrainBatches(make_config("memory", steps=small + 1, **{"data.epochs": 4}), dataset, 1, [0])
    # Longer than the small source, and then longer than the other one too
    for seq_len, source in ((40_000, "small"), (10_000_000, "prepared")):
        message = rf"config.seq_len: expected less than the \d+ training tokens of {source}, found {seq_len}"
        with pytest.raises(UserError, match=message):
            TrainBatches(make_config("memory", seq_len=seq_len), dataset, 1, [0])


@pytest.mark.parametrize("path", ["DATA", "DATA:3,SMALL:1"])
def test_validation_scores_every_token_once(make_config, data_path, swapped, path):
    """Each source from its first token on, which nothing predicts."""
    config = make_config("memory", **{"eval.batches": 0})
    dataset = Dataset(path.replace("DATA", data_path).replace("SMALL", str(swapped)))
    batches = ValidationBatches(config, dataset, 2, [0, 1])
    scored = [[] for _ in dataset.sources]
    for step in range(len(batches)):
        for shard in batches[step].values():
            scored[batches.source_of(step)].append(shard.targets_AN[shard.weights_AN == 1])
    for source, found in zip(dataset.sources, scored):
        start, tokens, _ = source.validation
        expected = read_all(dataset, "validation")[start + 1 : start + tokens]
        np.testing.assert_array_equal(np.concatenate(found), expected)
    some = ValidationBatches(make_config("memory", **{"eval.batches": 9}), dataset, 2, [0, 1])
    assert len(some) in (9, 10) and {some.source_of(n) for n in range(len(some))} == set(range(len(scored)))


@pytest.mark.parametrize("batch_size, shards", [(8, 1), (64, 8)])
def test_planned_sizes_hold_the_shares_of_real_steps_that_they_are_planned_for(make_config, batch_size, shards):
    """Half, 95% and all of the steps: the largest of all shards counts, on every host."""
    config = make_config("memory", steps=1000, batch_size=batch_size, **{"model.vocab_size": 512, "data.epochs": 99})
    batches = TrainBatches(config, Dataset(config.data.path), shards, list(range(shards)))
    sizes = batches.sizes()
    assert sizes.most == batch_size // shards * 32 and len(sizes.planned) == 3
    assert sizes == TrainBatches(config, Dataset(config.data.path), shards, [0]).sizes()
    counts = np.array([batches[step].distinct for step in range(0, 1000, 2)])
    shares = [(counts <= size).mean() for size in sizes.planned]
    # Sizes are rounded up to multiples of 8, a large part of so few ids.
    assert 0.45 < shares[0] < 0.95 <= shares[1] and shares[2] == 1, shares


def test_without_unique_tokens_each_position_brings_its_own_id(make_config):
    distinct, plain = (make_config("memory", **{"model.unique_tokens": unique}) for unique in (True, False))
    dataset = Dataset(plain.data.path)
    batches = TrainBatches(plain, dataset, 2, [0, 1])
    np.testing.assert_array_equal(
        global_batch(batches, 3)[0], global_batch(TrainBatches(distinct, dataset, 1, [0]), 3)[0]
    )
    positions = plain.batch_size // 2 * plain.seq_len
    assert [len(shard.ids_U) for shard in batches[3].values()] == [positions] * 2
    assert batches.sizes().planned == (positions,)
