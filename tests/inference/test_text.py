"""Generated tokens as text, streamed and printed."""

import pytest

from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.inference.sampling import Sampling
from memoryllm_jax.inference.text import Streamer, print_texts, text_after


@pytest.fixture(scope="module")
def tokenizer(data_path):
    return Dataset(data_path).tokenizer()


def test_a_stream_shows_characters_when_all_of_their_bytes_are_there(tokenizer):
    prompt, text = tokenizer.encode("A word"), " and naïve 🙂 ones"
    new = tokenizer.encode("A word" + text)[len(prompt) :]
    assert prompt + new == tokenizer.encode("A word" + text)
    streamer = Streamer(tokenizer, prompt)
    pieces = [streamer.add(token) for token in new]
    assert "".join(pieces) + streamer.end() == text == text_after(tokenizer, prompt, new)
    assert "" in pieces and not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)  # 🙂 takes four tokens


def test_a_stream_that_ends_within_a_character_shows_a_replacement(tokenizer):
    prompt = tokenizer.encode("A word")
    new = tokenizer.encode("A word🙂")[len(prompt) : -1]
    streamer = Streamer(tokenizer, prompt)
    assert "".join(streamer.add(token) for token in new) == ""
    assert "\N{REPLACEMENT CHARACTER}" in streamer.end()


def test_texts_of_a_batch_are_printed_one_after_another(lab, capsys):
    prompts = ["A string is", "The file"]
    with lab.model("flex-3") as engine:
        capsys.readouterr()  # drops what training has printed
        results, stats = print_texts(engine, prompts, 6, Sampling(0), 0, ())
    assert capsys.readouterr().out == "".join(
        f"[{number}] {prompt}{result['text']}\n\n" for number, (prompt, result) in enumerate(zip(prompts, results), 1)
    )
    assert stats["new_tokens"] == sum(len(result["tokens"]) for result in results) and stats["ms_per_step"] > 0
