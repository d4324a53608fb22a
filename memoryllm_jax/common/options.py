"""Options of commands, stated once: as annotated parameters of a function or fields of a dataclass.

    def generate(prompt: Annotated[str, Option("text to continue")], seed: Annotated[int, Option("random seed")] = 0):

`define(generate)` defines a flag for each parameter that has an `Option`, and `values(generate)` reads the flags back
as keyword arguments. Type, default and help come from the signature. A parameter whose type is a dataclass of options
stands for all of its fields. The parameter `import_` is the flag --import, which is a reserved word in Python.
"""

import dataclasses
import inspect
import math
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator

from absl import flags

from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import ArgumentError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

_MISSING = inspect.Parameter.empty

flags.disclaim_key_flags()  # flags that are defined here belong to the command: its --help lists them


@dataclasses.dataclass(frozen=True)
class Option:
    """What the value of a parameter means, and which values are valid.

    Attributes:
      help: text for --help.
      least: the smallest valid number; None: any finite number is valid. Of a tuple, each element is checked.
      choices: the valid texts; empty: any text is valid.
      writes: whether the text is the path of a file that the command writes, so that a path that cannot be written is
        refused before the work and not after it.
      many: for tuples, whether the flag is given once for each element; otherwise it is written as A,B,C.
    """

    help: str
    least: float | None = None
    choices: tuple[str, ...] = ()
    writes: bool = False
    many: bool = False

    def check(self, name: str, value) -> None:
        """Raises: ArgumentError if the value is not valid."""
        if value is None:
            return
        if isinstance(value, tuple):
            for element in value:
                self.check(name, element)
            return
        if self.choices and value not in self.choices:
            raise ArgumentError(name, f"expected one of {', '.join(self.choices)}, found {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ArgumentError(name, f"expected a finite number, found {value}")
        if self.least is not None and value < self.least:
            raise ArgumentError(name, f"expected at least {self.least:g}, found {value}")
        if self.writes and value:
            _check_file_to_write(name, value)


def _check_file_to_write(name: str, path: str) -> None:
    """Raises: ArgumentError if the path is a folder or a device, or its folder does not exist."""
    if storage.is_url(path):  # object stores make folders as files are written
        return
    if os.path.isdir(path):
        raise ArgumentError(name, f"expected a name for a file, found the folder {path}")
    if os.path.exists(path) and not os.path.isfile(path):
        # The complete file is renamed to this path, which would replace such as /dev/null for all of the machine.
        raise ArgumentError(name, f"expected a file, found the device {path}")
    if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
        raise ArgumentError(name, f"expected a file in a folder that exists, found {path}")


class _Parameter(typing.NamedTuple):
    """A parameter or field with an `Option`."""

    name: str
    type: type  # the plain type, without Annotated and None
    element: type  # that of a tuple's elements; str for other types
    default: object  # _MISSING where there is none
    option: Option

    @property
    def flag(self) -> str:
        return self.name.removesuffix("_")


def define(target: Callable) -> None:
    """Defines the flags of a function's or dataclass's options."""
    makers = {str: flags.DEFINE_string, int: flags.DEFINE_integer, float: flags.DEFINE_float, bool: flags.DEFINE_bool}
    for parameter in _parameters(target):
        option = parameter.option
        value = None if parameter.default is _MISSING else parameter.default
        if parameter.type is tuple:
            value = list(value or ())
            make = flags.DEFINE_multi_string if option.many else flags.DEFINE_list
        else:
            make = makers[parameter.type]
        text = f"{option.help}; one of {', '.join(option.choices)}" if option.choices else option.help
        # `values` reports a missing flag: absl's message for `required` flags does not say what the flag is.
        make(parameter.flag, value, text)


def values(target: Callable) -> dict[str, object]:
    """Keyword arguments for `target`, from the flags that `define` defined.

    Raises: ArgumentError for a value that is missing or not valid.
    """
    out = {}
    for name, hint in hints(target).items():
        if dataclasses.is_dataclass(hint):
            out[name] = hint(**values(hint))
    for parameter in _parameters(target, nested=False):
        value = flags.FLAGS[parameter.flag].value
        if parameter.default is _MISSING and value in (None, "", []):
            raise ArgumentError(parameter.flag, f"is missing ({parameter.option.help})")
        if parameter.type is tuple and value is not None:
            value = _elements(parameter, value)
        parameter.option.check(parameter.flag, value)
        out[parameter.name] = value
    return out


def _elements(parameter: _Parameter, texts: Iterable) -> tuple:
    """The elements of a tuple from their texts. Raises: ArgumentError for one that is not of their type."""
    try:
        return tuple(map(parameter.element, texts))
    except ValueError as error:
        expected = "whole numbers" if parameter.element is int else "numbers"
        found = ",".join(map(str, texts))
        raise ArgumentError(parameter.flag, f"expected {expected} separated by commas, found {found}") from error


def check(options) -> None:
    """Checks the fields of a dataclass of options; call it in __post_init__. Raises: ArgumentError."""
    for parameter in _parameters(type(options), nested=False):
        parameter.option.check(parameter.name, getattr(options, parameter.name))


def names(target: Callable) -> set[str]:
    """The names of the flags that `define` defines, without dashes."""
    return {parameter.flag for parameter in _parameters(target)}


def given(name: str) -> bool:
    """Whether the flag was given on the command line."""
    return flags.FLAGS[name].present > 0


def size(text: str, name: str) -> int:
    """Bytes of "12KiB", "1.5GB" or "4096". Raises: ArgumentError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]i?B)?", text, re.IGNORECASE)
    if not match or float(match[1]) == 0:
        raise ArgumentError(name, f"expected a size above zero such as 12KiB or 1.5GB, found {text!r}")
    return int(float(match[1]) * _UNITS[(match[2] or "").upper()])


def layers(texts: Iterable[str], name: str, count: int) -> tuple[int, ...]:
    """Parses layer numbers of a model that has `count` layers.

    Returns: the numbers without duplicates, in rising order. Raises: ArgumentError.
    """
    for text in texts:
        if not text.strip().isdecimal() or int(text) >= count:
            raise ArgumentError(name, f"expected layers from 0 to {count - 1}, such as 0,{count - 1}, found {text!r}")
    return tuple(sorted({int(text) for text in texts}))


def hints(target: Callable) -> dict[str, object]:
    """The types of a dataclass's fields or a function's parameters, in their order."""
    found = typing.get_type_hints(target, include_extras=True)
    return {name: found[name] for name in inspect.signature(target).parameters if name in found}


def is_option(hint) -> bool:
    """Whether a parameter of this type is an option, or a dataclass of options."""
    return dataclasses.is_dataclass(hint) or _option(hint) is not None


def _option(hint) -> Option | None:
    """The Option of Annotated[type, Option(...)]."""
    for extra in getattr(hint, "__metadata__", ()):
        if isinstance(extra, Option):
            return extra
    return None


def _parameters(target, nested: bool = True) -> Iterator[_Parameter]:
    """The parameters that have an `Option`, with `nested` also those inside dataclasses of options."""
    parameters = inspect.signature(target).parameters
    for name, hint in hints(target).items():
        if dataclasses.is_dataclass(hint):
            if nested:
                yield from _parameters(hint)
            continue
        option = _option(hint)
        if option is not None:
            kind, element = _types(typing.get_args(hint)[0])
            yield _Parameter(name, kind, element, parameters[name].default, option)


def _types(hint) -> tuple[type, type]:
    """(type, type of the elements) of a value: (int, str) for `int | None`, (tuple, float) for `tuple[float, ...]`."""
    if isinstance(hint, types.UnionType):
        (hint,) = set(typing.get_args(hint)) - {types.NoneType}
    if typing.get_origin(hint) is tuple:
        return tuple, typing.get_args(hint)[0]
    return hint, str
