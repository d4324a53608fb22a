"""The page of a comparison: which token memories are worth their parameters, by the finished runs of a protocol.

The JSON file beside the page holds every number that the page shows, and names no path of this machine.
"""

import importlib.metadata
import math
import os
import platform

import numpy as np

from memoryllm_jax.common import report
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.experiments import comparison_plots, costs, laws, runner
from memoryllm_jax.experiments.intervals import Interval
from memoryllm_jax.experiments.laws import Crossing, FittedLaw
from memoryllm_jax.experiments.protocol import Protocol
from memoryllm_jax.experiments.results import Cell, Compared, Family, Results

_PACKAGES = ("memoryllm_jax", "jax", "flax", "optax", "numpy", "scipy")
_QUESTION = """
Is a table that is read by token id worth its parameters, and against which control? The variants are trained at equal
size, vocabulary and tokens, with the same seeds and data, and each with the peak learning rate that was best for it in
a sweep. All are scored on the same held-out targets. Each point of a curve is a run of its own, whose learning rate
decays to its end.
"""
_HOW_TO_READ = """
A difference is the loss of a variant minus the loss of the variant that it is compared with: below 0 is better. Losses
of the whole text are in bits per byte, so that vocabularies can be compared; losses of groups of targets are in nats a
token.

[low, high] is a 95% interval. It covers the choice of held-out documents (paired bootstrap) and, where there are
several seeds, the choice of seeds (Student's t, with the spread that all variants of the table share). ▼ marks an
interval below 0 (better), ▲ one above 0 (worse). No mark means that no difference was found. One in twenty intervals
misses the truth.

In the tables of costs, "=" marks what equals the first variant within 1%. Every token passes the active parameters:
attention, FFN-C, gates and norms. Embedding and head count in the total alone. Training FLOPs include the rows of the
token memory that were computed; serving FLOPs do not, as rows are looked up. Bytes are those of bfloat16, without the
row of the embedding, which all models read.
"""
_LAW = """
L = E + A (N_a + k N_m)^-alpha + B (D (1 + r s))^-beta, with N_a active parameters, N_m parameters of the token memory,
s = N_m / (N_a + N_m) and D tokens. k is the worth of a memory parameter, in active parameters, after many tokens. r
says how much faster a model learns: with D tokens it gets as far as it would with D (1 + r s) without the memory. If
the interval of k or r contains 0, no such effect was found. Controls are left out, and so are memories with runs of one
or two lengths. Intervals are percentiles over fits to resampled settings.
"""
_LIMITS = """
The held-out documents come from the sources of the training text. A window holds the same number of tokens in every
vocabulary, so it holds less text where tokens are short. Each sweep of rates has one length and one seed. The sizes
span less than a factor of a hundred: only the runs that the law was not fitted to show whether it holds beyond them.
"""


def draw(protocol: Protocol, path: str, workdir: str) -> str:
    """Writes comparison.html into the workdir of a protocol, with JSON, CSV and PNG files beside it.

    Args:
      path: of the protocol, for the caption.
    Returns: one line about the page. Raises: UserError if no run is finished.
    """
    results = Results(protocol, runner.finished(protocol, workdir), workdir)
    name = os.path.splitext(os.path.basename(path))[0]
    with report.Report(workdir, "comparison", f"Comparison: {name}", _facts(results)) as page:
        # Not the command that was typed, whose paths do not belong into a record.
        shown = os.path.basename(path) if os.path.isabs(path) else path
        page.facts["command"] = f"python -m memoryllm_jax.compare --protocol={shown} --workdir=DIR --texts=TEXTS"
        page.heading("Question")
        page.text(_QUESTION)
        page.heading("How to read")
        page.text(_HOW_TO_READ)
        families = results.families()
        page.heading("Answer")
        for family in families:
            _answer(page, results, family)
        record = {family.name: _family(page, results, family) for family in families}
        record |= {"fits": _laws(page, results), "rates": _rates(page, results)}
        page.heading("Limits")
        page.text(_LIMITS)
        return page.write(_rounded(record))


def _facts(results: Results) -> dict[str, str]:
    protocol, finished = results.protocol, results.runs
    sizes = ", ".join(f"{name} ({_text(fields)})" for name, fields in protocol.sizes.items())
    texts = [
        f"{name}: {text.tokens:,} targets in {text.documents.number} documents, {text.bytes:,.0f} bytes"
        for name, text in results.texts.items()
    ]
    # Any rate will do: the runs are counted.
    planned = protocol.experiment_runs(dict.fromkeys(map(protocol.swept, protocol.settings()), 1e-3))
    installed = [f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES]
    return {
        "config": f"{protocol.config}, {_text(protocol.fields)}",
        "sizes": sizes,
        "held-out text": "; ".join(texts),
        "finished runs": f"{len(finished):,} of {len(planned):,}; {sum(run.tokens for run in finished) / 1e6:,.0f} M "
        "tokens together",
        "versions": ", ".join([*installed, f"Python {platform.python_version()}"]),
        "report made on": f"{os.cpu_count()} cores, {platform.machine()}",
    }


def _text(fields) -> str:
    return ", ".join(f"{name} {value}" for name, value in fields.items())


def _answer(page, results: Results, family: Family) -> None:
    """The table of a family's differences after the most tokens, by size and vocabulary."""
    cells = results.last_cells(family)
    if not cells:
        page.text(
            f"{family.name.capitalize()}: no two that can be compared have runs of one size, vocabulary and length."
        )
        return
    compared = [results.compare(family, cell) for cell in cells]
    head = [
        "variant",
        "compared with",
        *(f"{c.vocabulary} ids, {c.size}, {c.tokens / 1e6:.3g} M tokens" for c in cells),
    ]
    rows = []
    for variant in family.variants:
        other = results.against(family, variant) or "(bits per byte)"
        rows.append([variant, other, *(_answer_cell(by_variant.get(variant)) for by_variant in compared)])
    caption = f"{family.name.capitalize()}: differences in bits per byte after the most tokens"
    page.table(head, rows, caption, csv=f"{family.name}-answer")


def _answer_cell(found: Compared | None) -> str:
    if found is None:
        return ""
    if not found.against:
        return f"{found.loss.value:.4f}"
    return _difference(found.difference)


def _difference(interval: Interval | None) -> str:
    if interval is None:
        return ""
    mark = ""
    if interval.finds:
        mark = "▼ " if interval.value < 0 else "▲ "
    return f"{mark}{interval}"


def _family(page, results: Results, family: Family) -> dict:
    """The section of a family. Returns: its numbers."""
    page.heading(family.name.capitalize())
    name, cells = family.name, results.widest_cells(family)
    record: dict[str, list] = {"costs": [], "splits": []}
    caption = "Held-out loss against tokens: the mean over seeds, with bars from the lowest to the highest seed"
    page.figure(f"{name}-curves", comparison_plots.curves(results, family), caption)
    if cells:
        caption = "Differences of the loss against tokens with their 95% intervals; below 0 is better"
        page.figure(f"{name}-differences", comparison_plots.differences(results, family), caption)
        record["costs"] = _costs(page, results, family, cells)
    across = results.across_vocabularies(family)
    if across:
        caption = "Differences of the loss by the number of token ids, with their 95% intervals"
        page.figure(f"{name}-vocabularies", comparison_plots.by_vocabulary(results, family, across), caption)
    for cell in cells:
        caption = f"Where variants differ: {cell.vocabulary} ids, size {cell.size}, {cell.tokens / 1e6:.3g} M tokens"
        page.figure(f"{name}-splits-{cell.vocabulary}", comparison_plots.split(results, family, cell), caption)
        record["splits"] += _splits(results, family, cell)
    record["losses"] = [row for cell in results.cells(family) for row in _losses(results, family, cell)]
    _loss_table(page, family, record["losses"])
    return record


def _losses(results: Results, family: Family, cell: Cell) -> list[dict]:
    """The loss of each variant in a cell, and the difference from the variant that it is compared with."""
    rows = []
    runs = results.seeds(family, cell)
    for variant, found in results.compare(family, cell).items():
        row = {"variant": variant, **cell._asdict(), "bits_per_byte": found.losses, "mean": found.loss}
        row["nats_a_token"] = float(np.mean([results.nats(run) for run in runs[variant].values()]))
        row |= {"rate": next(iter(runs[variant].values())).rate, "against": found.against}
        rows.append(row | {"difference": found.difference})
    return rows


def _loss_table(page, family: Family, losses: list[dict]) -> None:
    head = ["size", "ids", "tokens, M", "variant", "seeds", "bits per byte", "95% over documents", "nats a token"]
    head += ["lowest to highest seed", "compared with", "difference"]
    rows = []
    for row in losses:
        mean, seeds = row["mean"], row["bits_per_byte"].values()
        cells = [row["size"], row["vocabulary"], row["tokens"] / 1e6, row["variant"], len(seeds)]
        cells += [f"{mean.value:.4f}", f"{mean.low:.4f} to {mean.high:.4f}", f"{row['nats_a_token']:.4f}"]
        cells += [f"{min(seeds):.4f} to {max(seeds):.4f}", row["against"], _difference(row["difference"])]
        rows.append(cells)
    page.table(head, rows, "All losses, and their differences in bits per byte", csv=f"{family.name}-losses")


def _costs(page, results: Results, family: Family, cells: list[Cell]) -> list[dict]:
    """The table of what the variants cost in some cells. Returns: its rows."""
    rows, table = [], []
    for cell in cells:
        first = None
        for variant, runs in results.seeds(family, cell).items():
            run = next(iter(runs.values()))
            found = costs.of_run(results.config(run), run.folder(results.workdir))
            first = first or found
            rows.append({"variant": variant, "size": cell.size, "vocabulary": cell.vocabulary} | found._asdict())
            table.append([cell.vocabulary, cell.size, variant, *found.shown(first)])
    head = ["ids", "size", "variant", *costs.COLUMNS]
    page.table(head, table, "What is equal, and what is not", csv=f"{family.name}-costs")
    return rows


def _splits(results: Results, family: Family, cell: Cell) -> list[dict]:
    """The losses and differences of each variant in a cell, by group of each split, in nats a token."""
    found, text = [], results.texts[cell.vocabulary]
    for split in text.splits:
        groups = text.groups(split)
        compared = [results.compare(family, cell, group) for group in groups]
        record = {**cell._asdict(), "split": split.name, "groups": [group.label for group in groups]}
        record["shares"] = [text.tokens_of(group) / text.tokens for group in groups]
        record["losses"] = {name: [of_group[name].loss for of_group in compared] for name in compared[0]}
        record["differences"] = {name: [of_group[name].difference for of_group in compared] for name in compared[0]}
        found.append(record)
    return found


def _laws(page, results: Results) -> dict:
    """The section of the laws, one for each vocabulary. Returns: their numbers."""
    page.heading("A law of the loss")
    page.text(_LAW)
    found = {}
    for vocabulary in results.texts:
        try:
            law = laws.of_vocabulary(results, vocabulary)
        except UserError as error:
            page.text(f"{vocabulary} ids: {error}.")
            continue
        found[vocabulary] = _law(page, vocabulary, law)
    return found


def _law(page, vocabulary: str, law: FittedLaw) -> dict:
    numbers = law.fit.numbers()
    rows = [[name, f"{i.value:.4g}", f"{i.low:.4g} to {i.high:.4g}"] for name, i in numbers.items()]
    caption = f"{vocabulary} ids: the numbers of the law from {len(law.points)} runs, which it misses by "
    caption += f"{law.fit.error:.2%} of their loss"
    page.table(["number", "value", "95% interval"], rows, caption, csv=f"law-{vocabulary}")
    if law.predictions:
        head = ["run that was left out", "bits per byte", "by the law", "95% interval", "error"]
        rows = []
        for run, measured, predicted in law.predictions:
            error = f"{predicted.value / measured - 1:+.2%}"
            rows.append([run, measured, predicted.value, f"{predicted.low:.4f} to {predicted.high:.4f}", error])
        page.table(head, rows, f"{vocabulary} ids: runs that the law was not fitted to")
    caption = f"{vocabulary} ids: losses as measured and by the law"
    page.figure(f"law-{vocabulary}", comparison_plots.law(law.points, law.left_out, law.fit), caption)
    if law.crossings:
        _crossings(page, vocabulary, law.crossings)
    about = {"runs": len(law.points), "error": law.fit.error, "numbers": numbers}
    return about | {"left_out": _dicts(law.predictions), "crossings": _dicts(law.crossings)}


def _crossings(page, vocabulary: str, crossings: list[Crossing]) -> None:
    head = ["variant", "size", "tokens, M", "95% interval, M", "tokens a parameter of base"]
    rows, drawn = [], {}
    for variant, size, parameters, tokens in crossings:
        value, low, high = (x / 1e6 for x in tokens)
        rows.append([variant, size, f"{value:.4g}", f"{low:.4g} to {high:.4g}", f"{tokens.value / parameters:.4g}"])
        drawn.setdefault(variant, []).append((parameters, tokens))
    caption = f"{vocabulary} ids: tokens after which base is ahead by the law; inf: never, 0: always"
    page.table(head, rows, caption, csv=f"crossings-{vocabulary}")
    page.figure(f"crossings-{vocabulary}", comparison_plots.crossings(drawn), caption)


def _rates(page, results: Results) -> list[dict]:
    """The section of the sweeps. Returns: the losses of each rate that was tried."""
    protocol, rows = results.protocol, []
    lengths = " or ".join({f"{protocol.sweep.tokens[vocabulary] / 1e6:.3g} M": None for vocabulary in results.texts})
    for setting in dict.fromkeys(protocol.swept(run.setting) for run in results.runs):
        choice = runner.sweep_choice(protocol, results.workdir, setting)
        found = {"setting": str(setting), "rate": choice.rate, "is_inside": choice.is_inside}
        rows.append(found | {"nats_a_token": {f"{rate:g}": loss for rate, loss in choice.losses.items()}})
    page.heading("Peak learning rates")
    page.text(
        f"Each rate was tried with seed 0 for {lengths} tokens, at sizes "
        f"{', '.join(dict.fromkeys(protocol.sweep.sizes.values()))}. Other sizes take the rate of one of these, and "
        "controls that of the variant that they control. A rate is inside if higher and lower ones were worse."
    )
    head = ["setting", "chosen", "inside", "held-out nats a token, by rate"]
    table = []
    for row in rows:
        losses = ", ".join(f"{rate}: {loss:.4f}" for rate, loss in row["nats_a_token"].items())
        table.append([row["setting"], f"{row['rate']:g}", "yes" if row["is_inside"] else "no", losses])
    page.table(head, table, "Sweeps of the peak learning rate", csv="rates")
    return rows


def _dicts(found: list) -> list[dict]:
    return [item._asdict() for item in found]


def _rounded(tree):
    """The tree with numbers of six digits, as more of them would only make the file larger."""
    if isinstance(tree, dict):
        return {key: _rounded(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_rounded(value) for value in tree]
    if not isinstance(tree, float):
        return tree
    return str(tree) if math.isinf(tree) else float(f"{tree:.6g}")  # JSON has no infinity
