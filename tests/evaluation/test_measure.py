"""Options of texts and tasks: values that they refuse, and how pages describe them."""

import pytest

from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.evaluation import record
from memoryllm_jax.evaluation.measure import TaskOptions, TextOptions
from memoryllm_jax.evaluation.perplexity import Windows
from memoryllm_jax.evaluation.record import WindowedText


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TextOptions(max_tokens=3), "max_tokens: expected data too, without which it has no effect"),
        (lambda: TaskOptions(num_fewshot=0), "num_fewshot: expected tasks too"),
        (lambda: TextOptions("DATA", max_tokens=-1), "max_tokens: expected at least 0, found -1"),
        (lambda: TextOptions("DATA", split="test"), "split: expected one of train, validation, found 'test'"),
        (lambda: TextOptions("a.txt", split="train"), "split: expected prepared data, which has splits, found text"),
        (
            lambda: WindowedText("DATA", stride=33).windows(32),
            "stride: expected 1 to 32, the model's context",
        ),
        (
            lambda: WindowedText(save_tokens="/none/x.npy"),
            "save_tokens: expected a file in a folder that exists",
        ),
    ],
)
def test_options_without_effect_or_out_of_range_are_refused(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()


def test_data_is_looked_for_before_the_model_is_loaded(tmp_path):
    with pytest.raises(UserError, match="expected a folder that `prepare` finished"):
        TextOptions(str(tmp_path)).check_data()
    with pytest.raises(UserError, match=r"expected at least one file, found none"):
        TextOptions(f"{tmp_path}/*.txt").check_data()


def test_windows_of_options_and_their_description():
    assert WindowedText("DATA", max_tokens=9).windows(32) == Windows(32, 32, 9)
    assert WindowedText("DATA", stride=8, save_tokens="x.npy").windows(32) == Windows(32, 8, whole=True)
    assert TextOptions("DATA", "train", max_tokens=4000).facts() == {"text": "DATA, train, the first 4,000 tokens"}
    assert TextOptions("a.txt").facts() == {"text": "a.txt"} and TextOptions().facts() == {}
    tasks = TaskOptions(("piqa", "sciq"), num_fewshot=2, limit=0.5)
    assert tasks.facts() == {"tasks": "piqa, sciq, 50% of the documents, 2 examples in a prompt"}
    assert TaskOptions(("piqa",), limit=3).facts() == {"tasks": "piqa, 3 documents each"}


def test_without_data_the_models_own_is_scored(lab):
    no_tasks, chosen = record.LoggedTasks(), WindowedText(stride=16, max_tokens=90)
    own = record.text_or_own(chosen, no_tasks, lab.workdir("memory"), None)
    assert own == WindowedText(lab.data_path, stride=16, max_tokens=90)
    assert record.text_or_own(own, no_tasks, "nowhere", None) is own
