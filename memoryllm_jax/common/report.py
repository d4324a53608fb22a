"""The files that an analysis writes: JSON and CSV for machines, and one HTML page with its pictures for people.

The page holds everything it shows, pictures as base64, and loads nothing from a network. A `Report` is filled from top
to bottom, and then written. CSV files are written while rows come, and get their names when they are whole.
"""

import base64
import contextlib
import csv
import dataclasses
import datetime
import html
import io
import json
import os
import pathlib
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.common.plots import new_figure

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 66em; margin: 2em auto; padding: 0 1em; color: #222; }}
table {{ border-collapse: collapse; margin: .6em 0; font-size: 13px; }}
th, td {{ border: 1px solid #ccc; padding: .15em .5em; text-align: left; vertical-align: top; }}
td.n {{ text-align: right; font-variant-numeric: tabular-nums; }}
th {{ background: #f3f3f3; position: sticky; top: 0; }}
figure {{ margin: 1em 0; }} figcaption, caption, .facts {{ color: #555; font-size: 13px; text-align: left; }}
img {{ max-width: 100%; }} code, .t {{ font-family: ui-monospace, monospace; white-space: pre-wrap; }}
.t {{ background: #f3f3f3; padding: 0 .15em; margin-right: .3em; }}
.scroll {{ max-height: 40em; overflow: auto; }}
</style></head><body>
<h1>{title}</h1>
<table class="facts">{facts}</table>
{body}
</body></html>
"""


class Report:
    """A page that is being filled, and the files beside it.

    As a context manager it removes the folder again if an error leaves it empty.

    Args:
      folder: for the files; is made if it does not exist.
      name: of the files: NAME.html, NAME.json, NAME-PICTURE.png.
      title: of the page.
      facts: what the page is about, such as model, checkpoint and data; the command and the day are added.
    Raises: UserError if the folder cannot be written to, or matplotlib is not installed.
    """

    def __init__(self, folder: str, name: str, title: str, facts: dict[str, str]):
        self.folder, self.name, self.title = folder, name, title
        self.facts = facts | {"command": _command(), "made": f"{datetime.date.today()}"}
        self._body: list[str] = []
        self._pictures: dict[str, bytes] = {}
        new_figure()  # so that a missing matplotlib is an error before the work, not after it
        if storage.is_url(folder):
            raise ArgumentError("output", f"expected a folder of this machine, found the URL {folder}")
        self._was_there = os.path.isdir(folder)
        try:
            os.makedirs(folder, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise ArgumentError("output", f"expected a folder to write in: {folder}: {error.strerror}") from error

    def __enter__(self):
        return self

    def __exit__(self, error_type, *_):
        if error_type and not self._was_there:
            with contextlib.suppress(OSError):  # rmdir fails, as it should, if the folder is not empty
                os.rmdir(self.folder)

    def heading(self, text: str) -> None:
        self._body.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        """Paragraphs, which blank lines separate in the text."""
        self._body += [f"<p>{html.escape(paragraph)}</p>" for paragraph in text.strip().split("\n\n")]

    def raw(self, markup: str) -> None:
        """HTML that is added as it is: the caller escapes what it shows."""
        self._body.append(markup)

    def table(self, head: Sequence[str], rows: Sequence, caption: str = "", csv: str = "") -> None:
        """A table of rows.

        Args:
          rows: of cells: numbers, strings, or lists of strings, which are shown as tokens.
          csv: if given, the table is also written as NAME-`csv`.csv.
        """
        if csv:
            with self.csv(csv, head) as write:
                write(rows)
        cells = "".join(f"<th>{html.escape(name)}</th>" for name in head)
        lines = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
        note = f"<caption>{html.escape(caption)}</caption>" if caption else ""
        self._body.append(f'<div class="scroll"><table>{note}<tr>{cells}</tr>{lines}</table></div>')

    def figure(self, name: str, figure, caption: str) -> None:
        """A matplotlib figure, on the page and as NAME-`name`.png beside it."""
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
        self._pictures[name] = buffer.getvalue()
        data = base64.b64encode(buffer.getvalue()).decode()
        caption = html.escape(caption)
        self._body.append(
            f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )

    @contextlib.contextmanager
    def csv(self, name: str, head: Sequence[str]) -> Iterator[Callable[[Iterable], None]]:
        """Yields a function that appends rows to NAME-`name`.csv. Raises: UserError."""
        with (
            storage.replaced(self.path(f"-{name}.csv")) as part,
            open(part, "w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(head)
            yield writer.writerows

    def path(self, ending: str) -> str:
        """FOLDER/NAME followed by `ending`."""
        return os.path.join(self.folder, self.name + ending)

    def write(self, results) -> str:
        """Writes the page, the pictures and the JSON {"facts", "results"}.

        Returns: one line that names the page. Raises: UserError.
        """
        facts = [f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in self.facts.items()]
        page = _PAGE.format(title=html.escape(self.title), facts="".join(facts), body="\n".join(self._body))
        for name, data in self._pictures.items():
            storage.write_bytes(self.path(f"-{name}.png"), data)
        record = json.dumps({"facts": self.facts, "results": plain(results)})
        storage.write_bytes(self.path(".json"), record.encode())
        storage.write_bytes(self.path(".html"), page.encode())
        return f"{self.path('.html')}: {len(page.encode()):,} bytes, with {self.name}.json beside it"


def plain(tree):
    """The tree with what JSON has: arrays as lists, and NaN, which stands for nothing to measure, as null."""
    if dataclasses.is_dataclass(tree):
        return plain(dataclasses.asdict(tree))
    if isinstance(tree, dict):
        return {str(key): plain(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [plain(value) for value in tree]
    if isinstance(tree, np.ndarray | np.generic):
        return plain(tree.tolist())
    return None if isinstance(tree, float) and not np.isfinite(tree) else tree


def embedded_json(tree) -> str:
    """JSON for a <script> element, which no text in it can end: a < is escaped."""
    return json.dumps(plain(tree), separators=(",", ":")).replace("<", "\\u003c")


def _cell(value) -> str:
    """<td> of a number, a string or a list of tokens; NaN is an empty cell."""
    if isinstance(value, list):
        return "<td>" + "".join(f'<span class="t">{html.escape(text)}</span>' for text in value) + "</td>"
    if isinstance(value, float | np.floating):
        return f'<td class="n">{value:.4g}</td>' if np.isfinite(value) else '<td class="n"></td>'
    if isinstance(value, int | np.integer):
        return f'<td class="n">{value}</td>'
    return f"<td>{html.escape(str(value))}</td>"


def _command() -> str:
    """The command line, with `-m MODULE` for modules of this package."""
    path = pathlib.Path(sys.argv[0]).resolve()
    root = pathlib.Path(__file__).resolve().parents[2]
    program = [sys.argv[0]]
    if path.is_relative_to(root / __package__.partition(".")[0]):
        program = ["-m", ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__main__")]
    return shlex.join(["python", *program, *sys.argv[1:]])
