import numpy as np
import pytest
from by_hand import TWIN, unit


def test_the_nearest_token_is_another_one_scaled(token_keys, run):
    near = run("neighbours", token_keys, token=(f"#{TWIN}", "#9", "#8", "#7"), top=2)
    assert near["neighbours"][-1][0][0] == TWIN + 1 and near["cosine"][-1][0][0] == pytest.approx(1, abs=1e-5)


def test_every_pair_is_compared(in_numpy, run):
    trained = in_numpy("flex-3")
    rows = []
    for layer in range(trained.config.layers):
        ffn = trained.ffn("memory", layer)
        rows.append(trained.c(trained.asked("memory", layer), ffn) @ ffn["down"])
    near = run("neighbours", trained.model, tokens=0, top=4)
    for found, x in zip(near["cosine"], [*rows, np.concatenate(rows, 1)]):
        cosine = unit(x) @ unit(x).T
        np.fill_diagonal(cosine, -1)
        np.testing.assert_allclose(found, -np.sort(-cosine, 1)[:, :4], atol=2e-4)
    shared = [len(set(a) & set(b)) / 4 for a, b in zip(near["neighbours"][1], near["neighbours"][-1])]
    assert near["shared_with_all"][1] == pytest.approx(np.mean(shared))
