import csv
import re

import numpy as np
import pytest
from by_hand import FIRES

from memoryllm_jax.analysis.corpus import CorpusOptions
from memoryllm_jax.common.errors import UserError


def test_tokens_on_which_a_key_fires(token_keys, run):
    keys = run("triggers", token_keys, text=CorpusOptions(), key=("1:3", "1:4"), top=3)["keys"]["1"]
    assert keys["labels_Kt"] == [[FIRES, -1, -1], [FIRES, -1, -1]] and keys["sign_K"] == [1, -1]


def test_prefixes_on_which_a_key_fires(prefix_keys, run, tmp_path):
    model = prefix_keys.model
    keys = run("triggers", model, text=prefix_keys.text, key=("1:3", "1:4"), top=5)["keys"]["1"]
    assert keys["labels_Kt"] == [prefix_keys.triggers[:5].tolist()] * 2
    with open(tmp_path / "out/triggers-triggers.csv", newline="") as file:
        shown = next(csv.DictReader(file))
    assert shown["prefix"].endswith(model.texts[prefix_keys.fires])
    assert shown["next"] == model.texts[prefix_keys.follows]


@pytest.mark.parametrize("architecture, kind", [("memory", "memory"), ("flex-3", "compute")])
def test_triggers_are_the_strongest_of_all_queries(in_numpy, run, architecture, kind):
    trained = in_numpy(architecture)
    result = run("triggers", trained.model, text=trained.text, ffn=kind, keys=4, top=6)
    found = result["keys"]["1"]
    c_NK = trained.c(trained.asked(kind, 1), trained.ffn(kind, 1))[:, found["key"]]
    sign = np.sign(c_NK[np.abs(c_NK).argmax(0), np.arange(4)])
    assert found["sign_K"] == sign.tolist()
    expected = -np.sort(-(c_NK * sign).T, axis=1)[:, :6]
    np.testing.assert_allclose(np.array(found["c_Kt"]) * sign[:, None], expected, rtol=1e-3)
    assert result["selectivity"]["trigger 6"][1] == pytest.approx((expected[:, 5] / expected[:, 0]).mean(), rel=1e-3)
    for k in range(4):
        np.testing.assert_allclose(c_NK[found["labels_Kt"][k], k], found["c_Kt"][k], rtol=1e-3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ffn": "memory"}, "ffn: expected compute, which base has, found memory"),
        ({"length": 8, "data": "none"}, "none/dataset.json: expected a folder that `prepare` finished"),
        ({"length": 64}, "length: expected from 2 to the model's 32 positions, found 64"),
        ({"length": 1}, "length: expected at least 2, found 1"),
        (
            {"length": 8, "key": ("0:9999",)},
            "key: expected LAYER:KEY with a layer below 2 and a key below 88",
        ),
    ],
)
def test_refusals(make_model, run, data_path, tmp_path, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        text = CorpusOptions(options.pop("data", data_path), length=options.pop("length", 16))
        run("triggers", make_model("base"), text=text, **options)
    assert not (tmp_path / "out").exists()
