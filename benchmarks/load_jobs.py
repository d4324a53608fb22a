"""Requests of the load test (load.py), and the texts that `generate` gives for each of them alone."""

import contextlib
import random
from collections.abc import Iterator
from typing import NamedTuple

from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.inference.engine import Contribution, Engine
from memoryllm_jax.inference.sampling import Sampling
from memoryllm_jax.inference.text import text_after
from memoryllm_jax.tol.edit import Request, fulfil
from memoryllm_jax.tol.format import TolFile
from memoryllm_jax.tol.serving import open_engine


class Edit(NamedTuple):
    """An edit in the two forms in which a request brings it.

    Attributes:
      name: of its overlay's file, without the extension.
      json: the edit as a request writes it.
    """

    name: str
    json: dict


class Job(NamedTuple):
    """A request, and what the server has to answer.

    Attributes:
      kind: what is special about it.
      body: of the request, without "model" and "stream".
      edit: the edit that it asks for, or None.
      texts: the expected text of each choice.
      new_tokens: in all choices, without a stop id.
    """

    kind: str
    body: dict
    edit: Edit | None
    texts: tuple[str, ...] = ()
    new_tokens: int = 0


def make_overlays(tol_path: str, workdir: str, folder: str, count: int, rng: random.Random) -> list[Edit]:
    """Writes overlays of one edit each into a folder."""
    edits = []
    with contextlib.closing(TolFile(tol_path)) as tol:
        frequent = tol.token_of_row()[3:200].tolist()
        for number in range(count):
            token, by = rng.sample(frequent, 2)
            layer, key = rng.randrange(tol.layout.layers), rng.randrange(32)
            edit, asked = (
                ({"operation": "replace", "token": token, "by": by}, {"replace": (f"#{token},#{by}",)}),
                ({"operation": "zero", "token": token}, {"zero": (f"#{token}",)}),
                (
                    {"operation": "blend", "token": token, "by": by, "share": 0.5},
                    {"blend": (f"#{token},#{by},0.5",)},
                ),
                ({"operation": "suppress", "layer": layer, "key": key}, {"suppress": (f"{layer}:{key}",)}),
            )[number % 4]
            name = f"overlay{number}"
            fulfil(tol, Request(f"{folder}/{name}.safetensors", workdir=workdir, **asked))
            edits.append(Edit(name, edit))
    return edits


def make_jobs(engine: Engine, dataset: Dataset, edits: list[Edit], count: int, rng: random.Random) -> list[Job]:
    """Different requests: prompts of mixed lengths, a third with an overlay, and some of each other kind.

    Their texts are those of no model yet: see `with_texts`.
    """
    context = engine.context
    jobs = []
    for number in range(count):
        length = rng.choice((context // 32, context // 8, context // 4, context // 2))
        start = rng.randrange(dataset.validation.tokens - context)
        prompt = dataset.validation.read(start, length).tolist()
        body = {"prompt": prompt, "temperature": 0, "max_tokens": rng.randint(context // 16, context * 3 // 8)}
        kind, edit = _kind(number)
        if edit:
            edit = rng.choice(edits)
            body |= {"overlay": edit.name} if kind == "overlay" else {"edits": [edit.json]}
        elif kind == "contribution":
            body["contribution"] = {"alpha": 0.5, "drop_layers": [0]}
        elif kind == "logprobs":
            body["logprobs"] = 5
        elif kind == "n":
            body |= {"n": 2, "temperature": 0.8, "seed": number}
        elif kind == "stop":
            body["stop"] = [" the", "\n"]
        jobs.append(Job(kind, body, edit or None))
    return jobs


def _kind(number: int) -> tuple[str, bool]:
    """(what is special about a request of this number, whether it has an edit)."""
    if number % 3 == 0:
        return "overlay", True
    kinds = ("plain", "edits", "contribution", "logprobs", "n", "stop")
    kind = kinds[(number - number // 3 - 1) % len(kinds)]
    return kind, kind == "edits"


def with_texts(workdir: str, tol: str, folder: str, jobs: list[Job]) -> Iterator[Job]:
    """The jobs with the texts that `generate` gives for each alone, with its overlay or contribution."""
    by_change: dict[tuple, list[Job]] = {}
    for job in jobs:
        by_change.setdefault((job.edit and job.edit.name, job.kind == "contribution"), []).append(job)
    for (overlay, _), group in by_change.items():
        path = f"{folder}/{overlay}.safetensors" if overlay else ""
        with contextlib.closing(open_engine(workdir, tol, overlay=path)) as engine:
            changed = group[0].body.get("contribution")
            if changed:
                engine.contribute(Contribution(**changed))
            for job in group:
                yield _with_texts(engine, job)


def _with_texts(engine: Engine, job: Job) -> Job:
    body, tokenizer = job.body, engine.tokenizer
    count = body.get("n", 1)
    prompt, new = body["prompt"], [[] for _ in range(count)]
    stop_ids = engine.stop_ids(())
    for step in engine.generate(
        [prompt] * count, body["max_tokens"], Sampling(body["temperature"]), body.get("seed", 0), stop_ids
    ):
        for sequence, token in step:
            new[sequence].append(token)
    texts = []
    for ids in new:
        text = text_after(tokenizer, prompt, ids)
        ends = [place for stop in body.get("stop", ()) if (place := text.find(stop)) >= 0]
        texts.append(text[: min(ends)] if ends else text)
    return job._replace(texts=tuple(texts), new_tokens=sum(map(len, new)))
