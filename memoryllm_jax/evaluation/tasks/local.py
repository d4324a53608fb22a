"""Documents of the task files beside this one, from JSON lines in a folder; nothing is fetched."""

import json
import os

import datasets

from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import ArgumentError, UserError


def lambada(task_data: str = "", **_) -> dict[str, datasets.Dataset]:
    """lambada.jsonl, where a line has "text", or "query" and the word that follows in "answers_text"."""
    records = _records(task_data, "lambada.jsonl", lambda r: {"text": r["text"] if "text" in r else _joined(r)})
    return {"test": records}


def piqa(task_data: str = "", **_) -> dict[str, datasets.Dataset]:
    """piqa.jsonl, where a line has "goal", "sol1", "sol2" and "label", which is 0 or 1."""
    names = ("goal", "sol1", "sol2", "label")
    return {"validation": _records(task_data, "piqa.jsonl", lambda r: {name: r[name] for name in names})}


def _joined(record):
    return f"{record['query']} {record['answers_text'][0]}"


def _records(folder, name, document):
    if not folder:
        raise ArgumentError("task_data", f"expected the folder that holds {name}, found none")
    path = os.path.join(folder, name)
    found = []
    for number, line in enumerate(storage.read_bytes(path, "a file of JSON lines").splitlines(), 1):
        try:
            found.append(document(json.loads(line)))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(f"{path}: line {number}: expected an example of {name}, found {error!r}") from error
    if not found:
        raise UserError(f"{path}: expected one example a line, found an empty file")
    return datasets.Dataset.from_list(found)
