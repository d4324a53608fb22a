"""Paths that name several folders of prepared data, and the mixture that weights make of them. No JAX.

In a mixture each sequence of a batch comes from one source, and source k gives the share w_k / (w_1 + ... + w_K) of the
sequences. As all sequences are equally long, that is its share of the tokens too: the "sampling proportion" of LLaMA
(Touvron et al. 2023, arXiv 2302.13971, Table 1).
"""

import math
import os
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.data.documents import EMBEDDED

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d{1,2})?", re.ASCII)
_HOST = re.compile(r"[^/]*://[^/]*")  # a URL without a path


class Part(NamedTuple):
    """A folder that a path names.

    path: a folder or URL.
    weight: its weight in a mixture, more than 0; None: the folders are one stream.
    """

    path: str
    weight: Fraction | None


def parts_of(path: str) -> list[Part]:
    """The folders that a path names.

    Args:
      path: FOLDER or FOLDER,FOLDER, each a folder or URL; or FOLDER:WEIGHT,FOLDER:WEIGHT for a mixture. The name of an
        existing folder is taken as it is, also where it ends in a colon and a number; one that is given alone may have
        commas. A name that is given alone has no weight. In a URL without a path, a whole number after the colon is a
        port.
    Raises: UserError.
    """
    if not storage.is_url(path) and os.path.isdir(path):
        return [Part(path, None)]
    names = path.split(",")
    if len(names) == 1:  # nothing to weigh it against
        return [Part(path, None)]
    parts = [_part(name, path) for name in names]
    _check_names(parts, path)
    weightless = [part.path for part in parts if part.weight is None]
    if weightless and len(weightless) < len(parts):
        raise UserError(
            f"{path}: expected a weight after each folder, as in A:0.7,B:0.3, or after none, "
            f"found none after {weightless[0]!r}"
        )
    return parts


def _part(name: str, path: str) -> Part:
    """Splits one name of a path into folder and weight. Raises: UserError for a weight that is not above 0."""
    folder, colon, number = name.rpartition(":")
    is_port = _HOST.fullmatch(folder) is not None and number.isdecimal()
    if not colon or not _NUMBER.fullmatch(number) or is_port or (not storage.is_url(name) and os.path.isdir(name)):
        return Part(name, None)
    # Exact, where a float would round 0.7: shares are exact then, and do not depend on how the weights are written.
    weight = Fraction(number)
    if weight <= 0:
        raise UserError(f"{path}: expected a weight above 0 for {folder}, found {number}")
    return Part(folder, weight)


def _check_names(parts: list[Part], path: str) -> None:
    """Raises: UserError if a name in a list is none of a folder, or stands there twice."""
    seen = set()
    for name, _ in parts:
        if name == EMBEDDED:
            raise UserError(f"{path}: expected folders of prepared data in a list, found {EMBEDDED}")
        if not name:
            raise UserError(f"{path}: expected folders of prepared data, separated by commas, found an empty name")
        if not storage.is_url(name) and not os.path.isdir(name):
            raise UserError(
                f"{path}: expected folders, separated by commas and without commas in their names, each alone or with "
                f"a weight as in A:0.7,B:0.3; found no folder {name!r}"
            )
        if storage.absolute(name) in seen:
            raise UserError(f"{path}: expected each folder once, found {name} more than once")
        seen.add(storage.absolute(name))


def shares_of(parts: Sequence[Part]) -> tuple[Fraction, ...]:
    """The weights of a mixture, scaled so that their sum is 1; () if the parts have no weights."""
    weights = [part.weight for part in parts if part.weight is not None]
    return tuple(weight / sum(weights) for weight in weights)


def short_names(paths: Sequence[str]) -> list[str]:
    """Names that tell the sources of a mixture apart: as few of the last folders of each path as all of them need."""
    split = [storage.absolute(path).split("/") for path in paths]
    for count in range(1, max(map(len, split)) + 1):
        names = ["/".join(folders[-count:]) for folders in split]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"expected different paths, found {paths}")


class Interleave:
    """Deals the numbers 0, 1, 2, ... to sources by their shares, without chance: a function of the number alone.

    Of the first n numbers, source k gets ceil(r_k w_k / (w_k + ... + w_K)), where r_k of them are left by the sources
    before it. That differs from n w_k by less than the number of sources K, for any n. grain.MapDataset.mix deals in
    the same way, but rounds weights so that 0.7 and 0.3 become 233 and 100.

    Args:
      shares: of the sources, more than 0.
    """

    def __init__(self, shares: Sequence[Fraction]):
        scale = math.lcm(*(share.denominator for share in shares))
        weights = [int(share * scale) for share in shares]
        self._weights = weights
        self._sums = [sum(weights[k:]) for k in range(len(weights))]  # of the weights from source k on

    def counts(self, number: int) -> list[int]:
        """How many of the numbers below `number` each source gets."""
        counts = []
        for weight, rest in zip(self._weights, self._sums):
            counts.append(-(-number * weight // rest))
            number -= counts[-1]
        return counts

    def place(self, number: int) -> tuple[int, int]:
        """(the source that gets this number, how many it got before)."""
        before, after = self.counts(number), self.counts(number + 1)
        source = next(k for k in range(len(before)) if after[k] > before[k])
        return source, before[source]
