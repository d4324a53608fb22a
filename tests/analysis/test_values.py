import csv
import re

import jax
import numpy as np
import pytest

from memoryllm_jax.common.errors import ArgumentError


@pytest.mark.parametrize("architecture, kind", [("memory", "memory"), ("base", "compute")])
def test_distributions_of_both_signs(in_numpy, run, tmp_path, architecture, kind):
    trained = in_numpy(architecture)
    found = run("values", trained.model, ffn=kind, top=3)
    v_FD = trained.ffn(kind, 1)["down"]
    z = trained.says_unit(-v_FD[5])  # a value so small that the norm's epsilon would hide what it says
    p = np.asarray(jax.nn.softmax(z))
    with open(tmp_path / "out/values-values.csv", newline="") as file:
        line = next(x for x in csv.DictReader(file) if (x["layer"], x["key"], x["sign"]) == ("1", "5", "-"))
    assert [int(i) for i in line["tokens"].split()] == np.argsort(-z)[:3].tolist()
    np.testing.assert_allclose([float(x) for x in line["probabilities"].split()], -np.sort(-p)[:3], rtol=1e-3)
    z = trained.says_unit(v_FD)
    most = np.max([jax.nn.softmax(sign * z).max(1) for sign in (1, -1)], 0)
    assert found["max_probability"]["median of keys"][1] == pytest.approx(np.median(most), rel=1e-3)
    assert max(row[3] for row in found["peaked"] if row[0] == 1) == pytest.approx(most.max(), rel=1e-3)


def test_more_tokens_than_there_are_is_refused(token_keys, run):
    with pytest.raises(ArgumentError, match=re.escape("top: expected from 1 to the 512 tokens, found 513")):
        run("values", token_keys, top=513)
