"""Strategies of hypothesis that damage files: their JSON, and their bytes."""

import json

from hypothesis import strategies as st


class Damaged(bytes):
    """The content of a damaged file, which a failing test shows in part."""

    def __repr__(self):
        return f"<{len(self):,} bytes: {bytes(self[:300])!r}>"


_DEEP, _BIG = "@deep@", "@big@"  # stand for text that json.dumps would not write
_RAW = {f'"{_DEEP}"': "[" * 50_000 + "]" * 50_000, f'"{_BIG}"': "9" * 5000}
ODD = [
    None, True, -1, 0, 1, 7, 5_000_000, 2**31, 2**40, 2**64, 10**30, -(2**63), 0.5, -0.0, 1e308,
    "", "x", "0", "-1", "../x", "/etc/passwd", "a/../../x", "\0", "\ud800", "x" * 5000, _DEEP, _BIG,
    [], {}, [[]], [None], [0, 0], {"a": None}, {"": 1},
]  # fmt: skip


def json_text(tree) -> bytes:
    """The tree as JSON, with what stands for odd text in its place."""
    text = json.dumps(tree)
    for short, raw in _RAW.items():
        text = text.replace(short, raw)
        # Within JSON that a string of JSON holds.
        text = text.replace(short.replace('"', '\\"'), raw)
    return text.encode()


def _places(tree, path=()):
    """The paths of all values of a tree; text that holds a JSON object or array is entered too."""
    yield path
    inner = tree
    if isinstance(tree, str) and tree[:1] in ("{", "[") and tree:
        try:
            inner = json.loads(tree)
        except ValueError:
            return
    items = inner.items() if isinstance(inner, dict) else enumerate(inner) if isinstance(inner, list) else ()
    for key, value in items:
        yield from _places(value, (*path, key))


def _changed(tree, path, change):
    """A copy of the tree in which `change(container, key)` was applied at a path."""
    if isinstance(tree, str):
        return json.dumps(_changed(json.loads(tree), path, change))
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    key, *rest = path
    if rest:
        copy[key] = _changed(copy[key], rest, change)
    else:
        change(copy, key)
    return copy


@st.composite
def _trees(draw, tree):
    """A tree of JSON with one to three values replaced by odd ones, left out or doubled."""
    for _ in range(draw(st.integers(1, 3))):
        # Long lists would hide the fields of the objects around them.
        places = [path for path in _places(tree) if all(not isinstance(key, int) or key < 3 for key in path)]
        path = draw(st.sampled_from(places))
        odd = draw(st.sampled_from(ODD))
        if not path:
            return odd
        how = draw(st.sampled_from(("replace", "replace", "replace", "remove", "double")))

        def change(container, key, how=how, odd=odd):
            if how == "remove":
                del container[key]
            elif how == "double" and isinstance(container, list):
                container.insert(key, container[key])
            else:
                container[key] = odd

        tree = _changed(tree, path, change)
    return tree


@st.composite
def _cut_or_flipped(draw, data: bytes):
    """Bytes with some bits flipped, or cut off, or with other bytes in between or behind."""
    place = draw(st.integers(0, len(data)))
    how = draw(st.sampled_from(("flip", "flip", "cut", "insert", "append")))
    if how == "cut":
        return data[:place]
    if how == "append":
        return data + draw(st.binary(min_size=1, max_size=9))
    if how == "insert":
        return data[:place] + draw(st.binary(min_size=1, max_size=9)) + data[place:]
    changed = bytearray(data)
    for at in draw(st.lists(st.integers(0, 8 * len(data) - 1), min_size=1, max_size=3)) if data else ():
        changed[at // 8] ^= 1 << at % 8
    return bytes(changed)


def bytes_files(data: bytes):
    """Damaged copies of a file of any kind."""
    return _cut_or_flipped(data).map(Damaged)


def json_files(data: bytes):
    """Damaged copies of a JSON file."""
    return st.one_of(_trees(json.loads(data)).map(json_text), _cut_or_flipped(data)).map(Damaged)


def lines_files(data: bytes):
    """Damaged copies of a file of JSON lines: one of its lines is damaged, or its bytes are."""
    lines = data.splitlines()

    def with_line(number):
        damaged = _trees(json.loads(lines[number])).map(json_text)
        return damaged.map(lambda line: b"\n".join([*lines[:number], line, *lines[number + 1 :], b""]))

    return st.one_of(st.integers(0, len(lines) - 1).flatmap(with_line), _cut_or_flipped(data)).map(Damaged)


def safetensors_files(data: bytes):
    """Damaged copies of a safetensors file: its header is, with or without a length that fits, or its bytes are."""
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]

    def whole(tree):
        text = json_text(tree)
        return len(text).to_bytes(8, "little") + text + rest

    return st.one_of(_trees(header).map(whole), _cut_or_flipped(data)).map(Damaged)
