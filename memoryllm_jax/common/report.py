"""What an analysis leaves in a folder: JSON and CSV for machines, and one HTML page with its pictures for people.

The page holds everything it shows, pictures as base64, and asks nothing of a network. A `Report` is filled in order
and written at its end; CSV files are written as rows come and appear under their names only when they are whole.
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

import numpy as np

from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import UserError
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
    """A page in the making, and the files beside it.

    Args:
      folder: is made if it is not there.  name: of the files: NAME.html, NAME.json, NAME-PICTURE.png.
      facts: caption of the page, such as model, checkpoint and data; the command and the day are added.
    Raises: UserError if the folder cannot be written.
    """

    def __init__(self, folder: str, name: str, title: str, facts: dict[str, str]):
        self.folder, self.name, self.title = folder, name, title
        self.facts = facts | {"command": _command(), "made": f"{datetime.date.today()}"}
        self._body: list[str] = []
        self._pictures: dict[str, bytes] = {}
        new_figure()  # so that a missing package is told of before the work
        if storage.is_url(folder):
            raise UserError(f"--output={folder}: expected a folder of this machine, found a URL")
        self._was_there = os.path.isdir(folder)
        try:
            os.makedirs(folder, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise UserError(f"--output={folder}: expected a folder to write in: {error.strerror}") from error

    def __enter__(self):
        return self

    def __exit__(self, failed, *_):
        """What fails leaves no empty folder behind."""
        if failed and not self._was_there:
            with contextlib.suppress(OSError):  # it is kept if something is in it
                os.rmdir(self.folder)

    def heading(self, text: str) -> None:
        self._body.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        """A paragraph for each blank line."""
        self._body += [f"<p>{html.escape(paragraph)}</p>" for paragraph in text.strip().split("\n\n")]

    def raw(self, markup: str) -> None:
        """HTML as it is: what goes into it must be escaped already."""
        self._body.append(markup)

    def table(self, head: list[str], rows: list, caption: str = "", csv: str = "") -> None:
        """Cells are numbers, strings, or lists of strings, shown as tokens. With `csv`, NAME-`csv`.csv has them too."""
        if csv:
            with self.csv(csv, head) as write:
                write(rows)
        cells = "".join(f"<th>{html.escape(name)}</th>" for name in head)
        lines = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
        note = f"<caption>{html.escape(caption)}</caption>" if caption else ""
        self._body.append(f'<div class="scroll"><table>{note}<tr>{cells}</tr>{lines}</table></div>')

    def figure(self, name: str, figure, caption: str) -> None:
        """A matplotlib figure, in the page and as NAME-`name`.png beside it."""
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
    def csv(self, name: str, head: list[str]):
        """A function that appends rows to NAME-`name`.csv. Raises: UserError."""
        path = self.path(f"-{name}.csv")
        try:
            with open(f"{path}.part", "w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(head)
                yield writer.writerows
            os.replace(f"{path}.part", path)
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from error
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(f"{path}.part")

    def path(self, ending: str) -> str:
        return os.path.join(self.folder, self.name + ending)

    def write(self, results) -> str:
        """Writes page, pictures and JSON: {"facts", "results"}. Returns: one line on it. Raises: UserError."""
        facts = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in self.facts.items())
        page = _PAGE.format(title=html.escape(self.title), facts=facts, body="\n".join(self._body))
        for name, data in self._pictures.items():
            storage.write_bytes(self.path(f"-{name}.png"), data)
        record = json.dumps({"facts": self.facts, "results": plain(results)})
        storage.write_bytes(self.path(".json"), record.encode())
        storage.write_bytes(self.path(".html"), page.encode())
        return f"{self.path('.html')}: {len(page.encode()):,} bytes, with {self.name}.json beside it"


def plain(tree):
    """The tree as JSON takes it: arrays as lists, NaN (nothing to measure) as null."""
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
    """JSON that may stand inside a <script> element."""
    return json.dumps(plain(tree), separators=(",", ":")).replace("<", "\\u003c")


def _cell(value):
    if isinstance(value, list):
        return "<td>" + "".join(f'<span class="t">{html.escape(text)}</span>' for text in value) + "</td>"
    if isinstance(value, float | np.floating):
        return f'<td class="n">{value:.4g}</td>' if np.isfinite(value) else '<td class="n"></td>'
    if isinstance(value, int | np.integer):
        return f'<td class="n">{value}</td>'
    return f"<td>{html.escape(str(value))}</td>"


def _command():
    """The line that was typed, a module of this package named as -m takes it."""
    path = pathlib.Path(sys.argv[0]).resolve()
    root = pathlib.Path(__file__).resolve().parents[2]
    called = [sys.argv[0]]
    if path.is_relative_to(root / __package__.partition(".")[0]):
        called = ["-m", ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__main__")]
    return shlex.join(["python", *called, *sys.argv[1:]])
