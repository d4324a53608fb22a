"""What the page of an evaluation shows: where a text's loss lies, or the scores of tasks (report.py)."""

import html

from memoryllm_jax.common import plots, report
from memoryllm_jax.data.tokenizer import token_texts
from memoryllm_jax.inference import scoring

_SHADED = 400  # tokens of the text that the page shows
_FULL_SHADE = 12.0  # nats

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


def of_text(page: report.Report, model, text, result: dict) -> None:
    """`result` is what `perplexity.perplexity` found on `text` with the engine."""
    rows = [[name, result[name], meaning] for name, meaning in _MEASURES.items()]
    page.table(["measure", "value", "what it is"], rows, csv="quality")
    head = ["tokens before, from", "to", "loss, nats a token", "predicted tokens"]
    rows = [list(part.values()) for part in result["by_context"]]
    figure, axis = plots.new_figure()
    axis.plot([row[1] for row in rows], [row[2] for row in rows], **plots.style_of(0))
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(xlabel="tokens before the predicted one in its window, at most", ylabel="loss, nats a token")
    page.figure("context", figure, "Loss by how much of the text the model has seen")
    page.table(head, rows, "Loss by the tokens before the predicted one in its window", csv="context")
    page.heading("The first tokens")
    page.raw(_shaded(model, text.read_each([0], min(model.trained.context, _SHADED) + 1)[0][: text.tokens]))


def _shaded(model, ids):
    """Each token on a ground that is darker the less it was expected."""
    (found,) = scoring.score(model.decoder, model.rows, [ids], model.trained.context)
    first, *texts = map(html.escape, token_texts(model.tokenizer, ids))
    parts = [f"<span>{first}</span>"]
    for text, log_prob in zip(texts, found.log_probs_T):
        shade = f"background: rgb(255 120 0 / {min(-log_prob / _FULL_SHADE, 1):.2f})"
        parts.append(f'<span style="{shade}" title="{-log_prob:.2f} nats">{text}</span>')
    note = f"Ground: nats, none (white) to {_FULL_SHADE:g} or more (orange); the number appears under the pointer."
    style = "font-family: ui-monospace, monospace; overflow-wrap: anywhere"
    return f'<p class="facts">{note}</p><p style="{style}">{"".join(parts)}</p>'


def of_tasks(page: report.Report, results: dict) -> None:
    """`results` are those of the harness."""
    rows, bars = [], []
    for task, values in results["results"].items():
        for key, value in values.items():
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
        names, values, errors = zip(*bars[::-1])
        figure, axis = plots.new_figure(height=1 + 0.28 * len(bars))
        axis.barh(names, values, xerr=errors, color="C0", height=0.6, error_kw={"ecolor": "#444", "capsize": 2})
        axis.set(xlim=(0, 1), xlabel="score; the line is one standard error to each side")
        page.figure("scores", figure, "Scores of which more is better, from 0 to 1")
