"""Typed config fields: dataclasses whose fields carry a `Rule`, built from trees of plain values and checked."""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Iterator

from memoryllm_jax.common.errors import UserError, shown


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which values of a field are valid, and whether the field may change on resume.

    Attributes:
      least, most: bounds of a number, inclusive.
      above, below: bounds of a number, exclusive.
      choices: the valid texts; empty: any text is valid.
      resumable: whether the field may change when a run resumes from a checkpoint. Such fields decide where and how
        fast a run trains, but not what it trains.
      only_with: another field as "GROUP.FIELD=VALUE", or "GROUP.FIELD" for any value but 0 and "". Without that value
        this field has no effect, and must keep its default.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    resumable: bool = False
    only_with: str = ""

    def takes(self, value) -> bool:
        """Whether the value is valid."""
        if self.choices and value not in self.choices:
            return False
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def expected(self) -> str:
        """The valid values in words, for an error message."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        bounds = {
            "at least": self.least,
            "at most": self.most,
            "more than": self.above,
            "less than": self.below,
        }
        return " and ".join(f"{words} {bound:,.10g}" for words, bound in bounds.items() if bound is not None)


def field(default, **rule):
    """A dataclass field whose metadata hold a `Rule` with these keywords."""
    return dataclasses.field(default=default, metadata={"rule": Rule(**rule)})


def rules(group: type, prefix: str = "") -> Iterator[tuple[str, Rule]]:
    """Yields ("model.dim", its Rule) for every field."""
    for f in dataclasses.fields(group):
        if dataclasses.is_dataclass(f.type):
            yield from rules(f.type, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, f.metadata.get("rule", Rule())


def flatten(config) -> dict[str, object]:
    """All fields of a tree of dataclasses by their dotted names: {"model.dim": 256, ...}."""
    out = {}
    for name, value in dataclasses.asdict(config).items():
        if isinstance(value, dict):
            out.update({f"{name}.{key}": inner for key, inner in value.items()})
        else:
            out[name] = value
    return out


def build(group: type, tree, path: str):
    """An instance of the dataclass `group` from a tree of its fields; `path` is its dotted name, for error messages.

    Raises: UserError that names a field that is unknown or has a value of another type.
    """
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a group of fields, found {shown(tree)}")
    types = {f.name: f.type for f in dataclasses.fields(group)}
    values = {}
    for name, value in tree.items():
        if name not in types:
            raise UserError(f"{path}.{name[:60]}: no such field{did_you_mean(name, types)}")
        kind = types[name]
        if dataclasses.is_dataclass(kind):
            values[name] = build(kind, value, f"{path}.{name}")
        elif type(value) is int and abs(value) >= 2**63:
            raise UserError(f"{path}.{name}: expected a number of at most 64 bits, found {shown(value)}")
        elif kind is float and type(value) is int:
            values[name] = float(value)
        elif type(value) is kind and (kind is not float or math.isfinite(value)):
            values[name] = value
        else:
            raise UserError(f"{path}.{name}: expected {kind.__name__}, found {shown(value)}")
    return group(**values)


def check_used(config, path: str) -> None:
    """Refuses fields that have no effect (`Rule.only_with`) and another value than their default.

    Args:
      config: a tree of dataclasses, whose fields all have defaults.
      path: its dotted name.
    Raises: UserError that names the field.
    """
    values, defaults = flatten(config), flatten(type(config)())
    for name, rule in rules(type(config)):
        if not rule.only_with or values[name] == defaults[name]:
            continue
        other, equals, wanted = rule.only_with.partition("=")
        if values[other] != wanted if equals else not values[other]:
            raise UserError(
                f"{path}.{name}: expected its default, {shown(defaults[name])}, as {other} is {shown(values[other])}, "
                f"found {shown(values[name])}"
            )


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of an error message about an unknown name: a similar name, or all of them."""
    close = difflib.get_close_matches(name, names, 1)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; there are {', '.join(names) or 'none below it'}"
