import contextlib

import numpy as np
import pytest
from by_hand import key_value_model, unit
from lab import GREEDY, opened, write_untrained

from memoryllm_jax.analysis import vocabulary
from memoryllm_jax.analysis.key_values import Parameters
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.server.looker import Looker
from memoryllm_jax.server.worker_rows import WorkerRows
from memoryllm_jax.tol import serving
from memoryllm_jax.tol.sources import read_rows

SEEN = 300  # the token that is looked at


@pytest.fixture(scope="module", params=["flex-3 live", "tied from a file"])
def looked(request, lab):
    """(engine, Looker, name of the model, rows of all tokens as they are served [V, L, D])"""
    name, _, where = request.param.partition(" ")
    tol = lab.tol(name, bits="16") if where != "live" else ""
    with lab.model(name, tol) as engine, contextlib.ExitStack() as opened_here:
        rows = opened_here.enter_context(contextlib.closing(WorkerRows(engine)))
        looker = Looker(engine, rows.source, Parameters(engine.trained, engine.params))
        opened_here.callback(looker.close)
        every_id = np.arange(512, dtype=np.int32)
        if tol:
            with opened(tol) as file:
                rows_VLD = read_rows(file, every_id)
        else:
            rows_VLD = np.stack([np.asarray(x_1UD[0]) for x_1UD in engine.rows.fetch(every_id).rows_LSUP], 1)
        yield engine, looker, name, rows_VLD


class Began(list):
    """What was begun, in place of `Job.begin`."""

    def __call__(self, doing, is_kept=False):
        self.append(doing)
        return lambda done: None


def test_the_neighbours_of_a_token_are_those_by_the_rows_that_are_served(looked):
    _, looker, _, rows_VLD = looked
    for _ in range(2):  # the second time, rows are kept
        for layer, x_VD in ((1, rows_VLD[:, 1]), (None, rows_VLD.reshape(512, -1))):
            ids, cosines = zip(*looker.nearest(SEEN, layer, 5, Began()))
            cosine_V = unit(x_VD) @ unit(x_VD[SEEN])
            cosine_V[SEEN] = -1
            np.testing.assert_allclose(cosines, -np.sort(-cosine_V)[:5], atol=1e-5)
            np.testing.assert_allclose(cosines, cosine_V[list(ids)], atol=1e-5)


def test_the_rows_of_a_token_are_those_that_are_served_and_its_keys_those_of_the_weights(looked, lab, monkeypatch):
    engine, looker, name, rows_VLD = looked
    began = Began()
    parts = ["reading the weights of FFN-M"]
    if name == "tied":  # from a file
        parts.append("checking the weights of FFN-M")
        monkeypatch.setitem(engine.rows.tol.metadata, "rows_digest", "0")
        with pytest.raises(UserError, match=r"expected the weights that the rows .* were made from, found others"):
            looker.token(SEEN, 4, Began())
        monkeypatch.undo()
    layers = looker.token(SEEN, 4, began)
    assert began == [*parts, ""] and not looker._params.missing
    assert looker._params["layers"] is engine.params["layers"]  # no second copy of what the engine holds
    norms = np.linalg.norm(rows_VLD[SEEN], axis=1)
    np.testing.assert_allclose([layer.norm for layer in layers], norms, rtol=1e-5)
    model = key_value_model(lab.workdir(name))
    c_F = np.asarray(model.token_coefficients(1, np.array([SEEN], np.int32))[0])
    for key in layers[1].keys:
        assert key.c == pytest.approx(c_F[key.key], rel=1e-4)
    key = layers[1].keys[0].key
    found = vocabulary.key_triggers(model, 1, np.array([key]), 6)
    ids, cs = zip(*looker.key(1, key, 6, began))
    assert list(ids) == found.labels_Kt[0].tolist()
    np.testing.assert_allclose(cs, found.c_Kt[0], rtol=1e-4)


def test_a_position_is_that_of_the_model_that_is_served(looked):
    engine, looker, _, _ = looked
    text = [1, SEEN, 70, 5, 9]
    ((_, following),) = next(engine.generate([text], 1, GREEDY))
    assert looker.position([*text, 3], 4, 3, Began()).final == following


def test_search_finds_the_likeliest_first(looked):
    _, looker, _, _ = looked
    texts = looker._model.texts
    space = next(i for i, text in enumerate(texts) if text.startswith("␣") and text[1:2].islower())
    wanted = texts[space].replace("␣", " ")
    ids, total = looker.search(wanted, 1000)
    assert ids[0] == space and total == len(ids) == sum(texts[space].casefold() in text.casefold() for text in texts)
    assert looker.search(wanted.upper(), 1000)[1] == total
    assert looker.search("#17", 5)[0][0] == 17
    end = looker.tokenizer.special_tokens["</s>"]
    assert looker.search("</s>", 5) == ([end], 1) and looker.shown(end) == {"id": end, "text": "</s>"}
    assert looker.search("", 3) == ([0, 1, 2], 512)
    assert looker.search("no token has this text", 3) == ([], 0)


def test_layers_that_look_up_nothing_have_no_neighbours(make_config, tmp_path):
    workdir = write_untrained(make_config("bov-3"), str(tmp_path / "run"))
    with contextlib.closing(serving.open_engine(workdir)) as engine:
        looker = Looker(engine, engine.rows, Parameters(engine.trained, engine.params))
        assert looker.nearest(SEEN, None, 3, Began()) == looker.nearest(SEEN, 1, 3, Began())
