"""Turns generated tokens into text, and prints it as it is generated."""

import time

from memoryllm_jax.inference.engine import Engine
from memoryllm_jax.inference.generation import STEPS_PER_CALL
from memoryllm_jax.inference.sampling import Sampling


class Streamer:
    """Decodes a text that grows token by token. A character is shown when all of its bytes are there.

    Args:
      tokenizer: the model's tokenizer.
      prompt: token ids of the prompt, which counts as shown.
    """

    def __init__(self, tokenizer, prompt: list[int]):
        self._decode = tokenizer.decode
        self._ids = list(prompt)
        self._shown = len(prompt)  # number of ids whose text is shown
        # Decoding starts at an id that is shown already, because tokenizers treat a text's first id differently: some
        # drop the space before it.
        self._from = max(0, len(prompt) - 1)

    def add(self, token: int) -> str:
        """The characters that a new token completes; there may be none."""
        self._ids.append(token)
        return self._piece(whole=False)

    def end(self) -> str:
        """The characters that are not shown yet, when no more tokens come. The last one may be incomplete."""
        return self._piece(whole=True)

    def _piece(self, whole):
        before = self._decode(self._ids[self._from : self._shown])
        text = self._decode(self._ids[self._from :])
        if text.endswith("\N{REPLACEMENT CHARACTER}") and not whole:
            return ""
        self._from = max(self._from, self._shown - 1)
        self._shown = len(self._ids)
        return text[len(before) :]


def text_after(tokenizer, prompt: list[int], new: list[int]) -> str:
    """The text that new tokens add to a prompt."""
    return tokenizer.decode(prompt + new)[len(tokenizer.decode(prompt)) :]


def compile_texts(
    engine: Engine, prompts: list[str], max_tokens: int, sampling: Sampling, seed: int, stops: tuple[str, ...]
) -> None:
    """Compiles what `print_texts` with these arguments needs. Call it inside `ahead.only_shapes`."""
    for _ in _generate(engine, [engine.prompt(text) for text in prompts], max_tokens, sampling, seed, stops):
        pass


def _generate(engine, ids, max_tokens, sampling, seed, stops):
    """Nobody waits for each token of several texts, so these get several steps a call."""
    steps_per_call = 1 if len(ids) == 1 else STEPS_PER_CALL
    return engine.generate(ids, max_tokens, sampling, seed, engine.stop_ids(stops), steps_per_call)


def print_texts(
    engine: Engine, prompts: list[str], max_tokens: int, sampling: Sampling, seed: int, stops: tuple[str, ...]
) -> tuple[list[dict], dict]:
    """Generates text and prints it. One prompt's text is printed as it comes, several are printed at the end.

    Args:
      prompts: the texts to continue.
      stops: tokens that end a text, as `Engine.stop_ids` takes them.
    Returns: (for each prompt {"prompt", "text", "tokens"}, statistics).
    Raises: UserError for a prompt, seed or stop token that is refused.
    """
    ids = [engine.prompt(text) for text in prompts]
    new_ids: list[list[int]] = [[] for _ in prompts]
    streamer = Streamer(engine.tokenizer, ids[0]) if len(prompts) == 1 else None
    steps = _generate(engine, ids, max_tokens, sampling, seed, stops)
    if streamer:
        print(prompts[0], end="", flush=True)
    start = time.perf_counter()
    first = None
    for new in steps:
        if first is None:
            first = time.perf_counter()
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
    if first is None:  # no token came: all sequences ended at once
        first = end
    longest = max(map(len, new_ids))
    stats = {
        "prompt_tokens": sum(map(len, ids)),
        "new_tokens": sum(map(len, new_ids)),
        "seconds_to_first_token": first - start,
        "ms_per_step": 1e3 * (end - first) / max(longest - 1, 1),  # the prefill gives the first token
        "weights_bytes": engine.weights_bytes,
        **engine.rows.stats(),
    }
    return results, stats
