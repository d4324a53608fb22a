"""Generated text as people read it: it grows character by character, and is printed as it comes."""

import time

from memoryllm_jax.inference.engine import Engine
from memoryllm_jax.inference.sampling import Sampling


class Streamer:
    """A text that grows token by token: a character appears when all of its bytes are there."""

    def __init__(self, tokenizer, prompt: list[int]):
        self._decode, self._ids = tokenizer.decode, list(prompt)
        # Each piece is decoded from a token that is shown already, because tokenizers treat a text's first token apart:
        # some drop the space before it.
        self._from, self._shown = max(0, len(prompt) - 1), len(prompt)

    def add(self, token: int) -> str:
        """The characters that a new token completes, which may be none."""
        self._ids.append(token)
        return self._piece(whole=False)

    def end(self) -> str:
        """The characters not shown yet, when no more tokens come and the last one may be incomplete."""
        return self._piece(whole=True)

    def _piece(self, whole):
        before = self._decode(self._ids[self._from : self._shown])
        text = self._decode(self._ids[self._from :])
        if text.endswith("\N{REPLACEMENT CHARACTER}") and not whole:
            return ""
        self._from, self._shown = max(self._from, self._shown - 1), len(self._ids)
        return text[len(before) :]


def text_after(tokenizer, prompt: list[int], new: list[int]) -> str:
    """The text that new tokens add to a prompt."""
    return tokenizer.decode(prompt + new)[len(tokenizer.decode(prompt)) :]


def print_texts(
    engine: Engine, prompts: list[str], max_tokens: int, sampling: Sampling, seed: int, stops: tuple[str, ...]
) -> tuple[list[dict], dict]:
    """Generates and prints. One prompt streams to the terminal; several are printed one after another.

    Returns: (for each prompt {"prompt", "text", "tokens"}, statistics).
    """
    ids = [engine.prompt(text) for text in prompts]
    new_ids: list[list[int]] = [[] for _ in prompts]
    steps = engine.generate(ids, max_tokens, sampling, seed, engine.stop_ids(stops))
    streamer = Streamer(engine.tokenizer, ids[0]) if len(prompts) == 1 else None
    if streamer:
        print(prompts[0], end="", flush=True)
    start, first = time.perf_counter(), None
    for new in steps:
        first = first or time.perf_counter()
        for sequence, token in new:
            new_ids[sequence].append(token)
            if streamer:
                print(streamer.add(token), end="", flush=True)
    end = time.perf_counter()
    results = [
        {"prompt": prompt, "text": text_after(engine.tokenizer, before, new), "tokens": new}
        for prompt, before, new in zip(prompts, ids, new_ids)
    ]
    if streamer:
        print(streamer.end())
    else:
        for number, result in enumerate(results, 1):
            print(f"[{number}] {result['prompt']}{result['text']}\n")
    first = first or end
    stats = {
        "prompt_tokens": sum(map(len, ids)),
        "new_tokens": sum(map(len, new_ids)),
        "seconds_to_first_token": first - start,
        "ms_per_step": 1e3 * (end - first) / max(max(map(len, new_ids)) - 1, 1),
        "weights_bytes": engine.decoder.weights_bytes,
        **engine.rows.stats(),
    }
    return results, stats
