"""Options of texts and tasks: values that they refuse, and how pages describe them."""

import numpy as np
import pytest

from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.evaluation import measure, record
from memoryllm_jax.evaluation.measure import TaskOptions, TextOptions
from memoryllm_jax.evaluation.perplexity import ScoredWindow, Windows
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


def test_losses_are_summed_over_documents_that_windows_cut():
    def window(ids, nats):  # the last targets are scored
        return ScoredWindow(0, np.array(ids), -np.array(nats, float), np.arange(len(nats)))

    # Three documents, which begin with 1; the second goes on in the second window.
    windows = [window([1, 5, 1, 6, 7], [1, 2, 4, 8]), window([6, 7, 2, 1, 8], [16, 32, 64])]
    for first, sums, sizes in ((1, [3, 60, 64], [2, 4, 1]), (None, [15, 112], [4, 3])):
        nats_D, tokens_D = measure._by_document(windows, first)
        assert nats_D.tolist() == sums and tokens_D.tolist() == sizes


def test_without_data_the_models_own_is_scored(lab):
    no_tasks, chosen = record.LoggedTasks(), WindowedText(stride=16, max_tokens=90)
    own = record.text_or_own(chosen, no_tasks, lab.workdir("memory"), None)
    assert own == WindowedText(lab.data_path, stride=16, max_tokens=90)
    assert record.text_or_own(own, no_tasks, "nowhere", None) is own
