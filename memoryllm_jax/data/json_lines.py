"""Reads JSON lines: each line that is not blank is an object with one document."""

import array
import re
from collections.abc import Iterator

import msgspec

from memoryllm_jax.common.errors import UserError, one_line
from memoryllm_jax.data import text_file
from memoryllm_jax.data.text_file import RecordError, TextFile, decode_utf8

_HALF = "half a surrogate pair"  # such as \ud83d alone, which JSON can write and Unicode text cannot hold
# What json.dumps writes although JSON has no such number, or an escape that may be half of a surrogate pair.
_ODD = re.compile(rb"Infinity|NaN|\\u[dD][89a-fA-F]")
# A string of a JSON text, or a number that JSON does not have.
_STRING_OR_NAN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|-?Infinity|NaN', re.DOTALL)
# An escape in a JSON string; the group matches half of a surrogate pair.
_ESCAPE = re.compile(rb"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|(u[dD][89a-fA-F]..)|.)", re.DOTALL)


def read_json_lines(source: TextFile, text_key: str) -> Iterator[str]:
    """Yields the documents of a file. Raises: RecordError for a line without text, unless such records are skipped."""
    text_of = _LineDecoder(text_key)
    for number, line in _lines(_refuse_array(source.chunks(), source.path)):
        where = f"{source.path}: line {number}"
        try:
            if line is None:
                raise text_file.too_long(where, "a line", text_file.MOST_BYTES)
            yield text_of(line, where)
        except RecordError as error:
            source.bad(error)


def _refuse_array(chunks: Iterator[bytes], path: str) -> Iterator[bytes]:
    """Yields the chunks. Raises: UserError if they begin with an array, which may be a single line of gigabytes."""
    is_blank = True
    for chunk in chunks:
        if is_blank:
            start = chunk.lstrip()[:1]
            if start == b"[":
                raise UserError(
                    f"{path}: expected one JSON object a line, found a JSON array (jq -c '.[]' converts it)"
                )
            is_blank = not start
        yield chunk


def _lines(chunks: Iterator[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """Yields (number, line) for each line that is not blank, without its white space at the start.

    The line is None as soon as it is longer than MOST_BYTES; its rest is left out.
    """
    # Pieces of a line whose end is still to come. They are joined once: appending to one bytes object would copy a long
    # line again for each chunk.
    rest: list[bytes] = []
    number, size, is_too_long = 1, 0, False
    for chunk in chunks:
        if not rest and not is_too_long and chunk.isspace():
            number += chunk.count(b"\n")  # gigabytes of blank lines take seconds
            continue
        first, newline, tail = chunk.partition(b"\n")
        if not is_too_long:
            rest.append(first)
            size += len(first)
            if size > text_file.MOST_BYTES:
                rest, is_too_long = [], True
                yield number, None
        if not newline:
            continue
        line = b"".join(rest)
        if not _is_blank(line):
            yield number, line
        *whole, last = tail.split(b"\n")
        for line in whole:
            number += 1
            if not _is_blank(line):
                yield number, line
        number += 1
        rest, is_too_long = [] if _is_blank(last) else [last], False
        size = sum(map(len, rest))
    line = b"".join(rest)
    if not _is_blank(line):
        yield number, line


def _is_blank(line: bytes) -> bool:
    return not line or line.isspace()


class _LineDecoder:
    """Decodes the text of a line of JSON. The other fields are only skipped, so an odd value there does no harm."""

    def __init__(self, text_key: str):
        self._key = text_key
        if re.search(r'["\\\x00-\x1f]', text_key):  # msgspec takes no such name for a field
            self._fast, self._raw = None, msgspec.json.Decoder(dict[str, msgspec.Raw])
            return
        name = {"text": text_key}
        self._fast = msgspec.json.Decoder(msgspec.defstruct("Line", [("text", str)], rename=name))
        undecoded = [("text", msgspec.Raw, msgspec.Raw())]
        self._raw = msgspec.json.Decoder(msgspec.defstruct("RawLine", undecoded, rename=name))

    def __call__(self, line: bytes, where: str) -> str:
        """Raises: RecordError."""
        try:
            if self._fast is not None:
                return self._fast.decode(line).text
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            pass  # the cause is found below, or it lies in another field
        decode_utf8(line, where)
        if not _ODD.search(line):
            return self._text(line, where)
        # Half surrogates, and numbers that are not in JSON, do no harm in other fields. Two replacements show whether
        # the text itself has one.
        repaired, halves = _repaired(line)
        one = self._text(repaired, where)
        for start in halves:
            repaired[start : start + 6] = rb"\ufffe"
        other = self._text(repaired, where) if halves else one
        if one != other:
            at = next(i for i, (a, b) in enumerate(zip(one, other)) if a != b)
            raise RecordError(f"{where}: expected Unicode text, found {_HALF} at character {at}", _HALF)
        return one

    def _text(self, line: bytes | bytearray, where: str) -> str:
        """The text, by a decoder that leaves the other values undecoded. Raises: RecordError."""
        try:
            fields = self._raw.decode(line)
        except msgspec.ValidationError as error:
            raise RecordError(f"{where}: expected one JSON object, found {_kind(line)}", "not an object") from error
        except msgspec.DecodeError as error:
            problem = one_line(error).removeprefix("JSON is malformed: ")
            raise RecordError(f"{where}: invalid JSON: {problem}", "invalid JSON") from error
        except RecursionError as error:
            raise RecordError(f"{where}: expected JSON, found values nested too deeply", "nested too deeply") from error
        value = bytes(fields.get(self._key, b"") if isinstance(fields, dict) else fields.text)
        if not value.startswith(b'"'):
            raise RecordError(f"{where}: expected text under {self._key!r}, found {_kind(value)}")
        return msgspec.json.decode(value, type=str)


def _repaired(line: bytes) -> tuple[bytearray, array.array]:
    """The line with U+FFFD for half surrogates, and 0 for numbers that JSON does not have, each as long as before.

    Returns: (the line, the positions of the half surrogates).
    """
    # Replaced in place: a list of the parts would take up to fifty times the memory of a line of short strings.
    out, halves = bytearray(line), array.array("q")
    for match in _STRING_OR_NAN.finditer(line):
        start, end = match.span()
        if line[start] != ord('"'):
            out[start:end] = b"0".ljust(end - start)
        elif line.find(b"\\", start, end) >= 0:
            for escape in _ESCAPE.finditer(line, start, end):
                if escape[1]:
                    out[escape.start() : escape.end()] = rb"\ufffd"
                    halves.append(escape.start())
    return out, halves


def _kind(value: bytes | bytearray) -> str:
    """What a JSON value is, for messages."""
    kinds = {
        b"": "none",
        b"n": "null",
        b"t": "true",
        b"f": "false",
        b"[": "an array",
        b"{": "an object",
        b'"': "a string",
    }
    return kinds.get(bytes(value.lstrip()[:1]), "a number")
