"""Edits as people and programs ask for them: on a command line, or as JSON.

    {"operation": "replace", "token": " cat", "by": " dog"}
    {"operation": "blend", "token": "#17", "by": 42, "share": 0.5, "layers": [0, 5]}
    {"operation": "suppress", "layer": 3, "key": 17}

A token is its id, "#ID", or a text that is exactly one token. `Editor.add` makes an edit of an overlay from each.
"""

from typing import Annotated

import msgspec

from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.common.records import Count, Record

Token = Count | Annotated[str, msgspec.Meta(min_length=1, max_length=1000)]
Layers = Annotated[tuple[Count, ...], msgspec.Meta(min_length=1)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]

_MOST_DIGITS = 18  # of a number in a text: Python refuses to read thousands

# token id whose row changes -> (token id, weight) pairs: the rows before the edit that the new row is the sum of
Mix = dict[int, list[tuple[int, float]]]


class _Spec(Record, tag_field="operation", forbid_unknown_fields=True):
    """What all edits share: the field `operation`, which names the class."""

    @property
    def operation(self) -> str:
        """The name of the operation, such as "swap"."""
        return self.__struct_config__.tag


class _OfRows(_Spec, kw_only=True):
    """An edit that gives tokens new rows.

    Attributes:
      token: the token whose row changes.
      layers: the layers that change; None for all.
    """

    token: Token
    layers: Layers | None = None

    @property
    def tokens(self) -> tuple[Token, ...]:
        """The tokens that the edit names, in the order in which `mix` takes their ids."""
        return (self.token,)


class _OfTwoRows(_OfRows, kw_only=True):
    """An edit that also reads the row of a second token, `by`."""

    by: Token

    @property
    def tokens(self) -> tuple[Token, ...]:
        return self.token, self.by


class Swap(_OfTwoRows, tag="swap"):
    """Two tokens exchange their rows."""

    def mix(self, token: int, by: int) -> Mix:
        return {token: [(by, 1.0)], by: [(token, 1.0)]}


class Replace(_OfTwoRows, tag="replace"):
    """A token gets the row of another one."""

    def mix(self, token: int, by: int) -> Mix:
        return {token: [(by, 1.0)]}


class Blend(_OfTwoRows, tag="blend", kw_only=True):
    """A token gets (1 - share) * its row + share * another token's row."""

    share: Share

    def mix(self, token: int, by: int) -> Mix:
        return {token: [(token, 1 - self.share), (by, self.share)]}


class Zero(_OfRows, tag="zero"):
    """A token's row becomes zero."""

    def mix(self, token: int) -> Mix:
        return {token: []}


class Suppress(_Spec, tag="suppress", kw_only=True):
    """Every token's row loses what one key of one layer's FFN-M adds to it."""

    layer: Count
    key: Count


EditSpec = Swap | Replace | Blend | Zero | Suppress
_CLASSES = {cls.__struct_config__.tag: cls for cls in (Swap, Replace, Blend, Zero, Suppress)}
OPERATIONS = tuple(_CLASSES)


def from_text(operation: str, text: str, layers: tuple[int, ...] | None = None) -> EditSpec:
    """An edit from a command line.

    Args:
      operation: one of OPERATIONS.
      text: "TOKEN" for zero, "TOKEN,BY" for swap and replace, "TOKEN,BY,SHARE" for blend, and "LAYER:KEY" for suppress.
        A comma within a token is written twice.
      layers: the layers of an edit of rows; None for all. A suppressed key names its own.
    Raises: ArgumentError that names the operation.
    """
    if operation == "suppress":
        layer, _, key = text.partition(":")
        if not all(number.isdecimal() and len(number) <= _MOST_DIGITS for number in (layer, key)):
            raise ArgumentError(operation, f"expected LAYER:KEY, two numbers, found {text[:40]!r}")
        return Suppress(layer=int(layer), key=int(key))
    kind = _CLASSES[operation]
    names = [name for name in ("token", "by", "share") if name in kind.__struct_fields__]
    values = dict(zip(names, _split(operation, text, len(names))))
    if "share" in values:
        values["share"] = _share(values["share"])
    return kind(**values, layers=layers)


def _split(operation, text, count) -> list[str]:
    """The comma-separated values of a text. Two commas in a row are a comma within a value. Raises: ArgumentError."""
    # A null character, which no command line can hold, stands for these commas while the text is split.
    fields = [field.replace("\0", ",") for field in text.replace(",,", "\0").split(",")]
    if len(fields) != count or not all(fields):
        expected = "a token" if count == 1 else f"{count} values with commas between them"
        raise ArgumentError(operation, f"expected {expected}, found {text!r}")
    return fields


def _share(text) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0  # refused below, like any number outside the range
    if not 0 <= share <= 1:
        raise ArgumentError("blend", f"expected a share from 0 to 1, found {text!r}")
    return share
