"""Makes the texts of the bench from English documentation in C4's shape: each page once, some held out by their name.

    python benchmarks/pages.py --texts=DIR --output=TEXTS

A package of documentation often holds a page in two formats, and a comparison must not find a page that it holds out
in its training text. Pages are told by their "url" without format and folder of the format; the longest copy is kept,
and translations are left out. Held-out pages are chosen by a hash of that name and cut to their first 4,096 characters,
so that many sources count and none decides: intervals over documents need many of about equal length.
"""

import glob
import gzip
import hashlib
import json
import os
import re
from typing import Annotated

from memoryllm_jax.common import cli, storage
from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.common.options import Option

HELD_OUT = 16  # one page in so many
LENGTH = 4096  # characters of a held-out page
_FORMAT = re.compile(r"(\.(rst|html?|md|pod))?(\.gz)?$")
_FOLDER = re.compile(r"/(html|Documentation|markdown)(?=/)")
_LEFT_OUT = re.compile(r"/translations/|/genindex")


def main(
    texts: Annotated[str, Option("folder of *.json.gz files with a text and a url in each line")],
    output: Annotated[str, Option("folder for train-00000.json.gz and validation-00000.json.gz")],
) -> None:
    pages = _pages(sorted(glob.glob(os.path.join(texts, "*.json.gz"))))
    if not pages:
        raise ArgumentError("texts", f"expected a folder with *.json.gz files, found {texts}")
    os.makedirs(output, exist_ok=True)
    held_out = {name: text[:LENGTH] for name, text in pages.items() if _digest(name) % HELD_OUT == 0}
    train = {name: text for name, text in pages.items() if name not in held_out}
    for split, found in (("train", train), ("validation", held_out)):
        lines = [json.dumps({"text": found[name], "url": name}) + "\n" for name in sorted(found, key=_digest)]
        content = gzip.compress("".join(lines).encode(), mtime=0)
        storage.write_bytes(os.path.join(output, f"{split}-00000.json.gz"), content)
        size = sum(len(text.encode()) for text in found.values())
        print(f"{split}: {len(found):,} pages, {size / 1e6:.2f} MB")


def _pages(paths: list[str]) -> dict[str, str]:
    """{name of a page: its longest text}."""
    pages: dict[str, str] = {}
    for path in paths:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for page in map(json.loads, file):
                name = _FOLDER.sub("", _FORMAT.sub("", page["url"]))
                if not _LEFT_OUT.search(page["url"]):
                    pages[name] = max(pages.get(name, ""), page["text"], key=len)
    return pages


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


if __name__ == "__main__":
    cli.run(main)
