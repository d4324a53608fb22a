"""The files that an analysis writes: JSON and CSV for machines, and one HTML page with its pictures for people.

The page holds everything it shows, pictures as base64, and loads nothing from a network. A `Report` is filled from top
to bottom, and then written. CSV files are written row by row, and get their names when they are complete.
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
from typing import NamedTuple

import numpy as np

from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.common.plots import Chart, new_figure

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


class Spread(NamedTuple):
    """A number that was measured with several seeds: its mean, and its standard deviation."""

    mean: float
    sd: float


class Markup(NamedTuple):
    """A part of a page as HTML: a heading, a text, a picture."""

    html: str


class Table(NamedTuple):
    """A table of a page, with the arguments of `Report.table`."""

    head: Sequence[str]
    rows: Sequence[Sequence]
    caption: str
    csv: str

    @property
    def html(self) -> str:
        cells = "".join(f"<th>{html.escape(name)}</th>" for name in self.head)
        lines = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in self.rows)
        note = f"<caption>{html.escape(self.caption)}</caption>" if self.caption else ""
        return f'<div class="scroll"><table>{note}<tr>{cells}</tr>{lines}</table></div>'


class Figure(NamedTuple):
    """A figure of a page, with the arguments of `Report.figure`, drawn as `html`."""

    name: str
    figure: object
    caption: str
    html: str


class Report:
    """A page that is being filled, and the files beside it.

    Used as a context manager, it removes the folder that it made if an error leaves the folder empty.

    Args:
      folder: folder for the files, which is made if it does not exist.
      name: begins the names of the files: NAME.html, NAME.json, NAME-PICTURE.png.
      title: title of the page.
      facts: what the page is about, such as model, checkpoint and data. The command line and the date are added.
    Attributes:
      elements: the parts of the page, from top to bottom.
    Raises: UserError if the folder cannot be written to, or matplotlib is not installed.
    """

    def __init__(self, folder: str, name: str, title: str, facts: dict[str, str]):
        self.folder, self.name, self.title = folder, name, title
        self.facts = facts | {"command": _command(), "made": f"{datetime.date.today()}"}
        self.elements: list[Markup | Table | Figure] = []
        self._pictures: dict[str, bytes] = {}
        # What the page needs at the end is tried here: an analysis can take hours, and its results would be lost.
        new_figure()
        if storage.is_url(folder):
            raise ArgumentError("output", f"expected a folder of this machine, found the URL {folder}")
        self._was_there = os.path.isdir(folder)
        try:
            os.makedirs(folder, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()  # os.access misjudges network folders
        except OSError as error:
            raise ArgumentError("output", f"expected a folder to write in: {folder}: {error.strerror}") from error

    def __enter__(self):
        return self

    def __exit__(self, error_type, *_):
        if error_type and not self._was_there:
            with contextlib.suppress(OSError):  # rmdir fails, as it should, if the folder is not empty
                os.rmdir(self.folder)

    def heading(self, text: str) -> None:
        """Adds a heading to the page."""
        self.elements.append(Markup(f"<h2>{html.escape(text)}</h2>"))

    def text(self, text: str) -> None:
        """Adds paragraphs, which are separated by blank lines in the text."""
        self.elements += [Markup(f"<p>{html.escape(paragraph)}</p>") for paragraph in text.strip().split("\n\n")]

    def raw(self, markup: str) -> None:
        """Adds HTML without escaping it: the caller has escaped all text in it."""
        self.elements.append(Markup(markup))

    def table(self, head: Sequence[str], rows: Sequence, caption: str = "", csv: str = "") -> None:
        """Adds a table.

        Args:
          head: names of the columns.
          rows: lists of cells: numbers, strings, lists of strings, which are shown as tokens, or a `Spread`, which in
            the CSV file becomes two columns. Measured numbers are floats: several seeds have a mean of these alone.
          caption: text above the table.
          csv: if given, the table is also written as NAME-`csv`.csv.
        """
        rows = [list(row) for row in rows]
        if csv:
            names, lines = _with_deviations(head, rows)
            with self.csv(csv, names) as write:
                write(lines)
        self.elements.append(Table(head, rows, caption, csv))

    def figure(self, name: str, figure, caption: str) -> None:
        """Adds a figure to the page, which is also written as NAME-`name`.png.

        Args:
          figure: a `Chart`, of which several seeds have a mean, or a figure of matplotlib.
        """
        buffer = io.BytesIO()
        drawn = figure.draw() if isinstance(figure, Chart) else figure
        drawn.savefig(buffer, format="png", dpi=110)
        self._pictures[name] = buffer.getvalue()
        data, text = base64.b64encode(buffer.getvalue()).decode(), html.escape(caption)
        markup = (
            f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'
        )
        self.elements.append(Figure(name, figure, caption, markup))

    @contextlib.contextmanager
    def csv(self, name: str, head: Sequence[str]) -> Iterator[Callable[[Iterable], None]]:
        """Opens NAME-`name`.csv as a context manager, which gives a function that appends rows to it.

        Args:
          head: names of the columns.
        Raises: UserError if the file cannot be written.
        """
        with (
            storage.replaced(self.path(f"-{name}.csv")) as part,
            open(part, "w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(head)
            yield writer.writerows

    def path(self, ending: str) -> str:
        """The path FOLDER/NAME followed by `ending`."""
        return os.path.join(self.folder, self.name + ending)

    def write(self, results, **more) -> str:
        """Writes the page, the pictures and the JSON {"facts", "results"}.

        Args:
          more: more of the JSON.
        Returns: one line that names the page. Raises: UserError if a file cannot be written.
        """
        facts = [f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in self.facts.items()]
        body = "\n".join(element.html for element in self.elements)
        page = _PAGE.format(title=html.escape(self.title), facts="".join(facts), body=body)
        for name, data in self._pictures.items():
            storage.write_bytes(self.path(f"-{name}.png"), data)
        record = json.dumps({"facts": self.facts, "results": plain(results)} | plain(more))
        storage.write_bytes(self.path(".json"), record.encode())
        # The page is written last, so that where there is a page, the other files are complete.
        storage.write_bytes(self.path(".html"), page.encode())
        return f"{self.path('.html')}: {len(page.encode()):,} bytes, with {self.name}.json beside it"


def plain(tree):
    """Converts a tree to what JSON can hold: arrays to lists, and NaN and infinity to null.

    Results use NaN for what could not be measured.
    """
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
    """JSON for a <script> element. Every < is escaped, so that no text in it can end the element."""
    return json.dumps(plain(tree), separators=(",", ":")).replace("<", "\\u003c")


def _with_deviations(head: Sequence[str], rows: Sequence) -> tuple[list[str], list[list]]:
    """Head and rows of a CSV file, in which a column with a `Spread` is followed by one of standard deviations."""
    spread = [any(isinstance(row[i], Spread) for row in rows) for i in range(len(head))]
    names, lines = [], [[] for _ in rows]
    for i, name in enumerate(head):
        names += [name, f"{name}, sd"] if spread[i] else [name]
        for line, row in zip(lines, rows):
            if isinstance(row[i], Spread):
                line += row[i]
            else:
                line += [row[i], ""] if spread[i] else [row[i]]
    return names, lines


def _cell(value) -> str:
    """The <td> element of a number, a string or a list of tokens; NaN and infinity make an empty cell."""
    if isinstance(value, Spread):
        text = f"{value.mean:.4g} ± {value.sd:.2g}" if np.isfinite(value.mean) else ""
        return f'<td class="n">{text}</td>'
    if isinstance(value, list):
        return "<td>" + "".join(f'<span class="t">{html.escape(text)}</span>' for text in value) + "</td>"
    if isinstance(value, float | np.floating):
        return f'<td class="n">{value:.4g}</td>' if np.isfinite(value) else '<td class="n"></td>'
    if isinstance(value, int | np.integer):
        return f'<td class="n">{value}</td>'
    return f"<td>{html.escape(str(value))}</td>"


def _command() -> str:
    """The command line that runs this process, with `-m MODULE` for a module of this package."""
    # Python replaces `-m MODULE` by the module's path in sys.argv; this converts it back.
    path = pathlib.Path(sys.argv[0]).resolve()
    root = pathlib.Path(__file__).resolve().parents[2]
    program = [sys.argv[0]]
    if path.is_relative_to(root / __package__.partition(".")[0]):
        program = ["-m", ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__main__")]
    return shlex.join(["python", *program, *sys.argv[1:]])
