"""Generates text from a trained model, with its token memory computed live or looked up in a ToL file.

    python -m memoryllm_jax.generate --workdir=DIR --prompt="Once upon a time"
    python -m memoryllm_jax.generate --workdir=DIR --tol=tol.safetensors --rows=disk --prompt="..." --stats

With --tol the FFN-M weights are never loaded, nor is an untied input embedding; --rows says whether the rows stay on
disk or are kept in device or host memory. For a batch, give --prompt several times, or --prompts=FILE with one prompt
a line.
"""

import contextlib
import functools
import sys
from typing import Annotated

from memoryllm_jax.common import cli, storage
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.common.options import Option
from memoryllm_jax.inference.sampling import Sampling
from memoryllm_jax.inference.text import compile_texts, print_texts
from memoryllm_jax.tol.serving import EngineOptions


def main(
    engine: EngineOptions,
    sampling: Sampling,
    prompt: Annotated[tuple[str, ...], Option("text to continue; several make a batch", many=True)] = (),
    prompts: Annotated[str, Option("text file with one prompt a line")] = "",
    max_tokens: Annotated[int, Option("new tokens for each prompt; fewer if the context is full", least=1)] = 128,
    seed: Annotated[int, Option("random seed of the sampling")] = 0,
    stop: Annotated[
        tuple[str, ...], Option("token that ends a text, as text or #ID; eos always ends it", many=True)
    ] = (),
    stats: Annotated[bool, Option("print speed, bytes of weights, cache hits and fetch times to stderr")] = False,
    output: Annotated[str, Option("JSON file to write texts and statistics to", writes=True)] = "",
) -> None:
    texts = read_prompts(prompt, prompts)
    how = {"prompts": texts, "max_tokens": max_tokens, "sampling": sampling, "seed": seed, "stops": stop}
    with contextlib.closing(engine.open(compile_ahead=functools.partial(compile_texts, **how))) as opened:
        results, measured = print_texts(opened, **how)
    if stats:
        for name, value in measured.items():
            shown = f"{value:,.3f}" if isinstance(value, float) else f"{value}"
            print(f"{name:>24}: {shown}", file=sys.stderr)
    if output:
        storage.write_json(output, {"results": results, "stats": measured})


def read_prompts(prompts: tuple[str, ...], path: str) -> list[str]:
    """The given prompts, followed by the lines of the file `path` unless that is empty. Raises: UserError."""
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
            raise ArgumentError("prompt", f"expected some text, found none in prompt {number}")
    return found


if __name__ == "__main__":
    cli.run(main)
