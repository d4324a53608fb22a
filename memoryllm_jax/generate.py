"""Generates text from a trained model, its token memory computed live or looked up in a ToL file.

    python -m memoryllm_jax.generate --workdir=DIR --prompt="Once upon a time"
    python -m memoryllm_jax.generate --workdir=DIR --tol=tol.safetensors --rows=disk --prompt="..." --stats

With --tol the FFN-M weights, and the input embedding where it is untied, are never loaded; rows come from the
device, the host's memory or the disk. Give --prompt more than once, or --prompts=FILE with one a line, for a batch.
"""

import contextlib
import sys
import time

from absl import flags

from memoryllm_jax.common import cli, storage
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.inference.engine import Streamer, stop_ids_of, text_after
from memoryllm_jax.inference.sampling import Sampling
from memoryllm_jax.tol.serving import Model, model_from_flags


def read_prompts(prompts: list[str], path: str) -> list[str]:
    """Raises: UserError."""
    if path:
        try:
            with open(path, encoding="utf-8") as file:
                prompts = [*prompts, *file.read().splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts={path}: expected a text file with one prompt a line: {error}") from error
    if not prompts:
        raise UserError("expected --prompt=TEXT or --prompts=FILE, found neither")
    for number, text in enumerate(prompts, 1):
        if not text.strip():
            raise UserError(f"prompt {number}: expected some text, found an empty prompt")
    return prompts


def run(
    model: Model, prompts: list[str], max_tokens: int, sampling: Sampling, seed: int, stops: list[str]
) -> tuple[list, dict]:
    """Generates and prints. One prompt streams to the terminal; several are printed one after another.

    Returns: ([{"prompt", "text", "tokens"}], statistics).
    """
    ids = [model.prompt(text) for text in prompts]
    new_ids: list[list[int]] = [[] for _ in prompts]
    steps = model.generate(ids, max_tokens, sampling, seed, stop_ids_of(model, stops))
    streamer = Streamer(model.tokenizer, ids[0]) if len(prompts) == 1 else None
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
    texts = [text_after(model.tokenizer, *pair) for pair in zip(ids, new_ids)]
    results = [{"prompt": p, "text": t, "tokens": n} for p, t, n in zip(prompts, texts, new_ids)]
    if streamer:
        print(streamer.end())
    else:
        for number, result in enumerate(results, 1):
            print(f"[{number}] {result['prompt']}{result['text']}\n")
    longest = max(map(len, new_ids))
    first = first or end
    stats = {
        "prompt_tokens": sum(map(len, ids)),
        "new_tokens": sum(map(len, new_ids)),
        "seconds_to_first_token": first - start,
        "ms_per_step": 1e3 * (end - first) / max(longest - 1, 1),
        "weights_bytes": model.decoder.weights_bytes,
        **model.rows.stats(),
    }
    return results, stats


def stats_text(stats: dict) -> str:
    """For people, one figure a line."""
    return "\n".join(
        f"{name:>24}: {v:,.3f}" if isinstance(v, float) else f"{name:>24}: {v}" for name, v in stats.items()
    )


def main():
    f = flags.FLAGS
    sampling = Sampling(f.temperature, f.top_k, f.top_p)
    prompts = read_prompts(f.prompt, f.prompts)
    if f.max_tokens < 1:
        raise UserError(f"--max_tokens: expected at least 1, found {f.max_tokens}")
    with contextlib.closing(model_from_flags()) as model:
        results, stats = run(model, prompts, f.max_tokens, sampling, f.seed, f.stop)
        if f.stats:
            print(stats_text(stats), file=sys.stderr)
        if f.output:
            storage.write_json(f.output, {"results": results, "stats": stats})
    return 0


if __name__ == "__main__":
    cli.define_model_flags()
    flags.DEFINE_multi_string("prompt", [], "text to go on from; give it more than once for a batch")
    flags.DEFINE_string("prompts", "", "text file with one prompt a line")
    flags.DEFINE_integer("max_tokens", 128, "new tokens a prompt, fewer where the context ends")
    flags.DEFINE_float("temperature", 0.8, "0 is greedy")
    flags.DEFINE_integer("top_k", 0, "draw from the k likeliest tokens; 0: all")
    flags.DEFINE_float("top_p", 1.0, "draw from the likeliest tokens that hold this share of the probability")
    flags.DEFINE_integer("seed", 0, "of the draws")
    flags.DEFINE_multi_string("stop", [], "token that ends a text, as text or #ID; the end of a document always does")
    flags.DEFINE_bool("stats", False, "print speed, cache hits and fetch times to stderr")
    flags.DEFINE_string("output", "", "JSON file for texts and statistics")
    cli.run(main)
