import csv
import types

import numpy as np
import pytest

from memoryllm_jax.analysis import agreement
from memoryllm_jax.data.dataset import Dataset


def test_values_that_say_what_follows_their_keys_triggers_agree(prefix_keys, run, tmp_path):
    follows = prefix_keys.follows
    found = run("agreement", prefix_keys.model, text=prefix_keys.text, predictive=3, top=20)
    with open(tmp_path / "out/agreement-keys.csv", newline="") as file:
        lines = {(line["layer"], line["key"]): line for line in csv.DictReader(file)}
    for key in ("3", "4"):
        assert (lines["1", key]["next_token"], lines["1", key]["rank"]) == (str(follows), "1")
    assert int(lines["1", "5"]["rank"]) > 1
    corpus = prefix_keys.text.open(prefix_keys.model)
    after = sum(corpus.next(label) == follows for label in prefix_keys.triggers[:20])
    shown = sorted(row[:2] + row[4:] for row in found["predictive"]["values"])
    assert shown[:2] == [[1, 3, after, 20], [1, 4, after, 20]]


@pytest.mark.parametrize("size", [1, 2, 9])
def test_chance_takes_the_next_token_of_another_key(size):
    other = agreement.others(np.random.default_rng(0), np.arange(size))
    assert sorted(other) == list(range(size))
    assert size == 1 or (other != np.arange(size)).all()


def test_the_next_token_of_an_ffn_m_trigger_is_its_most_frequent_successor(token_keys, data_path):
    train = Dataset(data_path).train
    tokens = train.read(0, train.tokens)
    following = agreement.next_tokens(token_keys, types.SimpleNamespace(facts={}), None, data_path)
    common = np.bincount(tokens).argmax()
    assert following(common) == np.bincount(tokens[1:][tokens[:-1] == common]).argmax()
    unseen = np.setdiff1d(np.arange(512), tokens)
    assert len(unseen) and {following(token) for token in unseen} == {-1}
