import copy
import csv
import dataclasses
import json
import re

import numpy as np
import pytest
from by_hand import DENIED, FIRES, HEARD

from memoryllm_jax.common.errors import ArgumentError


def test_a_key_that_fires_on_one_token(token_keys, run, tmp_path):
    # The query of FIRES is q = sqrt(D) e_0, up to the norm's epsilon, so that c = (q k) SiLU(q k_gate) of key 3 is:
    c = 32**0.5 / (1 + np.exp(-(32**0.5))) * 32**0.5
    found = run("coefficients", token_keys, token=(f"#{FIRES}",), top=2)
    assert found["keys"][1] == [[3, 4]]
    np.testing.assert_allclose(found["coefficients"][1], [[c, -c / 2]], rtol=1e-4)
    np.testing.assert_allclose(found["shares"][1], [[2 / 3, 1 / 3]], rtol=1e-4)
    with open(tmp_path / "out/coefficients-keys.csv", newline="") as file:
        lines = list(csv.reader(file))
    for key, sign, token in ((3, "1", HEARD), (4, "-1", DENIED)):
        line = next(x for x in lines if x[:2] == ["1", str(key)])
        assert line[2:4] == [sign, str(FIRES)]
        assert line[6].split()[0] == str(token)
    page = (tmp_path / "out/coefficients.html").read_text()
    shown = json.loads(re.search(r'<script type="application/json" id="content">(.*?)</script>', page)[1])
    token = shown["tokens"][str(FIRES)]
    assert token["keys"][1] == [3, 4] and token["says"][1][0] == HEARD
    assert shown["keys"]["1:4"][0] == -1 and shown["keys"]["1:4"][3][0] == DENIED
    head = np.asarray(token_keys.head)
    assert token["norm"][1] == pytest.approx(np.linalg.norm(c * head[HEARD] + c / 2 * head[DENIED]), rel=1e-2)


@pytest.mark.parametrize("vocab_size, most", [(512, 88), (50, 50)])
def test_more_to_list_than_there_are_keys_or_tokens_is_refused(token_keys, run, vocab_size, most):
    model = copy.copy(token_keys)
    model.config = dataclasses.replace(model.config, vocab_size=vocab_size)
    with pytest.raises(ArgumentError, match=f"top: expected at most {most}, .*, found 89"):
        run("coefficients", model, top=89)


def test_outliers_of_a_key_that_fires_on_one_token(token_keys, run):
    found = run("outliers", token_keys, ratio=("50", "1"))
    assert found["layers"][2] == {"layer": 1, "M": 50, "mean": 1 / 512, "largest": 1, "tokens_without": 511 / 512}
    assert found["keys"][10][:3] == [1, 3, 1]


def test_outliers_are_counted_as_in_numpy(in_numpy, run, tmp_path):
    trained = in_numpy("flex-3")
    found = run("outliers", trained.model, ratio=("6", "3"))["layers"]
    size = np.abs(trained.c(trained.asked("memory", 1), trained.ffn("memory", 1)))
    counts = (size > 6 * size.mean(1, keepdims=True)).sum(1)
    assert counts.max() > 0 and found[2]["mean"] == pytest.approx(counts.mean(), abs=0.01)
    with open(tmp_path / "out/outliers-tokens.csv", newline="") as file:
        by_token = [int(line["layer_1"]) for line in csv.DictReader(file)]
    assert (by_token == counts).mean() > 0.99
