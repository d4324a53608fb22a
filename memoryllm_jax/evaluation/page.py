"""The page of an evaluation: a text's loss by context and by token, or the scores of tasks."""

import html

import numpy as np

from memoryllm_jax.common import plots, report
from memoryllm_jax.data.tokenizer import token_texts
from memoryllm_jax.evaluation.perplexity import Text, Windows, score_windows
from memoryllm_jax.inference.engine import Engine

_SHADED = 400  # tokens of the text that the page shows, at most
_FULL_SHADE = 12.0  # nats of a token that has the darkest background

_MEASURES = {
    "loss": "nats a token",
    "perplexity": "exp(loss)",
    "word_perplexity": "exp(sum of nats / words)",
    "bits_per_byte": "sum of bits / bytes of UTF-8 text",
    "tokens": "predicted",
    "words": "separated by white space",
    "bytes": "of UTF-8 text",
    "windows": "that the text is cut into",
    "context": "tokens predicted in a window",
    "stride": "tokens between the starts of windows",
}


def of_text(page: report.Report, model: Engine, text: Text, windows: Windows, result: dict) -> None:
    """Fills a page with the perplexity of a text, and with the text's first tokens.

    Args:
      page: the page to fill; the caller writes it.
      model: scores the first tokens.
      text, windows: the text that was scored, and how it was cut.
      result: as `perplexity.perplexity` returns it.
    """
    rows = [[name, result[name], meaning] for name, meaning in _MEASURES.items()]
    page.table(["measure", "value", "what it is"], rows, csv="quality")
    if "sources" in result:
        head = ["source of the mixture", "loss, nats a token", "perplexity", "bits per byte", "predicted tokens"]
        page.table(head, [[name, *found.values()] for name, found in result["sources"].items()], csv="sources")
    parts = result["by_context"]
    page.figure("context", _draw_context(parts), "Loss by how many tokens the model has seen")
    head = ["tokens before, from", "to", "loss, nats a token", "predicted tokens"]
    rows = [[part["from"], part["to"], part["loss"], part["tokens"]] for part in parts]
    page.table(
        head, rows, "Loss by the tokens before the predicted one in its window, or in its document", csv="context"
    )
    page.heading("The first tokens")
    count = min(model.trained.context, _SHADED) + 1
    (ids,) = text.read_each([0], count)
    page.raw(_shaded(model, ids[: text.tokens], windows))


def _draw_context(parts: list[dict]):
    figure, axis = plots.new_figure()
    axis.plot([part["to"] for part in parts], [part["loss"] for part in parts], **plots.style_of(0))
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(xlabel="tokens before the predicted one in its window or document, at most", ylabel="loss, nats a token")
    return figure


def _shaded(model: Engine, ids: np.ndarray, windows: Windows) -> str:
    """The text as HTML: the less likely a token was, the darker its background."""
    (found,) = score_windows(model, [ids], windows)
    first, *texts = map(html.escape, token_texts(model.tokenizer, ids))
    spans = [f"<span>{first}</span>"]
    for text, log_prob in zip(texts, found.log_probs_T):
        shade = f"background: rgb(255 120 0 / {min(-log_prob / _FULL_SHADE, 1):.2f})"
        spans.append(f'<span style="{shade}" title="{-log_prob:.2f} nats">{text}</span>')
    note = f"Background: from 0 nats (white) to {_FULL_SHADE:g} or more (orange). Point at a token to see its nats."
    style = "font-family: ui-monospace, monospace; overflow-wrap: anywhere"
    return f'<p class="facts">{note}</p><p style="{style}">{"".join(spans)}</p>'


def of_tasks(page: report.Report, results: dict) -> None:
    """Fills the page with the harness's results."""
    rows, bars = [], []
    for task, values in results["results"].items():
        for key, value in values.items():
            # The harness names a value METRIC,FILTER, and its standard error METRIC_stderr,FILTER.
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{chosen}")
            error = float(error) if isinstance(error, int | float) else float("nan")
            count = results["n-samples"].get(task, {}).get("effective", "")
            rows.append([task, metric, chosen, float(value), error, results["n-shot"].get(task, ""), count])
            if results["higher_is_better"].get(task, {}).get(metric) and 0 <= value <= 1:
                bars.append((f"{task}, {metric}", value, error))
    head = ["task", "metric", "filter", "value", "standard error", "examples in a prompt", "documents"]
    page.table(head, rows, "Scores by the harness", csv="scores")
    if bars:
        page.figure("scores", _draw_scores(bars), "Scores from 0 to 1, where higher is better")


def _draw_scores(bars: list[tuple[str, float, float]]):
    names, values, errors = zip(*reversed(bars))  # the first bar is drawn lowest
    figure, axis = plots.new_figure(height=1 + 0.28 * len(bars))
    axis.barh(names, values, xerr=errors, color="C0", height=0.6, error_kw={"ecolor": "#444", "capsize": 2})
    axis.set(xlim=(0, 1), xlabel="score; the line is one standard error to each side")
    return figure
