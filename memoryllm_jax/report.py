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
import itertools
import json
import os
import pathlib
import shlex
import sys
import tempfile

import numpy as np

from memoryllm_jax import documents, files
from memoryllm_jax.cli import UserError

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


def saved_facts(saved) -> dict[str, str]:
    """What the page of a `SavedModel` is captioned with."""
    m = saved.config
    widths = {"FFN-M": m.memory_dim, "FFN" if m.architecture == "base" else "FFN-C": m.compute_dim}
    shape = f"{m.layers} layers of width {m.dim}, {m.heads} heads, " + ", ".join(
        f"{name} {width}" for name, width in widths.items() if width
    )
    tables = "tied embeddings" if m.tie_embeddings else "untied embeddings"
    return {
        "model": f"{m.architecture}, {shape}, {m.vocab_size:,} ids, {tables}, computed in {m.dtype}",
        "checkpoint": f"{saved.workdir}, step {saved.step}",
    }


def quality_facts(data, split, max_tokens, tasks, num_fewshot, limit) -> dict[str, str]:
    """The text and the tasks of `cli.define_quality_flags`, as the page that measures on them is captioned."""
    out = {}
    if data:
        split = "" if documents.is_text(data) else f", {split}"
        out["text"] = f"{data}{split}" + (f", the first {max_tokens:,} tokens" if max_tokens else "")
    if tasks:
        share = f"{limit:g} documents each" if limit >= 1 else f"{limit:.0%} of the documents"
        shots = "" if num_fewshot is None else f", {num_fewshot} examples in a prompt"
        out["tasks"] = ", ".join(tasks) + (f", {share}" if limit else "") + shots
    return out


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
        if files.is_url(folder):
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
            files.write_bytes(self.path(f"-{name}.png"), data)
        record = json.dumps({"facts": self.facts, "results": plain(results)})
        files.write_bytes(self.path(".json"), record.encode())
        files.write_bytes(self.path(".html"), page.encode())
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


def new_figure(width: float = 7.0, height: float = 3.6, columns: int = 1):
    """(figure, axes): a list of axes if there are several columns. Raises: UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("pictures need matplotlib: pip install 'memoryllm_jax[analyze]'") from error
    figure = Figure((width, height), layout="constrained")
    axes = figure.subplots(1, columns)
    for ax in np.atleast_1d(axes):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.3)
        ax.set_axisbelow(True)
    return figure, axes


def legend(axis, **more) -> None:
    """Beside the axis, where it covers nothing."""
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), **more)


def style_of(number: int) -> dict:
    """Colour, marker and line of the number-th series: told apart in print too."""
    line = ("-", "--")[number // 8 % 2]
    return {"color": f"C{number % 10}", "marker": "osv^Dx*+"[number % 8], "markersize": 4, "linestyle": line}


def shade(share: float):
    """A colour from dark (0) to light (1), for what has an order, such as layers."""
    from matplotlib import colormaps

    return colormaps["viridis"](share)


def log_scale(axis) -> None:
    """A logarithmic y axis with plain numbers, however few decades it spans."""
    from matplotlib import ticker

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8), numticks=14))
    axis.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(ticker.NullFormatter())


def drawable(text: str) -> bool:
    """Whether matplotlib's font has all of the text's characters; those that it lacks would be boxes."""
    from matplotlib import font_manager

    glyphs = font_manager.get_font(font_manager.findfont(font_manager.FontProperties())).get_charmap()
    return all(ord(c) in glyphs for c in text)


def by_layer(series: dict[str, list[float]], label: str, log: bool = False, layers: list[int] | None = None):
    """A figure of one line for each series over the layers; a share is best given in percent.

    The series "NAME, chance" is drawn as NAME, dotted.
    """
    from matplotlib.ticker import MaxNLocator

    figure, ax = new_figure()
    subjects = list(dict.fromkeys(name.removesuffix(", chance") for name in series))
    for name, values in series.items():
        at = range(len(values)) if layers is None else layers
        subject = name.removesuffix(", chance")
        style = style_of(subjects.index(subject)) | ({"linestyle": ":"} if name != subject else {})
        ax.plot(at, values, **style, label=name)
    ax.set_xlabel("layer")
    ax.set_ylabel(label)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if log:
        ax.set_yscale("log")
    elif not any(value < 0 for value in itertools.chain(*series.values())):
        ax.update_datalim([(0, 0)], updatex=False)
        ax.autoscale_view()
        ax.set_ylim(bottom=0)
    if len(series) > 1:
        legend(ax)
    return figure


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
    root = pathlib.Path(__file__).resolve().parents[1]
    called = [sys.argv[0]]
    if path.is_relative_to(root / __package__):
        called = ["-m", ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__main__")]
    return shlex.join(["python", *called, *sys.argv[1:]])
