"""Generates text from a trained model, its token memory computed live or looked up in a ToL file.

    python -m memoryllm_jax.generate --workdir=DIR --prompt="Once upon a time"
    python -m memoryllm_jax.generate --workdir=DIR --tol=tol.safetensors --rows=disk --prompt="..." --stats

With --tol the FFN-M weights, and the input embedding where it is untied, are never loaded; rows come from the
device, the host's memory or the disk. Give --prompt more than once, or --prompts=FILE with one a line, for a batch.
"""

import contextlib
import dataclasses
import math
import sys
import time

import numpy as np
from absl import flags

from memoryllm_jax import cli, files
from memoryllm_jax.cli import UserError
from memoryllm_jax.decoder import Decoder, LiveRows
from memoryllm_jax.sampling import Sampling, generate
from memoryllm_jax.saved import SavedModel
from memoryllm_jax.tol import build, edit, format, options, serve

PLACES = ("device", "host", "disk")


@dataclasses.dataclass(frozen=True)
class Contribution:
    """How much of what its FFNs add a model takes in (the paper's Table 1, Figures 4 and 12).

    alpha: factor of FFN-M, in base of the FFN.  alpha_compute: of FFN-C.  drop_layers, drop_compute: layers where these
    add nothing.
    """

    alpha: float = 1.0
    alpha_compute: float = 1.0
    drop_layers: tuple[int, ...] = ()
    drop_compute: tuple[int, ...] = ()

    def factors(self, config) -> tuple[np.ndarray, np.ndarray]:
        """Of the token memory and of FFN-C, [layers] each. Raises: UserError that names the flag."""
        first = self._factors(config, "alpha", "drop_layers")
        second = self._factors(config, "alpha_compute", "drop_compute")
        if config.row_dim and config.compute_dim:
            return first, second
        if (second != 1).any():
            found = config.architecture
            raise UserError(f"--alpha_compute, --drop_compute: expected flex, found {found}, which --alpha is about")
        return (first, second) if config.row_dim else (second, first)

    def _factors(self, config, alpha, drop):
        factor, dropped = getattr(self, alpha), getattr(self, drop)
        if not (math.isfinite(factor) and factor >= 0):
            raise UserError(f"--{alpha}: expected a number of zero or more, found {factor}")
        factors = np.full(config.layers, factor)
        for layer in dropped:
            if not 0 <= layer < config.layers:
                raise UserError(f"--{drop}: expected layers from 0 to {config.layers - 1}, found {layer}")
            factors[layer] = 0
        return factors


class Model:
    """A decoder and its rows, ready to generate.

    Args:
      tol: path of a ToL file; "" computes rows live.  place: device, host or disk.  cache: bytes of rows cached on
        the device, for host and disk.  overlay: path of edits, or "".  mesh: as of `SavedModel`.
    Raises: UserError.
    """

    def __init__(
        self,
        workdir: str,
        tol: str = "",
        place: str = "disk",
        cache: int = 256 << 20,
        overlay: str = "",
        step: int | None = None,
        dtype: str = "",
        mesh=None,
    ):
        if overlay and not tol:
            raise UserError("--overlay: expected --tol too, as edits are those of a ToL file")
        if place not in PLACES:
            raise UserError(f"--rows: expected one of {', '.join(PLACES)}, found {place!r}")
        self._tol = format.TolFile(tol) if tol else None  # first: a broken file is told of at once
        self.saved = saved = SavedModel(workdir, step, dtype, mesh)
        self.tokenizer, self.config = saved.tokenizer, saved.config
        if self._tol is None:
            params, _ = saved.load(lambda name: True)
            self.rows = LiveRows(self.config, params, saved.mesh)
        else:
            self._tol.check_model(self.config, saved.tokenizer.digest, None)
            edits = edit.Overlay.open(overlay, self._tol) if overlay else None
            params, digest = saved.load(lambda name: not saved.is_memory(name))
            self._tol.check_model(self.config, saved.tokenizer.digest, digest)
            self.rows = self._looked_up(place, cache, params, edits)
        self.decoder = self._whole = Decoder(self.config, params, saved.mesh)

    def contribute(self, contribution: Contribution) -> None:
        """Takes in so much of what the FFNs add from now on. Raises: UserError."""
        self.decoder = self._whole.scaled(*contribution.factors(self.config))

    def _looked_up(self, place, cache, params, edits):
        mesh, embedding = self.saved.mesh, params.get("embedding")
        repair = build.Repair(self.saved, self._tol)
        if place == "device":
            return serve.DeviceRows(self._tol, mesh, embedding, edits, repair)
        table = serve.HostTable(self._tol, repair) if place == "host" else serve.DiskTable(self._tol, repair=repair)
        return serve.CachedRows(table, mesh, cache, embedding, edits)

    def prompt(self, text: str) -> list[int]:
        """Token ids of a prompt, after the id that begins a document."""
        bos = self.tokenizer.bos_id
        return ([] if bos is None else [bos]) + self.tokenizer.encode(text)

    def generate(self, prompts: list[list[int]], max_tokens: int, sampling: Sampling, seed: int = 0, stop_ids=()):
        """As `sampling.generate`."""
        sizes = (self.saved.context, self.tokenizer.vocab_size)
        return generate(self.decoder, self.rows, prompts, max_tokens, sampling, seed, *sizes, frozenset(stop_ids))

    def close(self) -> None:
        self.rows.close()
        self.saved.close()
        if self._tol is not None:
            self._tol.close()


def model_from_flags(mesh=None) -> Model:
    """The model that the flags of `cli.define_model_flags` name. Raises: UserError."""
    f = flags.FLAGS
    if not f.tol and (f["rows"].present or f["cache"].present):
        raise UserError("--rows, --cache: expected --tol too, as they say where its rows come from")
    layers = {name: options.layer_list(f[name].value, name) for name in ("drop_layers", "drop_compute")}
    contribution = Contribution(f.alpha, f.alpha_compute, **layers)
    model = Model(f.workdir, f.tol, f.rows, options.size(f.cache, "cache"), f.overlay, f.step, f.dtype, mesh)
    if contribution != Contribution():
        model.contribute(contribution)
    return model


class Streamer:
    """A text that grows token by token: a character appears when all of its bytes are there."""

    def __init__(self, tokenizer, prompt: list[int]):
        self._decode, self._ids = tokenizer.decode, list(prompt)
        # Decoding starts at a token that is shown already: tokenizers treat the first token of a text apart.
        self._from, self._shown = max(0, len(prompt) - 1), len(prompt)

    def add(self, token: int) -> str:
        """What a new token adds to the text."""
        self._ids.append(token)
        return self._piece(whole=False)

    def end(self) -> str:
        """What is left, where the last character is not complete."""
        return self._piece(whole=True)

    def _piece(self, whole):
        before, text = self._decode(self._ids[self._from : self._shown]), self._decode(self._ids[self._from :])
        if text.endswith("\N{REPLACEMENT CHARACTER}") and not whole:
            return ""
        self._from, self._shown = max(self._from, self._shown - 1), len(self._ids)
        return text[len(before) :]


def text_after(tokenizer, prompt: list[int], new: list[int]) -> str:
    """The text that new tokens add to a prompt."""
    return tokenizer.decode(prompt + new)[len(tokenizer.decode(prompt)) :]


def stop_ids_of(model: Model, texts: list[str]) -> set[int]:
    """Ids of the stop tokens, and of the one that ends a document. Raises: UserError."""
    tokenizer = model.tokenizer
    return {*tokenizer.stop_ids, *(tokenizer.token(text, f"--stop={text}", tokenizer.vocab_size) for text in texts)}


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
            files.write_json(f.output, {"results": results, "stats": stats})
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
