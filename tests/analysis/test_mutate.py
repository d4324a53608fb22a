import numpy as np
import pytest
from by_hand import LENGTH

from memoryllm_jax.common.errors import UserError


def test_a_key_that_fires_on_the_last_token_alone(prefix_keys, run, tmp_path):
    mean = run("mutate", prefix_keys.model, text=prefix_keys.text, key=("1:3",), top=60)["mean_percent"]
    changes = np.genfromtxt(tmp_path / "out/mutate-prefixes.csv", delimiter=",", names=True)
    assert np.abs(changes["first"]).max() < 1e-5 and np.abs(changes["last"] + 1).max() < 1e-5
    assert mean["random"] == [pytest.approx(100 * changes["random"].mean(), abs=0.01)]
    # A random token is the last one in some prefixes, where the key stops firing, and another one in the rest.
    fired = np.abs(changes["random"]) < 1e-5
    assert (fired | (np.abs(changes["random"] + 1) < 1e-5)).all() and 0 < fired.sum() < len(fired)


def test_changes_are_those_of_the_shortened_prefix(in_numpy, run, tmp_path):
    trained = in_numpy("flex-3")
    found = run("triggers", trained.model, text=trained.text, ffn="compute", key=("1:7",), top=4)["keys"]["1"]
    run("mutate", trained.model, text=trained.text, key=("1:7",), top=4)
    changes = np.genfromtxt(tmp_path / "out/mutate-prefixes.csv", delimiter=",", names=True)
    assert len(changes) >= 3
    for change in changes:
        rank = int(change["rank"]) - 1
        label, c = found["labels_Kt"][0][rank], found["c_Kt"][0][rank]
        prefix = trained.windows[label // LENGTH, : label % LENGTH + 1]
        for name, rest in (("first", prefix[1:]), ("last", prefix[:-1])):
            q = trained.forward(rest[None])[0][1]["compute"][-1]
            expected = trained.c(q, trained.ffn("compute", 1))[7] / c - 1
            assert change[name] == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_it_is_refused_where_keys_read_single_tokens(token_keys, prefix_keys, run):
    with pytest.raises(UserError, match="mutate: expected a base or flex model, found memory"):
        run("mutate", token_keys, text=prefix_keys.text)
