"""What import keeps of a Hugging Face directory in the checkpoint's description, so that export writes it again."""

import os
from typing import Literal

import msgspec

from memoryllm_jax.common import records, storage
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.hf import shards

# Files that export writes again unchanged, also for a model that was trained from the import.
KEPT = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
    "NOTICE.txt",
    "USE_POLICY.md",
)
# Files that describe the imported weights, so a model that is trained from the import drops them.
OF_THESE_WEIGHTS = ("config.json", "README.md")
_MOST_BYTES = 2**24  # of a kept file: tokenizer_config.json of Llama 3 has 50 kB


class Source(records.Record):
    """The part `source` of a checkpoint's description.

    Attributes:
      dtypes: dtypes of the imported tensors.
      special: {name in config.json: ids} of the special tokens; None if nothing was imported.
      files: {name: text} of the files among KEPT. Bytes that are not UTF-8 are surrogates.
      of_these_weights: the same for OF_THESE_WEIGHTS.
    """

    dtypes: tuple[Literal["float32", "bfloat16", "float16"], ...] = ()
    special: dict[str, int | list[int] | None] | None = None
    files: dict[str, str] = msgspec.field(default_factory=dict)
    of_these_weights: dict[str, str] = msgspec.field(default_factory=dict)

    def __post_init__(self):
        # A description from elsewhere must not decide where export writes, or what code it writes.
        # Imports of earlier versions also hold the index of the imported files, which export writes anew.
        names = {"files": KEPT, "of_these_weights": (*OF_THESE_WEIGHTS, shards.INDEX)}
        for field, known in names.items():
            other = sorted(set(getattr(self, field)) - set(known))
            if other:
                raise ValueError(f"expected files among {', '.join(known)} in {field}, found {other[0][:200]!r}")


def of(tree: dict, where: str) -> Source:
    """The source in a checkpoint's description; an empty one for a model that was trained from scratch.

    Args:
      tree: `Description.source`.
      where: the checkpoint's folder, for error messages.
    Raises: UserError.
    """
    return records.convert(Source, tree, f"{where}: source")


def texts(folder: str, names: tuple[str, ...]) -> dict[str, str]:
    """{name: text} of those files that exist in a model's folder. Bytes that are not UTF-8 become surrogates.

    Raises: UserError for a symbolic link out of the folder, or a file that is too large to be one of these.
    """
    out = {}
    for name in names:
        path = shards.path_in(folder, name)
        if not os.path.exists(path):
            continue
        size = os.path.getsize(path)
        if size > _MOST_BYTES:
            raise UserError(f"{path}: expected at most {_MOST_BYTES:,} bytes, found {size:,}")
        out[name] = storage.read_bytes(path, "text").decode(errors="surrogateescape")
    return out


def write_texts(folder: str, files: dict[str, str]) -> None:
    """Writes files of a `Source` into a folder; surrogates become the bytes that they stand for. Raises: UserError."""
    for name, text in files.items():
        storage.write_bytes(storage.inside(folder, name, folder), text.encode(errors="surrogateescape"))
