"""The exploration of a comparison: all that its page shows beside the answers, where nothing is marked as a finding."""

import math

import numpy as np

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.experiments import comparison_plots, costs, laws, outcomes
from memoryllm_jax.experiments.answers import Answer, Answers, Crossing
from memoryllm_jax.experiments.comparison_plots import name_of
from memoryllm_jax.experiments.intervals import Interval
from memoryllm_jax.experiments.laws import FittedLaw
from memoryllm_jax.experiments.protocol import Contrast
from memoryllm_jax.experiments.results import Cell, Results, cell_of

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
percentiles over fits to resampled curves, each the runs of one variant and size; those of single runs include the
error of the law. On simulated runs of configs/protocols/small.py, with nine curves of FFN-M, the 95% intervals of k
and r held the truth in 98%, those of crossings of useful memories in 91 to 95%, and those of single runs in 92%.
Crossings by the law beyond the longest run are extrapolated.
"""


def draw(page, results: Results, found: Answers) -> dict:
    """Adds the sections of the exploration to the page. Returns: their numbers."""
    page.heading("Exploration")
    page.text(_EXPLORATION)
    controls = [name for name in results.variants if results.protocol.variant(name).control_of]
    variants = [name for name in results.variants if name not in controls]
    caption = "Held-out loss against tokens: the mean over seeds, with bars from the lowest to the highest seed"
    page.figure("curves", comparison_plots.curves(results, variants), caption)
    of_beta = _shares(results)
    if of_beta:
        caption = "Held-out loss against beta, the eighths of FFN parameters that every token passes"
        page.figure("beta", comparison_plots.shares(of_beta), caption)
    record = {"splits": []}
    for cell, contrasts in _split_cells(results, found).items():
        of_memories = [contrast for contrast in contrasts if not {contrast.a, contrast.b} & set(controls)]
        millions = f"{cell.tokens / 1e6:.3g}"
        caption = f"Where variants differ: {cell.vocabulary} ids, size {cell.size}, {millions} M tokens"
        if of_memories:
            picture = comparison_plots.split(results, of_memories, cell)
            page.figure(f"splits-{cell.vocabulary}-{cell.size}-{millions}M", picture, caption)
        record["splits"] += _splits(results, contrasts, cell)
    record["losses"] = _losses(page, results)
    record["costs"] = _costs(page, results)
    record["fits"] = _laws(page, results)
    return record | {"rates": _rates(page, results)}


def _shares(results: Results) -> dict[Cell, list[tuple[float, float]]]:
    """{cell: (beta, bits per byte) of its models} where more than three shares of FFN-M were trained."""
    found: dict[Cell, list[tuple[float, float]]] = {}
    for run in results.runs:
        variant, model, cell = results.protocol.variant(run.variant), run.config.model, cell_of(run)
        seeds = results.seeds(run.variant, cell)
        is_plain = not variant.fields and not variant.control_of
        if model.token_memory == "ffn" and is_plain and run.seed == min(seeds):
            loss = float(np.mean([results.loss(other) for other in seeds.values()]))
            found.setdefault(cell, []).append((model.beta, loss))
    return {cell: sorted(found[cell]) for cell in results.cells() if len(found.get(cell, ())) > 3}


def _split_cells(results: Results, found: Answers) -> dict[Cell, list[Contrast]]:
    """The cells whose differences are shown by group of targets, with the contrasts that have the most seeds there.

    Of each vocabulary these are all cells with several seeds; without such a cell, the one with the most answers.
    """
    cells: dict[Cell, list[Answer]] = {}
    for answer in found.answers:
        if answer.contrast.b:  # What permuted rows cost is so much more that the picture would show nothing else.
            cells.setdefault(answer.cell, []).append(answer)
    most = {cell: max(answer.seeds for answer in answers) for cell, answers in cells.items()}
    shown: dict[Cell, list[Contrast]] = {}
    for vocabulary in results.texts:
        of_vocabulary = [cell for cell in cells if cell.vocabulary == vocabulary]
        several = [cell for cell in of_vocabulary if most[cell] > 1]
        widest = sorted(of_vocabulary, key=lambda cell: (len(cells[cell]), cell.tokens))[-1:]
        for cell in several or widest:
            shown[cell] = [answer.contrast for answer in cells[cell] if answer.seeds == most[cell]]
    return shown


def _splits(results: Results, contrasts: list[Contrast], cell: Cell) -> list[dict]:
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
        caption += f"; without {', '.join(law.without)}, of which there are too few sizes, curves or lengths"
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
        crossing_table(page, results, law.crossings, caption, f"law-crossings-{vocabulary}")
    found = {"settings": len(law.points), "error": law.fit.error, "dropped": law.fit.dropped, "without": law.without}
    found |= {"numbers": numbers, "left_out": [prediction._asdict() for prediction in law.predictions]}
    return found | {"crossings": [crossing._asdict() for crossing in law.crossings]}


def _rates(page, results: Results) -> list[dict]:
    """The section of the sweeps. Returns: the losses of each rate that was tried."""
    protocol, rows = results.protocol, []
    lengths = " or ".join({f"{protocol.sweep.tokens[vocabulary] / 1e6:.3g} M": None for vocabulary in results.texts})
    for setting in dict.fromkeys(protocol.swept(run.setting) for run in results.runs):
        choice = outcomes.sweep_choice(protocol, results.workdir, setting)
        found = {"setting": str(setting), "rate": choice.rate, "is_inside": choice.is_inside}
        rows.append(found | {"nats_a_token": {f"{rate:g}": loss for rate, loss in choice.losses.items()}})
    page.heading("Peak learning rates")
    page.text(
        f"Each rate was tried with seed 0 for {lengths} tokens, at sizes "
        f"{', '.join(dict.fromkeys(protocol.sweep.sizes.values()))}. Other sizes take the rate of one of these, "
        "and a variant may take a multiple of another's. A rate is inside if higher and lower ones were worse."
    )
    head = ["setting", "chosen", "inside", "held-out nats a token, by rate"]
    table = []
    for row in rows:
        losses = ", ".join(f"{rate}: {loss:.4f}" for rate, loss in row["nats_a_token"].items())
        table.append([row["setting"], f"{row['rate']:g}", "yes" if row["is_inside"] else "no", losses])
    page.table(head, table, "Sweeps of the peak learning rate", csv="rates")
    return rows


def crossing_table(page, results: Results, found: list[Crossing], caption: str, csv: str) -> None:
    head = ["base ahead of", "size", "ids", "M tokens", "MB of text", "tokens a parameter"]
    rows = []
    for crossing in found:
        per_token = results.texts[crossing.vocabulary].bytes_per_token
        units = (1e-6, per_token * 1e-6, 1 / crossing.parameters)
        note = "" if crossing.covers_seeds else " *"
        cells = [shown and shown + note for shown in (_crossing(crossing, unit) for unit in units)]
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
