"""Measures a trained model: perplexity on text, or scores on tasks of EleutherAI's harness (lm_eval).

    python -m memoryllm_jax.evaluate --workdir=DIR --data=DATA --output=FILE.json --page=FOLDER
    python -m memoryllm_jax.evaluate --workdir=DIR --tol=tol.safetensors --data='books/*.txt'
    python -m memoryllm_jax.evaluate --workdir=DIR --tasks=hellaswag,piqa --output=FILE.json
    python -m memoryllm_jax.evaluate --workdir=DIR --tasks=lambada_local,piqa_local --task_data=FOLDER

--output is for machines; --page=FOLDER gets evaluate.html for people, with evaluate.json, CSV and PNG files beside it.
All devices of this machine share the work. --data is prepared data (folder or URL), or text files (.json, .jsonl, .txt,
each also .gz or .zst, or .parquet), whose documents are put between bos and eos, one after another, as `prepare` does.
The tokens are one stream. It is cut into windows of the model's context, as in training, and every token but the
stream's first is predicted once, from what is before it in its window. With --stride=S below the context T, windows
start every S tokens, and all but the first score only what the one before did not: their last S tokens, each predicted
from T-S tokens or more.
"""

import contextlib
import io
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from absl import flags

from memoryllm_jax import (
    cli,
    config,
    data,
    documents,
    files,
    generate,
    metrics,
    quality_page,
    report,
    scoring,
    sharding,
)
from memoryllm_jax.cli import UserError

_CHUNK = 1 << 20  # tokens read at a time
_FOR_DATA = ("split", "text_key", "stride", "max_tokens", "save_tokens")
_CHANGES = ("alpha", "alpha_compute", "drop_layers", "drop_compute")
_FOR_TASKS = ("num_fewshot", "limit", "task_path", "task_data", "log_samples")


class Text(NamedTuple):
    """A stream of token ids to score.

    read_each: (starts, count) -> int32 ids from each start, fewer at the end.
    tokens: of the stream.  bytes, words: of the text that all tokens but the first stand for.
    """

    read_each: Callable
    tokens: int
    bytes: float
    words: float


class Windows(NamedTuple):
    """How a stream is cut: `context` tokens predicted in each window, which start every `stride` tokens.

    max_tokens: to predict at most; 0: all.  whole: leave out a last window that is not full.
    """

    context: int
    stride: int
    max_tokens: int = 0
    whole: bool = False

    def cut(self, tokens: int, path: str) -> int:
        """Tokens of a stream that are used. Raises: UserError."""
        targets = min(tokens - 1, self.max_tokens or tokens)
        least = self.context if self.whole else 1
        if targets < least:
            raise UserError(f"{path}: expected at least {least + 1} tokens, found {tokens}")
        return targets + 1 - (targets - self.context) % self.stride * self.whole

    def spans(self, tokens: int) -> Iterator[tuple[int, int, int]]:
        """(first token, one past the last, number of its targets that are context only) of each window."""
        start = stop = 0
        while stop < tokens:
            before, stop = stop, min(start + self.context + 1, tokens)
            yield start, stop, max(0, before - 1 - start)
            start += self.stride


def perplexity(model: generate.Model, text: Text, windows: Windows, save_tokens: str = "") -> dict:
    """Loss on a text: nats a token, perplexity of tokens and of words, bits per byte, and what they are counted over.

    Args:
      save_tokens: path for the [windows, context + 1] ids, int32; needs windows that are whole.
    """
    spans = list(windows.spans(text.tokens))
    progress = cli.Progress("score", sum(stop - start - 1 for start, stop, _ in spans), "token")
    nats_T, predicted_T, saved = np.zeros(windows.context), np.zeros(windows.context, np.int64), []
    step = max(1, _CHUNK // windows.context)
    for first in range(0, len(spans), step):
        chosen = spans[first : first + step]
        pieces = text.read_each([start for start, _, _ in chosen], windows.context + 1)
        ids = [piece[: stop - start] for piece, (start, stop, _) in zip(pieces, chosen)]
        scores = scoring.score(model.decoder, model.rows, ids, windows.context, progress)
        for (log_probs_T, _), (_, _, skip) in zip(scores, chosen):
            nats_T[skip : len(log_probs_T)] -= log_probs_T[skip:]
            predicted_T[skip : len(log_probs_T)] += 1
        saved += ids if save_tokens else []
    progress.close()
    if save_tokens:
        buffer = io.BytesIO()
        np.save(buffer, np.stack(saved))
        files.write_bytes(save_tokens, buffer.getvalue())
    targets, nll = text.tokens - 1, float(nats_T.sum())
    return {
        **metrics.quality(nll / targets, targets, text.bytes),
        "tokens": targets,
        "word_perplexity": math.exp(min(nll / max(text.words, 1), 700.0)),
        "words": round(text.words),
        "bytes": round(text.bytes),
        "windows": len(spans),
        "context": windows.context,
        "stride": windows.stride,
        "by_context": _by_context(nats_T, predicted_T),
    }


def _by_context(nats_T, predicted_T) -> list[dict]:
    """Loss after 1, 2, 3 to 4, 5 to 8, ... tokens of the window."""
    context = int(np.flatnonzero(predicted_T)[-1]) + 1
    first = [0, *(2**k for k in range((context - 1).bit_length()))]
    nats, tokens = (np.add.reduceat(of_T[:context], first).tolist() for of_T in (nats_T, predicted_T))
    lasts = [*first[1:], context]
    return [
        {"from": start + 1, "to": last, "loss": of_part / count, "tokens": count}
        for start, last, of_part, count in zip(first, lasts, nats, tokens)
    ]


def prepared_text(path: str, split: str, tokenizer, windows: Windows) -> Text:
    """A split of prepared data. Bytes are in proportion to the tokens used, words are those of the decoded tokens.

    Raises: UserError.
    """
    stream = getattr(data.open_for(path, tokenizer.digest), split)
    tokens = windows.cut(stream.tokens, path)
    share = (tokens - 1) / (stream.tokens - 1)
    return Text(stream.read_each, tokens, stream.bytes * share, _count_words(stream, tokens, tokenizer))


def raw_text(pattern: str, text_key: str, tokenizer, windows: Windows) -> Text:
    """Text files, as a stream of documents. Bytes and words are in proportion to the tokens used. Raises: UserError."""
    bos, eos = ([] if i is None else [i] for i in (tokenizer.bos_id, tokenizer.eos_id))
    pieces, tokens, text_bytes, words = [], 0, 0, 0
    paths = documents.expand(pattern)
    for text in (text for path in paths for text, _ in documents.read(path, text_key)):
        pieces.append(np.array([*bos, *tokenizer.encode(text), *eos], np.int32))
        tokens, text_bytes, words = tokens + len(pieces[-1]), text_bytes + len(text.encode()), words + len(text.split())
        if windows.max_tokens and tokens > windows.max_tokens:
            break
    used = windows.cut(tokens, pattern)
    ids, share = np.concatenate(pieces), (used - 1) / (tokens - 1)

    def read_each(starts, count):
        return [ids[start : start + count] for start in starts]

    return Text(read_each, used, text_bytes * share, words * share)


def text_of(path: str, split: str, text_key: str, tokenizer, windows: Windows) -> Text:
    """Of prepared data or text files. Raises: UserError."""
    if documents.is_text(path):
        return raw_text(path, text_key, tokenizer, windows)
    return prepared_text(path, split, tokenizer, windows)


def _count_words(stream, tokens, tokenizer) -> int:
    """Of the documents that a stream's first tokens hold, words separated by white space."""
    ends = [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None]
    words, rest = 0, np.empty(0, np.int32)
    for start in range(0, tokens, _CHUNK):
        ids = np.concatenate([rest, stream.read(start, min(_CHUNK, tokens - start))])
        *whole, rest = np.split(ids, np.nonzero(np.isin(ids, ends))[0])
        if start + _CHUNK >= tokens:
            whole.append(rest)
        words += sum(len(tokenizer.decode(piece[~np.isin(piece, ends)]).split()) for piece in whole)
    return words


def quality_text(result: dict) -> str:
    return (
        f"loss {result['loss']:.4f} nats a token, perplexity {result['perplexity']:.3f}, word perplexity "
        f"{result['word_perplexity']:.2f}, {result['bits_per_byte']:.4f} bits per byte\n"
        f"{result['tokens']:,} tokens, {result['words']:,} words, {result['bytes']:,} bytes in {result['windows']:,} "
        f"windows of {result['context']}, stride {result['stride']}"
    )


def _on_data(model, page):
    f = flags.FLAGS
    context = model.saved.context
    stride = context if f.stride is None else f.stride
    if not 1 <= stride <= context:
        raise UserError(f"--stride: expected 1 to {context}, the model's context, found {stride}")
    windows = Windows(context, stride, f.max_tokens, whole=bool(f.save_tokens))
    text = text_of(f.data, f.split, f.text_key, model.tokenizer, windows)
    result = perplexity(model, text, windows, f.save_tokens)
    print(quality_text(result), flush=True)
    where = {"data": f.data} | ({} if documents.is_text(f.data) else {"split": f.split})
    result |= where | {"model": _about(model), "rows": model.rows.stats()}
    if f.output:
        files.write_json(f.output, result)
    if page:
        quality_page.of_text(page, model, text, result)
        print(page.write(result))


def _on_tasks(model, tasks, page):
    f = flags.FLAGS
    results = tasks.run(model, _about(model), f.num_fewshot, f.limit, f.output, f.log_samples)
    print(tasks.table(results), flush=True)
    if page:
        quality_page.of_tasks(page, results)
        print(page.write({name: results[name] for name in ("results", "n-shot", "n-samples")}))


def _about(model) -> dict:
    f, saved = flags.FLAGS, model.saved
    about = {"path": saved.workdir, "step": saved.step, "architecture": saved.config.architecture}
    about |= {"dtype": saved.config.dtype} | ({"tol": f.tol, "overlay": f.overlay} if f.tol else {})
    return about | {name: f[name].value for name in _CHANGES if f[name].present}


def _open_page(model):
    """The page that --page asks for, or a context without one."""
    f = flags.FLAGS
    if not f.page:
        return contextlib.nullcontext()
    facts = report.saved_facts(model.saved) | ({"rows": f"{f.tol}, on {f.rows}"} if f.tol else {})
    facts |= {name.replace("_", " "): f"{f[name].value}" for name in _CHANGES if f[name].present}
    facts |= report.quality_facts(f.data, f.split, f.max_tokens, f.tasks, f.num_fewshot, f.limit)
    return report.Report(f.page, "evaluate", f"{model.config.architecture} on {f.data or ', '.join(f.tasks)}", facts)


def _check(f):
    """Refuses flags that do not go together, before anything is loaded. Raises: UserError."""
    if bool(f.data) == bool(f.tasks):
        raise UserError(f"expected --data=TEXT or --tasks=NAMES, found {'both' if f.data else 'neither'}")
    for name in _FOR_TASKS if f.data else _FOR_DATA:
        if f[name].present:
            raise UserError(f"--{name}: expected {'--tasks' if f.data else '--data'} too, which it is about")
    if f.data and f["split"].present and documents.is_text(f.data):
        raise UserError(f"--split: expected prepared data, found text: --data={f.data}")
    if f.data:
        (documents.expand if documents.is_text(f.data) else data.Dataset)(f.data)
    for name in ("output", "save_tokens"):
        path = f[name].value
        if path and not files.is_url(path) and not os.path.isdir(os.path.dirname(os.path.abspath(path))):
            raise UserError(f"--{name}={path}: expected a file in a folder that is there, found no such folder")


def harness_module():
    """memoryllm_jax.harness. Raises: UserError if lm_eval is not there."""
    try:
        from memoryllm_jax import harness
    except ImportError as error:
        raise UserError(f"--tasks: needs lm_eval: pip install 'memoryllm_jax[eval]' ({error})") from error
    return harness


def main():
    f = flags.FLAGS
    _check(f)
    harness = harness_module() if f.tasks else None
    mesh = sharding.make_mesh(config.MeshConfig(data=-1, fsdp=1, tensor=1))
    tasks = harness.Tasks(f.tasks, f.task_path, f.task_data) if harness else None
    multiprocessing.set_start_method("forkserver")  # the harness has processes for some metrics, and JAX has threads
    with contextlib.closing(generate.model_from_flags(mesh)) as model, _open_page(model) as page:
        if f.data:
            _on_data(model, page)
        else:
            _on_tasks(model, tasks, page)
    return 0


if __name__ == "__main__":
    cli.define_model_flags()
    cli.define_quality_flags()
    flags.DEFINE_string("text_key", "text", "JSON field or parquet column that holds the text")
    flags.DEFINE_integer("stride", None, "tokens between the starts of windows; by default the model's context")
    flags.DEFINE_string(
        "save_tokens",
        "",
        ".npy file for the scored [windows, context + 1] ids; a last window that is not full is left out",
    )
    flags.DEFINE_bool("log_samples", False, "write each document's result beside --output, as the harness does")
    flags.DEFINE_string("output", "", "JSON file for the result; of tasks, in the harness's format")
    flags.DEFINE_string("page", "", "folder for evaluate.html, evaluate.json, and CSV and PNG files")
    cli.run(main)
