import by_hand
import numpy as np
import pytest
from by_hand import DENIED, HEARD, LENGTH, SPOKEN, TWIN, unit

from memoryllm_jax.analysis.corpus import ExampleOptions


def overriding(params):
    """Layer 0 adds SPOKEN for every token. Layer 1 adds HEARD and DENIED, whose sum says TWIN. All three say TWIN + 1.

    So in layer 0 the FFN decides, and in layer 1 the prediction is neither the residual's nor the FFN's: composition.
    """
    by_hand.quiet(params)
    params["embedding"][:, 1] = 1
    head, ffn = params["head"], params["memory"]["ffn"]
    both = head[HEARD] + head[DENIED]
    head[TWIN] = unit(both)
    head[TWIN + 1] = unit(head[SPOKEN] + head[TWIN])
    ffn["gate"][:, 1, :2], ffn["up"][:, 1, 0], ffn["up"][1, 1, 1] = 10, 10, -10
    ffn["down"][0, 0] = head[SPOKEN]
    ffn["down"][1, :2] = np.stack([head[HEARD], -head[DENIED]]) / np.linalg.norm(both)


def test_a_layer_that_overrides_the_residual(make_model, run, data_path):
    model = make_model("memory", overriding)
    text = ExampleOptions(data_path, length=LENGTH, limit=1 << 11, examples=200)
    percent = run("residual", model, text=text)["percent"]
    assert percent["FFN"] == [pytest.approx(100, abs=2), 0]
    assert percent["composition"] == [pytest.approx(0, abs=2), 100]
    assert percent["settled"] == [pytest.approx(0, abs=2), 0]
    head = np.asarray(model.head)
    logits = 32**0.5 * head @ head[SPOKEN]
    expected = 100 * np.exp(logits[TWIN + 1]) / np.exp(logits).sum()
    assert percent["probability"][1] == pytest.approx(expected, rel=0.02)
    rows = run("compose", model, text=text)["percent_by_layer"]
    assert [row["composed"] for row in rows] == [0, 100]
    assert rows[0]["short prefixes of the rest"] == pytest.approx(100 * 4 / LENGTH, abs=12)
    assert rows[1]["short prefixes of the rest"] is None


def test_shares_of_a_trained_model_are_those_of_numpy(in_numpy, run):
    trained = in_numpy("flex-3")
    percent = run("residual", trained.model, text=trained.text)["percent"]
    _, residuals, outputs = trained.states
    last = trained.says(outputs[-1]).argmax(-1)
    for layer in range(trained.config.layers):
        top_r, top_o = trained.says(residuals[layer]).argmax(-1), trained.says(outputs[layer]).argmax(-1)
        top_y = trained.says_unit(outputs[layer] - residuals[layer]).argmax(-1)
        assert percent["settled"][layer] == pytest.approx(100 * (top_r == last).mean())
        assert percent["composition"][layer] == pytest.approx(100 * ((top_o != top_r) & (top_o != top_y)).mean())
        assert percent["agreement"][layer] == pytest.approx(100 * ((top_o == top_r) & (top_o == top_y)).mean())
