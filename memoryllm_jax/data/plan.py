"""What a run of `prepare` is to do, and what it has finished, as files in its output folder.

`.plan.json` holds the arguments, the input files and the tokenizer, `.done/NNNNN.json` the file shards of each input
file that is finished. A run that was killed goes on from them. Workers read the plan too, on whatever machine they run:
that they find it shows that they share the output folder.
"""

import contextlib
import hashlib
import os
import re
from typing import Annotated, Literal, NamedTuple

import msgspec

from memoryllm_jax.common import records, storage
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.records import Count, Record
from memoryllm_jax.data.dataset import ShardRecord, TokenizerRecord
from memoryllm_jax.data.tokenizer import SpecialTokens, default_special_tokens

PLAN = ".plan.json"
DONE = ".done"
_RECORD = re.compile(r"(\d{5,})\.json")


class Source(NamedTuple):
    """An input file."""

    path: str
    size: Count | None  # bytes as stored; None: the server does not say
    held_out: bool  # whether the whole file is held out for validation


class Plan(Record):
    """What tokenizing depends on.

    format: FORMAT of the file shards.
    tokenizer: the spec of the tokenizer, as the user gave it.
    text_key, validation_fraction, special_tokens_in_text: as of `prepare`.
    sources: the input files; an index into them names the file shards of each.
    model: the tokenizer in the output folder; None until it is there.
    """

    format: Count
    tokenizer: str
    text_key: str
    validation_fraction: Annotated[float, msgspec.Meta(ge=0, lt=1)]
    sources: tuple[Source, ...]
    model: TokenizerRecord | None = None
    special_tokens_in_text: SpecialTokens | None = None  # None in plans of version 0.1.0

    def with_model(self, model: TokenizerRecord) -> "Plan":
        """This plan with the tokenizer in the output folder."""
        return msgspec.structs.replace(self, model=model)

    def check_same(self, other: "Plan", output: str) -> None:
        """Raises: UserError if the arguments or input files of another run differ from these, which began `output`."""
        hint = "finish that run, or use a new folder"
        if [(s.path, s.held_out) for s in other.sources] == [(s.path, s.held_out) for s in self.sources]:
            for before, now in zip(self.sources, other.sources):
                if before.size != now.size:
                    raise UserError(
                        f"{now.path}: expected {before.size} bytes, as when {output} was begun, found {now.size}; "
                        "restore the file, or use a new folder"
                    )
        elif {s.path for s in other.sources} != {s.path for s in self.sources}:
            raise UserError(f"{output}: was begun with other input files; {hint}")
        different = [f for f in self.__struct_fields__ if f != "model" and getattr(self, f) != getattr(other, f)]
        if self.special_tokens_in_text is None and other.special_tokens_in_text == default_special_tokens(
            self.tokenizer
        ):
            different.remove("special_tokens_in_text")
        if different:
            raise UserError(f"{output}: was begun with another {', '.join(different)}; {hint}")


class FileRecord(Record):
    """What is finished of one input file.

    plan: digest of the plan that it was tokenized by.
    shards: {split: its file shard}; a split without a token has none.
    skipped: {cause: number of records that were skipped}.
    checksum: SHA-256 over the other fields.
    """

    plan: records.Digest
    shards: dict[Literal["train", "validation"], ShardRecord]
    skipped: dict[str, Count] = msgspec.field(default_factory=dict)
    checksum: str = ""

    def __post_init__(self):
        if self.checksum and self.checksum != _checksum(self):
            raise ValueError("expected the checksum of this record, found another: it was damaged or edited")


def _checksum(record: FileRecord) -> str:
    return hashlib.sha256(msgspec.json.encode([record.plan, record.shards, record.skipped])).hexdigest()


def read_plan(output: str) -> Plan:
    """The plan in the output folder. Raises: UserError."""
    return records.read(Plan, os.path.join(output, PLAN), "the plan of an earlier prepare")


def write_plan(plan: Plan, output: str) -> None:
    """Writes the plan. Raises: UserError."""
    storage.write_bytes(os.path.join(output, PLAN), _encoded(plan))


def digest(output: str) -> str:
    """The SHA-256 of the plan in the output folder; "" if there is none. Raises: UserError."""
    path = os.path.join(output, PLAN)
    return storage.sha256(path) if storage.exists(path) else ""


def record_path(index: int, output: str) -> str:
    """The path of the record of input file `index`."""
    return os.path.join(output, DONE, f"{index:05}.json")


def encode_record(record: FileRecord) -> bytes:
    """The content of a record, with its checksum."""
    return _encoded(msgspec.structs.replace(record, checksum=_checksum(record)))


def _encoded(record: Record) -> bytes:
    return msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n"


def finished(output: str) -> set[int]:
    """The indexes of all input files that have a record. Raises: UserError."""
    names = storage.names(os.path.join(output, DONE))
    return {int(match[1]) for name in names if (match := _RECORD.fullmatch(name))}


def remove_records(output: str) -> None:
    """Removes all records, and their folder if nothing else is in it. Raises: UserError."""
    for index in finished(output):
        storage.remove(record_path(index, output))
    if not storage.is_url(output):
        with contextlib.suppress(OSError):  # it holds a file of the user, or does not exist
            os.rmdir(os.path.join(output, DONE))


def finished_record(index: int, plan: str, source: Source, output: str) -> FileRecord | None:
    """The record of an input file that an earlier run finished, after a check of its file shards.

    Args:
      index: of the input file.
      plan: digest of the plan.
    Returns: None if there is no record.
    Raises: UserError if the record or a file shard has changed since then.
    """
    path = record_path(index, output)
    if not storage.exists(path):
        return None
    hint = f"delete {path} to tokenize {source.path} again"
    try:
        record = records.read(FileRecord, path, "a record of an earlier prepare")
        if record.plan != plan:
            raise UserError(f"{path}: plan: expected {plan[:12]}..., found {record.plan[:12]}...")
        for split, shard in record.shards.items():
            if shard.file != shard_name(split, index):
                raise UserError(f"{path}: {split}: expected file {shard_name(split, index)}, found {shard.file!r}")
            _check_shard(storage.inside(output, shard.file, path), shard)
    except UserError as error:
        raise UserError(f"{error}; {hint}") from error
    return record


def _check_shard(path: str, shard: ShardRecord) -> None:
    found = storage.sha256(path)
    if found != shard.sha256:
        raise UserError(
            f"{path}: changed since it was finished: expected SHA-256 {shard.sha256[:12]}..., found {found[:12]}..."
        )


def shard_name(split: str, index: int) -> str:
    """The name of the file shard of input file `index`."""
    return f"{split}-{index:05}.bin"
