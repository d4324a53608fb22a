"""The page of a comparison: which token memories are worth their parameters, by the finished runs of a protocol.

The page answers the protocol's contrasts, which were stated before the runs. All else on it is exploration, in which no
difference is marked as a finding. The JSON file beside the page holds every number that the page shows, and names no
path of this machine.
"""

import json
import math
import os
import platform

import numpy as np

from memoryllm_jax.common import provenance, report, storage
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.experiments import answers as answers_lib
from memoryllm_jax.experiments import comparison_plots, costs, laws, runner
from memoryllm_jax.experiments.answers import Answer, Answers, Crossing
from memoryllm_jax.experiments.comparison_plots import name_of
from memoryllm_jax.experiments.intervals import FEWEST, Interval
from memoryllm_jax.experiments.laws import FittedLaw
from memoryllm_jax.experiments.protocol import Protocol
from memoryllm_jax.experiments.results import Cell, Results

_QUESTION = """
Is a table that is read by token id worth its parameters, and against which control? The variants are trained at equal
size, vocabulary and tokens, with the same seeds and data, and each with the peak learning rate that was best for it in
a sweep. All are scored on the same held-out targets. Each point of a curve is a run of its own, whose learning rate
decays to its end. The questions below were stated before the runs.
"""
_ANSWER = """
Each number is the loss of a less that of b in bits per byte of held-out text, ± half of its interval: below 0, a is
better. The intervals cover the choice of held-out documents (paired bootstrap) and of seeds (Student's t), and all of
them together hold with 95%. ▼ marks an interval below 0 (a is better), ▲ one above 0 (b is better). No mark: no
difference was found, or no spread over seeds is known. A comparison of one seed takes the spread over seeds of others
with the same token ids. "Equal" names the costs that a and b share within 1%.
"""
_CROSSING = """
Base has as many parameters as each MemoryLLM, and all of them pass every token. After how much text is it ahead? The
measured differences are interpolated against the logarithm of tokens, without a law. "Not before" and "before" name the
longest and the shortest run, beyond which nothing was measured. Each interval is a 95% interval alone. A parameter is
one of base's attention, FFNs and norms.
"""
_EXPLORATION = """
What follows was not asked before the runs. Its intervals are 95% intervals each alone, so that about one in twenty
misses the truth, and none is marked as a finding. Take them as questions for new runs.
"""
_COSTS = """
"=" marks what equals the first variant within 1%. Every token passes the active parameters: attention, FFN-C, gates and
norms. Embedding and head count in the total alone. Training FLOPs include the rows of the token memory that were
computed; serving FLOPs do not, as rows are looked up. Bytes are those of bfloat16, without the row of the embedding,
which all models read.
"""
_LAW = """
L = E + A (N_a + k N_m)^-alpha + B (D (1 + r s))^-beta, with N_a active parameters, N_m parameters of the token memory,
s = N_m / (N_a + N_m) and D tokens. k is the worth of a memory parameter, in active parameters, after many tokens. r
is a gain in data efficiency: a model of which a share s is memory learns from D tokens what one without memory learns
from D (1 + r s). If the interval of k or r contains 0, no such effect was found. Controls are left out. Intervals are
percentiles over fits to resampled curves; those of single runs include the error of the law. Crossings by the law
beyond the longest run are extrapolated.
"""
_LIMITS = """
The held-out documents come from the sources of the training text. A window holds the same number of tokens in every
vocabulary, so it holds less text where tokens are short. Equal tokens are not equal text, and equal text is not equal
compute: with more ids a run of the same text has fewer tokens. Each sweep of rates has one length and one seed. The
sizes span less than a factor of a hundred: only the runs that the law was not fitted to show whether it holds beyond
them.
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
        found = answers_lib.of_results(results)
        record = {"answers": _answers(page, results, found), "crossings": _crossings(page, results)}
        page.heading("Exploration")
        page.text(_EXPLORATION)
        exploration = _exploration(page, results, found)
        page.heading("Limits")
        page.text(_LIMITS)
        page.heading("Protocol")
        about = _protocol(protocol)
        page.table(["part", "value"], about.items())
        page.facts["intervals"] = (
            f"{len(found.answers):,} answers, all of which hold together with 95%, each {found.factor:.2f} times as "
            f"wide as alone; {len(record['crossings']):,} crossings; {_count(exploration):,} in the exploration"
        )
        return page.write(_rounded(record | exploration | {"protocol": about}))


def _facts(results: Results) -> dict[str, str]:
    protocol, finished = results.protocol, results.runs
    texts = [
        f"{name} ids: {text.tokens:,} targets, {text.bytes:,.0f} bytes in {text.documents.number} documents, worth "
        f"{text.effective:.0f} of equal size"
        for name, text in results.texts.items()
    ]
    # Any rate will do: the runs are counted.
    planned = protocol.experiment_runs(dict.fromkeys(map(protocol.swept, protocol.settings()), 1e-3))
    codes = _codes(results)
    facts = {
        "finished runs": f"{len(finished):,} of {len(planned):,}; {sum(run.tokens for run in finished) / 1e6:,.0f} M "
        "tokens together",
        "held-out text": "; ".join(texts),
        "code of the runs": "; ".join(codes),
    }
    if len(codes) > 1:
        facts["warning"] = "the runs were not all made with the same code, so that differences may come from it"
    if min(text.effective for text in results.texts.values()) < FEWEST:
        facts["few documents"] = f"no intervals are given for fewer than {FEWEST} documents"
    return facts


def _protocol(protocol: Protocol) -> dict[str, str]:
    """What all runs share, and what the sizes are."""
    return {
        "config": f"{protocol.config}, {_text(protocol.fields)}",
        "sizes": ", ".join(f"{name} ({_text(fields)})" for name, fields in protocol.sizes.items()),
        "page made with": f"{_text(provenance.versions())}, Python {platform.python_version()}",
    }


def _codes(results: Results) -> list[str]:
    """Commits and versions of the code that the runs were made with, each once."""
    found = {}
    for run in results.runs:
        path = os.path.join(run.folder(results.workdir), runner.DESCRIPTION)
        made = json.loads(storage.read_bytes(path, "the description of a run"))
        found[f"commit {made['commit'] or 'unknown'}, {_text(made['versions'])}"] = None
    return list(found)


def _text(fields) -> str:
    return ", ".join(f"{name} {value}" for name, value in fields.items())


def _answers(page, results: Results, found: Answers) -> dict:
    """The section of the answers. Returns: their numbers."""
    page.heading("Answer")
    contrasts = found.contrasts()
    if not contrasts:
        page.text("No two variants that a question compares have runs of one size, vocabulary, length and seed.")
        return {"factor": found.factor, "differences": []}
    page.text(_ANSWER)
    last = [found.last(contrast) for contrast in contrasts]
    places = [
        place for place in dict.fromkeys(cell[:2] for cell in results.cells()) if any(place in row for row in last)
    ]
    equal = [", ".join(answers_lib.equal_costs(results, contrast)) if contrast.b else "all" for contrast in contrasts]
    rows = [
        [contrast.question, name_of(contrast), same, *(_answer(row.get(place)) for place in places)]
        for contrast, same, row in zip(contrasts, equal, last)
    ]
    head = ["question", "a less b", "equal", *(f"{vocabulary} ids, size {size}" for size, vocabulary in places)]
    page.table(head, rows, "The answers after the most tokens at which both were trained", csv="answers")
    caption = "The answers by the text that was read. Filled: a difference was found; below 0, a is better"
    page.figure("answers-text", comparison_plots.answers_by_text(results, found), caption)
    figure = comparison_plots.answers_by_vocabulary(results, found)
    if figure:
        caption = "The answers by the number of token ids, after as equal an amount of text as there are runs of"
        page.figure("answers-vocabulary", figure, caption)
    rows = [_answer_record(results, answer) for answer in found.answers]
    with page.csv("all-answers", list(rows[0])) as write:
        write(row.values() for row in rows)
    return {"factor": found.factor, "differences": rows}


def _answer(found: Answer | None) -> str:
    """A cell of the table of the answers."""
    if found is None:
        return ""
    value, _, high = found.difference
    mark = ("▼ " if value < 0 else "▲ ") if found.finds else ""
    seeds = f"{found.cell.tokens / 1e6:.3g} M tokens, {found.seeds} seed{'s' if found.seeds > 1 else ''}"
    return f"{mark}{value:+.3f} ± {high - value:.3f} ({seeds})"


def _answer_record(results: Results, answer: Answer) -> dict:
    contrast, cell = answer.contrast, answer.cell
    row = {"question": contrast.question, "a": contrast.a, "b": contrast.b or f"{contrast.a} with permuted rows"}
    row |= {**cell._asdict(), "megabytes": results.megabytes(cell), "seeds": answer.seeds}
    return row | {"difference": answer.difference, "covers_seeds": answer.covers_seeds, "finds": answer.finds}


def _crossings(page, results: Results) -> list[dict]:
    """The section of the measured crossings. Returns: their numbers."""
    found = answers_lib.crossings(results)
    if found:
        page.heading("Where is the crossing?")
        page.text(_CROSSING)
        _crossing_table(page, results, found, "Text after which base is ahead, as measured", "crossings")
        caption = "Text after which base is ahead, as measured; an arrow: beyond the longest or shortest run"
        page.figure("crossings", comparison_plots.crossings(results, found), caption)
    return _dicts(found)


def _crossing_table(page, results: Results, found: list[Crossing], caption: str, csv: str) -> None:
    head = ["base ahead of", "size", "ids", "M tokens", "MB of text", "tokens a parameter"]
    rows = []
    for crossing in found:
        per_token = results.texts[crossing.vocabulary].bytes_per_token
        units = (1e-6, per_token * 1e-6, 1 / crossing.parameters)
        note = "" if crossing.covers_seeds else " (documents alone)"
        cells = [_crossing(crossing, unit) + note for unit in units]
        rows.append([crossing.variant, crossing.size, crossing.vocabulary, *cells])
    page.table(head, rows, caption, csv=csv)


def _crossing(crossing: Crossing, unit: float) -> str:
    """A crossing with its interval in some unit of text."""
    value, low, high = crossing.tokens
    first, last = (f"{end * unit:.3g}" for end in (crossing.first, crossing.last))
    if math.isnan(low):
        return ""
    if low == math.inf:
        return f"not before {last}" if crossing.last < math.inf else "never"
    if high == 0:
        return f"before {first}" if crossing.first else "always"
    shown = {0: f"before {first}", math.inf: f"after {last}"}
    if not crossing.first:  # of a law, which knows no first and last run
        shown = {0: "0", math.inf: "never"}
    value, low, high = (shown.get(tokens, f"{tokens * unit:.3g}") for tokens in (value, low, high))
    return f"{value} [{low}, {high}]"


def _exploration(page, results: Results, found: Answers) -> dict:
    """The sections of the exploration. Returns: their numbers."""
    controls = [name for name in results.variants if results.protocol.variant(name).control_of]
    variants = [name for name in results.variants if name not in controls]
    caption = "Held-out loss against tokens: the mean over seeds, with bars from the lowest to the highest seed"
    page.figure("curves", comparison_plots.curves(results, variants), caption)
    of_beta = _shares(results)
    if of_beta:
        caption = "Held-out loss against beta, the eighths of FFN parameters that every token passes"
        page.figure("beta", comparison_plots.shares(results, of_beta), caption)
    record = {"splits": []}
    for cell in _widest_cells(results, found):
        # What permuted rows cost is so much more that the picture would show nothing else.
        contrasts = [contrast for contrast in found.contrasts() if contrast.b and cell in found.of(contrast)]
        caption = f"Where variants differ: {cell.vocabulary} ids, size {cell.size}, {cell.tokens / 1e6:.3g} M tokens"
        page.figure(f"splits-{cell.vocabulary}", comparison_plots.split(results, contrasts, cell), caption)
        record["splits"] += _splits(results, contrasts, cell)
    record["losses"] = _losses(page, results)
    record["costs"] = _costs(page, results)
    record["fits"] = _laws(page, results)
    return record | {"rates": _rates(page, results)}


def _shares(results: Results) -> dict[Cell, dict[str, list[tuple[float, float]]]]:
    """{cell: {series: its (beta, bits per byte)}} where several shares of FFN-M were trained, and base."""
    found: dict[Cell, dict[str, dict[float, float]]] = {}
    for cell in results.cells():
        for name in results.variants:
            variant, runs = results.protocol.variant(name), results.seeds(name, cell)
            if not runs or variant.control_of or variant.fields:
                continue
            model = next(iter(runs.values())).config.model
            if model.token_memory == "ffn":
                loss = float(np.mean([results.loss(run) for run in runs.values()]))
                found.setdefault(cell, {}).setdefault("FFN-M", {})[model.beta] = loss
    return {
        cell: {name: sorted(points.items()) for name, points in series.items()}
        for cell, series in found.items()
        if len(series["FFN-M"]) > 3
    }


def _widest_cells(results: Results, found: Answers) -> list[Cell]:
    """For each vocabulary the cell with the most answers; of several, that with the most seeds, then tokens."""
    worth: dict[Cell, list[int]] = {}
    for answer in found.answers:
        of_cell = worth.setdefault(answer.cell, [0, 0, answer.cell.tokens])
        of_cell[0] += 1
        of_cell[1] += answer.seeds
    chosen = [[cell for cell in worth if cell.vocabulary == vocabulary] for vocabulary in results.texts]
    return [max(cells, key=worth.get) for cells in chosen if cells]


def _splits(results: Results, contrasts, cell: Cell) -> list[dict]:
    """The differences of contrasts in a cell by group of each split, in nats a token."""
    found, text = [], results.texts[cell.vocabulary]
    for split in text.splits:
        groups = text.groups(split)
        record = {**cell._asdict(), "split": split.name, "groups": [group.label for group in groups]}
        record["shares"] = [text.tokens_of(group) / text.tokens for group in groups]
        record["differences"] = {
            name_of(c): [results.difference(c.a, c.b, cell, group).estimate.interval for group in groups]
            for c in contrasts
        }
        found.append(record)
    return found


def _losses(page, results: Results) -> list[dict]:
    """The table of all losses, and of differences between variants. Returns: its rows."""
    first, found = results.protocol.variants[0].name, []
    for cell in results.cells():
        for name in results.variants:
            runs = results.seeds(name, cell)
            if not runs:
                continue
            other = results.protocol.variant(name).control_of or (first if name != first else "")
            losses = {seed: results.loss(run) for seed, run in runs.items()}
            row = {"variant": name, **cell._asdict(), "megabytes": results.megabytes(cell), "bits_per_byte": losses}
            row |= {"mean": results.mean(name, cell), "rate": next(iter(runs.values())).rate, "against": other}
            row["nats_a_token"] = float(np.mean([results.nats(run) for run in runs.values()]))
            row["difference"] = _interval(results, name, other, cell) if other else None
            found.append(row | {"less_permuted": _interval(results, name, "", cell)})
    head = ["size", "ids", "M tokens", "MB", "variant", "seeds", "bits per byte", "95% over documents", "nats a token"]
    head += ["lowest to highest seed", "compared with", "difference", "less itself with permuted rows"]
    rows = []
    for row in found:
        mean, seeds = row["mean"], row["bits_per_byte"].values()
        cells = [row["size"], row["vocabulary"], row["tokens"] / 1e6, row["megabytes"], row["variant"], len(seeds)]
        cells += [f"{mean.value:.4f}", f"{mean.low:.4f} to {mean.high:.4f}", f"{row['nats_a_token']:.4f}"]
        differences = [str(row[name] or "") for name in ("difference", "less_permuted")]
        rows.append([*cells, f"{min(seeds):.4f} to {max(seeds):.4f}", row["against"], *differences])
    page.heading("All losses")
    page.table(head, rows, "All losses, and differences in bits per byte", csv="losses")
    return found


def _interval(results: Results, a: str, b: str, cell: Cell) -> Interval | None:
    difference = results.difference(a, b, cell)
    return difference and difference.estimate.interval


def _costs(page, results: Results) -> list[dict]:
    """The table of what the variants cost, at the first cell of each vocabulary with the most variants."""
    rows, table = [], []
    for vocabulary in results.texts:
        cells = [cell for cell in results.cells() if cell.vocabulary == vocabulary]
        cell = max(cells, key=lambda cell: sum(bool(results.seeds(name, cell)) for name in results.variants))
        first = None
        for variant in results.variants:
            for run in list(results.seeds(variant, cell).values())[:1]:
                found = costs.of_run(results.config(run), run.folder(results.workdir))
                first = first or found
                rows.append({"variant": variant, "size": cell.size, "vocabulary": vocabulary} | found._asdict())
                table.append([vocabulary, cell.size, variant, *found.shown(first)])
    page.heading("Costs")
    page.text(_COSTS)
    page.table(["ids", "size", "variant", *costs.COLUMNS], table, "What is equal, and what is not", csv="costs")
    return rows


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
        found[vocabulary] = _law(page, results, vocabulary, law)
    return found


def _law(page, results: Results, vocabulary: str, law: FittedLaw) -> dict:
    numbers = law.fit.numbers()
    rows = [[name, f"{i.value:.4g}", f"{i.low:.4g} to {i.high:.4g}"] for name, i in numbers.items()]
    caption = f"{vocabulary} ids: the numbers of the law from {len(law.points)} settings, which it misses by "
    caption += f"{law.fit.error:.2%} of their loss; {law.fit.dropped} of {law.fit.dropped + len(law.fit.replicates)} "
    caption += "resampled fits did not converge and are left out"
    if law.without:
        caption += f"; without {', '.join(law.without)}, of which there are too few sizes or lengths"
    page.table(["number", "value", "95% interval"], rows, caption, csv=f"law-{vocabulary}")
    if law.predictions:
        head = ["setting that was left out", "bits per byte", "by the law", "95% interval", "error"]
        rows = []
        for setting, measured, predicted in law.predictions:
            error = f"{predicted.value / measured - 1:+.2%}"
            rows.append([setting, measured, predicted.value, f"{predicted.low:.4f} to {predicted.high:.4f}", error])
        page.table(head, rows, f"{vocabulary} ids: runs that the law was not fitted to")
    caption = f"{vocabulary} ids: losses as measured and by the law"
    page.figure(f"law-{vocabulary}", comparison_plots.law(law.points, law.left_out, law.fit), caption)
    if law.crossings:
        caption = f"{vocabulary} ids: text after which base is ahead by the law, also beyond the longest run"
        _crossing_table(page, results, law.crossings, caption, f"law-crossings-{vocabulary}")
    about = {"settings": len(law.points), "error": law.fit.error, "dropped": law.fit.dropped, "without": law.without}
    return about | {"numbers": numbers, "left_out": _dicts(law.predictions), "crossings": _dicts(law.crossings)}


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
        f"{', '.join(dict.fromkeys(protocol.sweep.sizes.values()))}. Other sizes take the rate of one of these. A rate "
        "is inside if higher and lower ones were worse."
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


def _count(tree) -> int:
    """The number of intervals in a record."""
    if isinstance(tree, Interval):
        return 1
    if isinstance(tree, dict):
        return sum(map(_count, tree.values()))
    return sum(map(_count, tree)) if isinstance(tree, list) else 0


def _rounded(tree):
    """The tree with numbers of six digits, as more of them would only make the file larger."""
    if isinstance(tree, dict):
        return {key: _rounded(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_rounded(value) for value in tree]
    if not isinstance(tree, float):
        return tree
    return str(tree) if math.isinf(tree) else float(f"{tree:.6g}")  # JSON has no infinity
