"""Generates text from a trained model, its token memory computed live or looked up in a ToL file.

    python -m memoryllm_jax.generate --workdir=DIR --prompt="Once upon a time"
    python -m memoryllm_jax.generate --workdir=DIR --tol=tol.safetensors --rows=disk --prompt="..." --stats

With --tol the FFN-M weights, and the input embedding where it is untied, are never loaded; rows come from the
device, the host's memory or the disk. Give --prompt more than once, or --prompts=FILE with one a line, for a batch.
"""

import contextlib
import sys
import time
from typing import Annotated

from memoryllm_jax.common import cli, storage
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.common.options import Option
from memoryllm_jax.inference.engine import Engine, Streamer, text_after
from memoryllm_jax.inference.sampling import Sampling
from memoryllm_jax.tol.serving import EngineOptions


def main(
    engine: EngineOptions,
    sampling: Sampling,
    prompt: Annotated[tuple[str, ...], Option("text to go on from; more than one makes a batch", many=True)] = (),
    prompts: Annotated[str, Option("text file with one prompt a line")] = "",
    max_tokens: Annotated[int, Option("new tokens a prompt, fewer where the context ends", least=1)] = 128,
    seed: Annotated[int, Option("of the draws")] = 0,
    stop: Annotated[
        tuple[str, ...], Option("token that ends a text, as text or #ID; the end of a document always does", many=True)
    ] = (),
    stats: Annotated[bool, Option("print speed, cache hits and fetch times to stderr")] = False,
    output: Annotated[str, Option("JSON file for texts and statistics")] = "",
) -> None:
    texts = read_prompts(prompt, prompts)
    with contextlib.closing(engine.open()) as opened:
        results, measured = generate(opened, texts, max_tokens, sampling, seed, stop)
    if stats:
        for name, value in measured.items():
            print(f"{name:>24}: {value:,.3f}" if isinstance(value, float) else f"{name:>24}: {value}", file=sys.stderr)
    if output:
        storage.write_json(output, {"results": results, "stats": measured})


def read_prompts(prompts: tuple[str, ...], path: str) -> list[str]:
    """The prompts given, and then the lines of a file. Raises: UserError."""
    found = list(prompts)
    if path:
        try:
            with open(path, encoding="utf-8") as file:
                found += file.read().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ArgumentError("prompts", f"expected a text file with one prompt a line: {error}") from error
    if not found:
        raise UserError("expected --prompt=TEXT or --prompts=FILE, found neither")
    for number, text in enumerate(found, 1):
        if not text.strip():
            raise UserError(f"prompt {number}: expected some text, found an empty prompt")
    return found


def generate(
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


if __name__ == "__main__":
    cli.run(main)
