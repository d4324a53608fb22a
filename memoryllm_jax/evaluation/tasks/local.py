"""Documents of the task files beside this one, from JSON lines in a folder; nothing is fetched."""

import os
from typing import Annotated

import datasets
import msgspec

from memoryllm_jax.common import records, storage
from memoryllm_jax.common.errors import ArgumentError, UserError


class _Lambada(records.Record):
    """A text, or all but its last word and that word."""

    text: str | None = None
    query: str | None = None
    answers_text: Annotated[list[str], msgspec.Meta(min_length=1)] | None = None

    def __post_init__(self):
        if self.text is None and (self.query is None or self.answers_text is None):
            raise ValueError("expected text, or query and answers_text, found neither")

    def document(self) -> dict:
        return {"text": f"{self.query} {self.answers_text[0]}" if self.text is None else self.text}


class _Piqa(records.Record):
    goal: str
    sol1: str
    sol2: str
    label: Annotated[int, msgspec.Meta(ge=0, le=1)]

    def document(self) -> dict:
        return records.to_json(self)


def lambada(task_data: str = "", **_) -> dict[str, datasets.Dataset]:
    """lambada.jsonl, where a line has "text", or "query" and the word that follows in "answers_text"."""
    return {"test": _documents(task_data, "lambada.jsonl", _Lambada)}


def piqa(task_data: str = "", **_) -> dict[str, datasets.Dataset]:
    """piqa.jsonl, where a line has "goal", "sol1", "sol2" and "label", which is 0 or 1."""
    return {"validation": _documents(task_data, "piqa.jsonl", _Piqa)}


def _documents(folder, name, kind):
    if not folder:
        raise ArgumentError("task_data", f"expected the folder that holds {name}, found none")
    path = os.path.join(folder, name)
    found = []
    for number, line in enumerate(storage.read_bytes(path, "a file of JSON lines").splitlines(), 1):
        found.append(records.parse(kind, line, f"{path}: line {number}", "an example").document())
    if not found:
        raise UserError(f"{path}: expected one example a line, found an empty file")
    return datasets.Dataset.from_list(found)
