"""Learned edits on a small trained model: what they change, what they keep, and what is refused."""

import os

import numpy as np
import pytest
from lab import opened

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.inference import scoring
from memoryllm_jax.tol import edit, lessons, teach
from memoryllm_jax.tol.memory import FileMemory
from memoryllm_jax.tol.overlay import Overlay

PROMPT, TARGET = "the value of x is", " not"
LIKELY = 0.05  # for a model that finds nothing likely


@pytest.fixture(scope="module", autouse=True)
def long_steps():
    """Rows of a model that was trained for few steps are short beside the stream that they are added to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teach, "_STEP", 0.5)
        yield


def request(lab, tol, overlay, most_change=50, **chosen):
    """A request to teach, for `edit.fulfil`. The prompt's last token changes: it acts without attention."""
    method = teach.Method(probability=LIKELY, most_change=most_change)
    last = tol.tokenizer().encode_prompt(PROMPT)[-1]
    chosen = {"teach": (PROMPT,), "target": (TARGET,), "token": (f"#{last}",), "method": method} | chosen
    return edit.Request(str(overlay), teaching=teach.Teaching(**chosen), workdir=lab.workdir("flex-3"))


@pytest.fixture(scope="module")
def taught(lab, tmp_path_factory):
    """(path of an overlay with a zeroed row and a learned edit, ids of the prompt, those of the target)."""
    path = str(tmp_path_factory.mktemp("taught") / "overlay")
    with opened(lab.tol("flex-3")) as tol:
        tokenizer = tol.tokenizer()
        edit.fulfil(tol, edit.Request(path, zero=("#300",)))
        result = edit.fulfil(tol, request(lab, tol, path))
        assert len(result.edits) == 2 and result.edits[1].startswith(f"teach {PROMPT!r} -> {TARGET!r} (")
    prompt = tokenizer.encode_prompt(PROMPT)
    return path, prompt, tokenizer.encode_prompt(PROMPT + TARGET)[len(prompt) :]


def scores(lab, sequences, overlay=""):
    with lab.model("flex-3", lab.tol("flex-3"), overlay=overlay) as model:
        return scoring.score(model.decoder, model.rows, sequences, model.context)


def test_the_target_follows_and_text_without_the_token_stays_the_same(lab, taught):
    path, prompt, target = taught
    token = prompt[-1]
    with opened(lab.tol("flex-3")) as tol:
        overlay = Overlay.open(path, FileMemory(tol))
        assert overlay.edits[1].ids.tolist() == [token] and overlay.edits[1].mix == [[(token, 1.0)]]
    bos = [1]
    learned = [*bos, *prompt, *target]
    others = [i for i in range(3, 33) if i != token]
    before, after = scores(lab, [learned, others]), scores(lab, [learned, others], path)
    assert np.exp(after[0].log_probs_T[-len(target) :].sum()) >= LIKELY and after[0].greedy_T[-1]
    assert np.exp(before[0].log_probs_T[-len(target) :].sum()) < LIKELY / 10
    np.testing.assert_array_equal(after[1].log_probs_T, before[1].log_probs_T)


def test_the_rarest_token_is_no_single_character(lab):
    with opened(lab.tol("flex-3")) as tol:
        tokenizer = tol.tokenizer()
    # The tokenizer has merges in the order of their frequency, and then all characters.
    ids = tokenizer.encode_prompt("the value of zz")
    texts = [tokenizer.decode([i]) for i in ids]
    assert texts[-1] == "z" and max(ids) == ids[-1]
    assert len(tokenizer.decode([teach.rarest_token(tokenizer, ids)])) > 1
    assert teach.rarest_token(tokenizer, ids[-1:]) == ids[-1]


def test_own_texts_do_not_hold_the_answers_that_are_to_change(lab):
    with lab.model("flex-3", lab.tol("flex-3")) as model:
        encoded = [lessons.encode(model, lessons.Lesson(PROMPT, TARGET))]
        taught = lessons.lesson_texts(model, encoded, 4)
        own = lessons.own_texts(model, taught, [max(encoded[0].prompt)])
        said = {ids[0] for ids in lessons._written(model, [[1, *encoded[0].prompt]], 1, 0.0)}
    counted = {token for text in own for token, weight in zip(text.ids[1:], text.weights) if weight}
    assert counted and not counted & said
    assert sum(text.weights.sum() for text in own) == pytest.approx(1)
    assert sum(text.weights.sum() for text in taught) == pytest.approx(1)


@pytest.mark.parametrize(
    "chosen, message",
    [
        ({"target": ("",)}, "target: expected a text of at least one token, found ''"),
        ({"token": ("#300",)}, "token: expected a token of a prompt, found '#300', which is in none"),
        ({"teach": (PROMPT * 9,)}, "teach: expected prompt and target to fit 32 tokens with a prefix of 8, found"),
        (
            {"most_change": 1e-3},
            f"teach: {PROMPT!r}: expected {TARGET!r} with probability 0.05, reached 0.* in 2 steps.*nothing is",
        ),
    ],
)
def test_what_cannot_be_taught_is_refused_and_nothing_is_written(lab, tmp_path, monkeypatch, chosen, message):
    monkeypatch.setattr(teach, "_MOST_STEPS", 2)
    with opened(lab.tol("flex-3")) as tol, pytest.raises(UserError, match=message):
        edit.fulfil(tol, request(lab, tol, tmp_path / "overlay", **chosen))
    assert os.listdir(tmp_path) == []


def test_a_model_without_memory_is_refused(lab):
    with lab.model("base") as model, pytest.raises(UserError, match=r"adds a row for each token .*, found base"):
        teach.learn(model, [lessons.Lesson(PROMPT, TARGET)])
