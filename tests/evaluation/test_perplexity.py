"""Perplexity on prepared data and on text files, in windows, against the equations and the validation of training."""

import itertools
import json

import numpy as np
import pytest
from lab import CONTEXT, log_softmax

from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.data import dataset
from memoryllm_jax.evaluation import perplexity
from memoryllm_jax.evaluation.perplexity import Windows


def quality(model, path, windows=None, **more):
    """Perplexity on the held-out split; by default in windows that follow each other."""
    windows = windows or Windows(CONTEXT, CONTEXT)
    text = perplexity.prepared_text(path, "validation", model.tokenizer, windows)
    return perplexity.perplexity(model, text, windows, **more)


@pytest.mark.parametrize("name", ("memory", "flex-3", "base"))
def test_perplexity_on_prepared_data_is_the_validation_of_training(lab, name):
    expected = json.load(open(f"{lab.workdir(name)}/result.json"))["validation"]
    live = ()
    if name == "base":
        ways = [(live, 1), (live, 8)]
    else:
        ways = [(live, 8), ((lab.tol(name), "disk", 4096), 1), ((lab.tol(name),), 3)]
    for arguments, devices in ways:
        with lab.model(name, *arguments, devices=devices) as model:
            found = quality(model, lab.data_path)
        assert found["tokens"] == expected["tokens"] and found["windows"] == -(-expected["tokens"] // CONTEXT)
        for key in ("loss", "perplexity", "bits_per_byte"):
            assert found[key] == pytest.approx(expected[key], rel=2e-6), (arguments, devices, key)
        assert found["word_perplexity"] == pytest.approx(np.exp(found["loss"] * found["tokens"] / found["words"]))


def test_text_files_are_what_prepare_would_make_of_them(lab, tmp_path):
    with lab.model("memory") as model:
        stream = dataset.Dataset(lab.data_path).validation
        ids = stream.read(0, stream.tokens)
        texts = [model.tokenizer.decode(d) for d in np.split(ids, np.nonzero(ids == model.tokenizer.bos_id)[0])[1:]]
        (tmp_path / "held_out.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
        windows = Windows(CONTEXT, CONTEXT)
        text = perplexity.raw_text(str(tmp_path / "*.jsonl"), "body", model.tokenizer, windows)
        found = perplexity.perplexity(model, text, windows)
        assert found == quality(model, lab.data_path)
        assert found["words"] == sum(len(text.split()) for text in texts)
        assert found["bytes"] == sum(len(text.encode()) for text in texts)


def test_the_sources_of_a_mixture_are_scored_as_alone(lab, swapped):
    """The second one as far as max_tokens goes. The whole is the mean over all tokens, whatever the weights."""
    held_out = dataset.Dataset(lab.data_path).validation.tokens
    with lab.model("memory") as model:
        windows = Windows(CONTEXT, CONTEXT, max_tokens=held_out + 300)
        found = quality(model, f"{lab.data_path}:0.9,{swapped}:0.1", windows)
        alone = [quality(model, lab.data_path), quality(model, str(swapped), Windows(CONTEXT, CONTEXT, 300))]
        with pytest.raises(ArgumentError, match="save_tokens: expected one folder of prepared data, found the mixture"):
            quality(model, f"{swapped}:1,{lab.data_path}:1", Windows(CONTEXT, CONTEXT, 90, whole=True))
    assert list(found["sources"]) == ["prepared", "small"] and found["tokens"] == held_out - 1 + 300
    for source, expected in zip(found["sources"].values(), alone):
        assert source == pytest.approx({name: expected[name] for name in source}, rel=1e-6)
    total = sum(source["loss"] * source["tokens"] for source in found["sources"].values())
    assert found["loss"] == pytest.approx(total / found["tokens"], rel=1e-9)


def test_documents_of_a_window_are_scored_alone(lab):
    """With the most frequent token in the part of bos."""
    with lab.model("memory") as model:
        ids = dataset.Dataset(lab.data_path).validation.read(0, 2 * CONTEXT + 1)
        first = int(np.bincount(ids).argmax())
        found = quality(model, lab.data_path, Windows(CONTEXT, CONTEXT, 2 * CONTEXT, first_id=first))
        ends = [position for position in range(1, 2 * CONTEXT) if ids[position] == first or position == CONTEXT]
        texts = [ids[a : b + 1] for a, b in itertools.pairwise([0, *ends, 2 * CONTEXT])]
        p = log_softmax(model, np.stack([np.pad(text[:-1], (0, CONTEXT + 1 - len(text))) for text in texts]))
        nats = [-p[n, range(len(text) - 1), text[1:]].sum() for n, text in enumerate(texts)]
    assert found["loss"] == pytest.approx(sum(nats) / (2 * CONTEXT), rel=1e-5)
    assert found["by_context"][0]["tokens"] == len(texts) > 3 and found["document_mask"]


def test_windows_with_a_stride_predict_each_token_once_from_context_minus_stride_tokens(lab):
    stride, tokens = 12, 90
    with lab.model("flex-3") as model:
        ids = dataset.Dataset(lab.data_path).validation.read(0, tokens + 1)
        # For each token, the first window that has it as a target.
        first_window = [max(0, -(-(target - CONTEXT) // stride)) for target in range(tokens + 1)]
        starts = [stride * k for k in range(max(first_window) + 1)]
        pieces = [ids[start : start + CONTEXT + 1] for start in starts]
        batch = np.stack([np.pad(piece, (0, CONTEXT + 1 - len(piece))) for piece in pieces])
        p = log_softmax(model, batch[:, :-1])
        nats = [-p[k, target - starts[k] - 1, ids[target]] for target, k in enumerate(first_window) if target]
        found = quality(model, lab.data_path, Windows(CONTEXT, stride, max_tokens=tokens))
    assert found["loss"] == pytest.approx(np.mean(nats), rel=1e-5)
    assert (found["tokens"], found["windows"], len(nats)) == (tokens, len(starts), tokens)


def test_scored_ids_are_saved_in_whole_windows(lab, tmp_path):
    path = str(tmp_path / "ids.npy")
    with lab.model("flex-3") as model:
        found = quality(model, lab.data_path, Windows(CONTEXT, CONTEXT, 90, whole=True), save_tokens=path)
        saved = np.load(path)
        p = np.take_along_axis(log_softmax(model, saved[:, :-1]), saved[:, 1:, None], -1)
    ids = dataset.Dataset(lab.data_path).validation.read(0, CONTEXT + 1)
    assert saved.shape == (2, CONTEXT + 1) and saved.dtype == np.int32 and found["tokens"] == 2 * CONTEXT
    np.testing.assert_array_equal(saved[0], ids)
    assert found["loss"] == pytest.approx(-p.mean(), rel=1e-5)
    parts = [tuple(part.values()) for part in found["by_context"]]
    bounds = [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 32)]
    for (start, last, nats, count), bound in zip(parts, bounds, strict=True):
        assert (start, last) == bound and count == 2 * (last - start + 1)
        assert nats == pytest.approx(-p[:, start - 1 : last].mean(), rel=1e-5)


def test_texts_and_limits_below_a_window_are_refused():
    with pytest.raises(ArgumentError, match="max_tokens: expected 0 or at least 32, a whole window, found 31"):
        Windows(CONTEXT, CONTEXT, 31, whole=True).used(9000, "DATA")
    with pytest.raises(UserError, match="DATA: expected at least 33 tokens, found 32"):
        Windows(CONTEXT, CONTEXT, whole=True).used(32, "DATA")
    with pytest.raises(UserError, match="DATA: expected at least 2 tokens, found 1"):
        Windows(CONTEXT, CONTEXT).used(1, "DATA")


def test_what_is_read_is_verified(lab, copied):
    """A damaged training split is found when it is scored, and does not stand in the way of the held-out one."""
    shard = next(copied.glob("train-*.bin"))
    shard.write_bytes(bytes(200) + shard.read_bytes()[200:])
    with lab.model("memory") as model:
        quality(model, str(copied))
        windows = Windows(CONTEXT, CONTEXT, 90)
        with pytest.raises(UserError, match=rf"{shard.name}: checksum differs"):
            perplexity.prepared_text(str(copied), "train", model.tokenizer, windows)
