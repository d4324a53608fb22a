"""JSON that people bring, decoded into typed structures: types and bounds are checked while it is read.

A structure is a subclass of `Record`; its annotations are the types that msgspec checks, with bounds as msgspec.Meta:

    class Shard(Record):
        file: str
        tokens: Count

Fields that a structure does not name are ignored, so that files of later versions open. A rule across fields goes into
`__post_init__`, which raises ValueError("expected ..., found ...").
"""

import re
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import msgspec

from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import UserError, one_line, shown

# Larger integers cannot be told apart by readers of JSON that hold numbers as float64.
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
# Sizes of arrays and numbers of layers: XLA and safetensors allow more, but no model needs it.
Size = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
Digest = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]  # hexadecimal

T = TypeVar("T")

_AT_FIELD = re.compile(r"(?s)(?P<problem>.*?)(?: - at `(?P<place>.*)`)?")
_MOST_FOUND = 60  # characters of a wrong value that a message shows


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A structure that a file holds as a JSON object."""


class RecordError(UserError):
    """JSON that does not decode into its type.

    Args:
      where: the file, and the place in it.
      problem: the rest of the message: the field, what was expected there and what was found.
      field: the outermost field that the problem is in, or None.
    """

    def __init__(self, where: str, problem: str, field: str | None = None):
        super().__init__(f"{where}: {problem}")
        self.problem, self.field = problem, field


def parse(kind: type[T], data: bytes | str, where: str, expected: str = "") -> T:
    """Decodes JSON.

    Args:
      kind: a Record, or another type that msgspec decodes, such as dict[str, Count].
      data: the JSON text.
      where: the file, and the place in it, that error messages name.
      expected: what the JSON describes, for error messages: "a ToL layout".
    Raises: UserError that names the field, what was expected there and what was found.
    """
    wanted = f"expected {expected}, found " if expected else ""
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise RecordError(where, *_explained(error, lambda: _untyped(data))) from error
    except RecursionError as error:
        raise RecordError(where, f"{wanted or 'expected JSON, found '}JSON that is nested too deeply") from error
    except (msgspec.DecodeError, UnicodeError) as error:
        problem = one_line(error, 200).removeprefix("JSON is malformed: ")
        raise RecordError(where, f"{wanted or 'found '}invalid JSON: {problem}") from error


def read(kind: type[T], path: str, expected: str) -> T:
    """Decodes a JSON file on a path or URL.

    Args:
      kind, expected: as of `parse`.
    Raises: UserError that names file and field, what was expected and what was found.
    """
    return parse(kind, storage.read_bytes(path, expected), path, expected)


def convert(kind: type[T], tree: Any, where: str) -> T:
    """The typed value of decoded JSON, which is a tree of dicts and lists.

    Args:
      kind, where: as of `parse`.
    Raises: UserError that names the field, what was expected there and what was found.
    """
    try:
        return msgspec.convert(tree, kind)
    except msgspec.ValidationError as error:
        raise RecordError(where, *_explained(error, lambda: tree)) from error
    except UnicodeError as error:
        problem = one_line(error, 200)
        raise RecordError(where, f"expected Unicode text, found half a surrogate pair: {problem}") from error


def to_json(value: Any) -> Any:
    """A Record as the tree of dicts and lists that `storage.write_json` takes."""
    return msgspec.to_builtins(value)


def _untyped(data: bytes | str) -> Any:
    """JSON as a tree; None if it is too odd to decode without a type."""
    try:
        return msgspec.json.decode(data)
    except (ValueError, RecursionError):
        return None


def _explained(error: msgspec.ValidationError, tree_of: Callable[[], Any]) -> tuple[str, str | None]:
    """msgspec's message in our form: FIELD: expected ..., found ...

    Args:
      tree_of: returns the JSON as a tree. It is called only if the message lacks the value that was found.
    Returns: (the message, its outermost field or None).
    """
    match = _AT_FIELD.fullmatch(str(error))
    problem, place = match["problem"], (match["place"] or "").removeprefix("$").removeprefix(".")
    name = f"{place}: " if place else ""
    outermost = re.match(r"[^.\[]+", place)
    field = outermost[0] if outermost else None
    missing = re.fullmatch("Object missing required field `(.*)`", problem)
    if missing:
        return f"{name}expected a field {missing[1]}, found none", field or missing[1]
    unknown = re.fullmatch("(?s)Object contains unknown field `(.*)`", problem)
    if unknown:
        found = shown(unknown[1], _MOST_FOUND)
        return f"{name}expected known fields only, found {found}", field or unknown[1][:_MOST_FOUND]
    problem = problem.replace("`", "").replace("Expected ", "expected ", 1).replace(", got ", ", found ")
    if problem == "Integer value out of range":
        problem = "expected an integer of at most 64 bits, found a larger one"
    elif problem == "Number out of range":
        problem = "expected a finite number, found a larger one"
    problem = re.sub("^Invalid (?:enum )?value '?(.*?)'?$", r"expected a known value, found '\1'", problem)
    # msgspec writes [...] for keys of a dict, so the value cannot be looked up.
    if "found" not in problem and "[...]" not in place:
        problem += _found(tree_of(), place)
    return f"{name}{problem}", field


def _found(value, place: str) -> str:
    """The clause ", found VALUE" for a value out of its bounds; "" where the place names no single value."""
    try:
        for key, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", place):
            value = value[key] if key else value[int(index)]
    except (LookupError, TypeError):
        return ""
    text = repr(value)
    return f", found {text}" if len(text) <= _MOST_FOUND else f", found {text[:_MOST_FOUND]}..."
