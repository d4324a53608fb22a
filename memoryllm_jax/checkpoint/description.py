"""The description of a checkpoint: the JSON beside the arrays, with config, tokenizer, origin and digests. No JAX."""

import base64
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Collection
from fractions import Fraction
from typing import Any, Literal

import msgspec

from memoryllm_jax import config as config_lib
from memoryllm_jax.common import fields, records, storage
from memoryllm_jax.common.errors import ArgumentError, UserError, one_line
from memoryllm_jax.common.records import Count, Record
from memoryllm_jax.config import Config
from memoryllm_jax.data.tokenizer import SpecialTokens, Tokenizer

ITEM, FILE = "description", "metadata"  # Orbax's names: STEP/description/metadata holds the JSON
COMMITTED = "commit_success.txt"  # a file that Orbax writes last into a checkpoint on gs://


class Data(Record, omit_defaults=True):
    """The training data.

    digest: of the prepared data (`Dataset.digest`).
    shares: of the folders in a mixture, as fractions such as 7/10; () without weights.
    """

    digest: records.Digest
    shares: tuple[str, ...] = ()

    def identity(self) -> dict[str, str]:
        """What must agree where two runs train on the same data, by names for error messages."""
        return {"data": self.digest, "weights of the data": ", ".join(self.shares) or "none"}


class SavedTokenizer(Record):
    """The tokenizer, whole (`Tokenizer.to_json`).

    kind: how its content is read.
    digest: SHA-256 of the content.
    content: the tokenizer's file.
    special: bos and the ids that end a text, where they are not those in the content.
    special_tokens_in_text: as of `tokenizer.load`; None in a checkpoint of version 0.1.0.
    """

    kind: Literal["sentencepiece", "llama3", "hf"]
    digest: records.Digest
    content: bytes
    special: tuple[Count | None, list[Count]] | None = None
    special_tokens_in_text: SpecialTokens | None = None

    def __post_init__(self):
        found = hashlib.sha256(self.content).hexdigest()
        if found != self.digest:
            raise ValueError(f"expected a tokenizer of SHA-256 {self.digest[:12]}..., found {found[:12]}...")


class Description(Record):
    """The description of a checkpoint.

    The position in the data is not in it, as it follows from the step, which is the checkpoint's name.

    config: fields of the run's Config; `run` builds it.
    source: what `hf/source.py` keeps of a Hugging Face directory, which decodes it; {} if nothing was imported.
    digests: digest of each array by its name (`digest.of_tree`); None in a checkpoint of version 0.1.0.
    """

    config: dict[str, Any]
    data: Data
    tokenizer: SavedTokenizer
    source: dict[str, Any] = msgspec.field(default_factory=dict)
    digests: dict[str, records.Digest] | None = None

    def run(self) -> Config:
        """The config that the checkpoint was trained with. `read` has checked it."""
        return config_lib.from_saved(self.config)

    def open_tokenizer(self) -> Tokenizer:
        """The tokenizer of the training data. Raises: UserError."""
        return Tokenizer.from_json(records.to_json(self.tokenizer))


def describe(
    config: Config,
    data_digest: str,
    tokenizer: Tokenizer,
    source: dict | None = None,
    shares: tuple[Fraction, ...] = (),
) -> Description:
    """The description of a run's checkpoints, without digests: `Checkpoints.save` adds those.

    Args:
      data_digest, shares: as of `Dataset`.
      source: as of `Description`.
    """
    saved = tokenizer.to_json()
    return Description(
        config=dataclasses.asdict(config),
        data=Data(digest=data_digest, shares=tuple(map(str, shares))),
        tokenizer=SavedTokenizer(**(saved | {"content": base64.b64decode(saved["content"])})),
        source=source or {},
    )


def to_json(description: Description) -> dict:
    """The tree to write: the description and a checksum over it."""
    tree = records.to_json(description)
    return tree | {"checksum": _checksum(tree)}


def read(workdir: str, step: int) -> Description:
    """The description of a checkpoint.

    Args:
      workdir: absolute path or URL.
    Raises: UserError that names the file and what is wrong in it.
    """
    path = os.path.join(workdir, str(step), ITEM, FILE)
    data = storage.read_bytes(path, "the description of a checkpoint")
    tree, description = _decode(data, path)
    # Values are compared, not bytes: Orbax writes the JSON, and a later version may lay it out differently.
    checksum = tree.pop("checksum", None)
    if checksum is not None and checksum != _checksum(tree):
        raise UserError(f"{path}: is damaged: expected the checksum {str(checksum)[:64]}, found another")
    try:
        description.run()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return description


def _decode(data: bytes, path: str) -> tuple[dict, Description]:
    """The JSON as a tree of dicts and as a Description. Raises: UserError."""
    if re.search(rb"\\u[dD][89a-fA-F]", data) is None:
        return records.parse(dict[str, Any], data, path), records.parse(Description, data, path)
    # Imports keep bytes of texts that are not UTF-8 as lone surrogates, which msgspec refuses to decode.
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected the description of a checkpoint: {one_line(error, 200)}") from error
    return tree, records.convert(Description, tree, path)


def _checksum(tree: dict) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def folder(workdir: str) -> str:
    """The absolute path or gs:// URL of a workdir. Raises: ArgumentError for one that Orbax cannot write to."""
    if storage.is_url(workdir) and not workdir.startswith("gs://"):
        raise ArgumentError("workdir", f"expected a folder on a disk or gs://BUCKET/FOLDER, found {workdir}")
    if set("*?[]") & set(workdir):
        raise ArgumentError("workdir", f"expected a path without * ? [ ], as Orbax takes them for patterns: {workdir}")
    return storage.absolute(workdir)


def steps(workdir: str) -> list[int]:
    """Steps of the complete checkpoints in a workdir, in ascending order.

    Args:
      workdir: absolute path or URL.
    Raises: UserError if there is no such folder.
    """
    fs, root = storage.filesystem(workdir)
    with storage.user_errors(workdir, "a folder with checkpoints"):
        entries = fs.ls(root, detail=True)
        names = [os.path.basename(entry["name"].rstrip("/")) for entry in entries if entry["type"] == "directory"]
        numbers = [name for name in names if re.fullmatch("[0-9]+", name)]
        if storage.is_url(workdir):  # on a disk, a checkpoint gets its name when it is complete
            numbers = [name for name in numbers if fs.exists(f"{root}/{name}/{COMMITTED}")]
    return sorted(map(int, numbers))


def choose_step(workdir: str, step: int | None, argument: str = "step") -> int:
    """`step`, or the newest of a workdir if it is None. Raises: UserError if there is none; it names the argument."""
    if not storage.exists(workdir):
        raise UserError(f"{workdir}: expected a folder with checkpoints, found none")
    found = steps(workdir)
    if not found:
        raise UserError(f"{workdir}: expected a checkpoint, found none")
    if step is None:
        return found[-1]
    if step not in found:
        expected = f"expected one of {', '.join(map(str, found))} in {workdir}"
        raise ArgumentError(argument, f"{expected}, found {step}")
    return step


def config_of(workdir: str, step: int | None = None) -> Config:
    """The config that a checkpoint of a workdir was trained with; step None is the newest. Raises: UserError."""
    workdir = folder(workdir)
    return read(workdir, choose_step(workdir, step)).run()


def check_matches(saved: Description, current: Description, where: str) -> None:
    """Checks that a run may resume from a checkpoint: all fields but config.RESUMABLE_FIELDS must be the same.

    Args:
      saved: description in the checkpoint.
      current: description of this run (`describe`).
      where: path of the checkpoint, for the error message.
    Raises: UserError that names each field that differs.
    """
    different = differences(saved, current)
    if different:
        raise UserError(f"{where} is of another run: {'; '.join(different)}; use another workdir or the same settings")


def differences(saved: Description, current: Description, but: Collection[str] = ()) -> list[str]:
    """A clause for each field but config.RESUMABLE_FIELDS, and those given, in which a run differs from a checkpoint.

    Args:
      saved, current: as in `check_matches`.
      but: dotted names of further fields that may differ.
    """
    before = _fields(saved)
    now = _fields(current)
    return [
        f"{field}: {before[field]!r} in the checkpoint, {now[field]!r} in this run"
        for field in now
        if before[field] != now[field] and field not in config_lib.RESUMABLE_FIELDS and field not in but
    ]


def _fields(description: Description) -> dict[str, object]:
    """{name: value} of the config's fields, the digests of tokenizer and data, and the shares of a mixture."""
    return fields.flatten(description.run()) | {
        "tokenizer": description.tokenizer.digest,
        **description.data.identity(),
    }
