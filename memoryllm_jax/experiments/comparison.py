"""The page of a comparison: which token memories are worth their parameters, by the finished runs of a protocol.

The page answers the protocol's contrasts, which were stated before the runs. All else on it is exploration, in which no
difference is marked as a finding. The JSON file beside the page holds every number that the page shows, and names no
path of this machine.
"""

import json
import math
import os
import platform

from memoryllm_jax.common import provenance, report, storage
from memoryllm_jax.experiments import answers as answers_lib
from memoryllm_jax.experiments import comparison_plots, exploration, outcomes
from memoryllm_jax.experiments.answers import Answer, Answers
from memoryllm_jax.experiments.comparison_plots import name_of
from memoryllm_jax.experiments.intervals import FEWEST, Interval
from memoryllm_jax.experiments.protocol import Protocol
from memoryllm_jax.experiments.results import Results

_QUESTION = """
Is a table that is read by token id worth its parameters, and against which control? The variants are trained at equal
size, vocabulary and tokens, with the same seeds and data, and each with the peak learning rate that was best for it in
a sweep, unless the protocol says otherwise. All are scored on the same held-out targets. Each point of a curve is a run
of its own, whose learning rate decays to its end. The questions below were stated before the runs.
"""
_ANSWER = """
Each number is the loss of a less that of b in bits per byte of held-out text, ± half of its interval: below 0, a is
better. The intervals cover the choice of held-out documents (paired bootstrap) and of seeds (Student's t), and all of
them together hold with 95%. ▼ marks an interval below 0 (a is better), ▲ one above 0 (b is better). No mark: no
difference was found, or no spread over seeds is known. In brackets: tokens, and seeds that both have. "Equal" names the
costs that a and b share within 1%.
"""
_CROSSING = """
Base has as many parameters as each MemoryLLM, and all of them pass every token. After how much text is it ahead? The
measured differences are interpolated against the logarithm of tokens, without a law. "Not before" and "before" name the
longest and the shortest run, beyond which nothing was measured. Each interval is a 95% interval alone; * marks
those of lengths at which no spread over seeds is known. A parameter is one of base's attention, FFNs and norms.
"""
_LIMITS = """
The held-out documents come from the sources of the training text. A window holds the same number of tokens in every
vocabulary, so it holds less text where tokens are short. Equal tokens are not equal text, and equal text is not equal
compute: with more ids a run of the same text has fewer tokens. Each sweep of rates has one length and one seed. All
variants are taken to vary equally with the seed. If a law was fitted, only the runs that it was not fitted to show
whether it holds beyond their sizes.
"""


def draw(protocol: Protocol, path: str, workdir: str) -> str:
    """Writes comparison.html into the workdir of a protocol, with JSON, CSV and PNG files beside it.

    Args:
      path: of the protocol, for the caption.
    Returns: one line about the page. Raises: UserError if no run is finished.
    """
    results = Results(protocol, outcomes.finished(protocol, workdir), workdir)
    name = os.path.splitext(os.path.basename(path))[0]
    with report.Report(workdir, "comparison", f"Comparison: {name}", _facts(results)) as page:
        # Not the command that was typed, whose paths do not belong into a record.
        shown = os.path.basename(path) if os.path.isabs(path) else path
        page.facts["command"] = f"python -m memoryllm_jax.compare --protocol={shown} --workdir=DIR --texts=TEXTS"
        page.heading("Question")
        page.text(_QUESTION)
        found = answers_lib.of_results(results)
        record = {"answers": _answers(page, results, found), "crossings": _crossings(page, results)}
        explored = exploration.draw(page, results, found)
        page.heading("Limits")
        page.text(_LIMITS)
        page.heading("Protocol")
        about = _protocol(protocol)
        page.table(["part", "value"], about.items())
        with_seeds = sum(answer.covers_seeds for answer in found.answers)
        page.facts["intervals"] = (
            f"{len(found.answers):,} answers, of which {with_seeds:,} cover seeds and the others documents alone; for "
            f"what they cover, all hold together with 95%, each {found.factor:.2f} times as wide as alone; "
            f"{len(record['crossings']):,} crossings; {_count(explored):,} in the exploration"
        )
        return page.write(_rounded(record | explored | {"protocol": about}))


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
        path = os.path.join(run.folder(results.workdir), outcomes.DESCRIPTION)
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
        return {"factor": found.factor, "differences": [], "spreads": []}
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
    page.table(head, rows, "The answers after the most tokens that both were trained on", csv="answers")
    with_base = {frozenset(pair) for pair in answers_lib.with_base(results.protocol)}
    of_base = [contrast for contrast in contrasts if frozenset((contrast.a, contrast.b)) in with_base]
    others = [contrast for contrast in contrasts if contrast not in of_base]
    caption = "by the text that was read. Filled: a difference was found; below 0, a is better"
    for name, what, chosen in (("base", "Against base", of_base), ("others", "The other answers", others)):
        if chosen:
            page.figure(
                f"answers-{name}", comparison_plots.answers_by_text(results, found, chosen), f"{what} {caption}"
            )
    figure = comparison_plots.answers_by_vocabulary(results, found)
    if figure:
        caption = "The answers by the number of token ids, after as equal an amount of text as there are runs of"
        page.figure("answers-vocabulary", figure, caption)
    spreads = _spreads(page, results, found)
    rows = [_answer_record(results, answer) for answer in found.answers]
    with page.csv("all-answers", list(rows[0])) as write:
        write(row.values() for row in rows)
    return {"factor": found.factor, "differences": rows, "spreads": spreads}


def _answer(found: Answer | None) -> str:
    """A cell of the table of the answers."""
    if found is None:
        return ""
    value, _, high = found.difference
    mark = ("▼ " if value < 0 else "▲ ") if found.finds else ""
    runs = f"{found.cell.tokens / 1e6:.3g} M, {found.seeds} seed{'s' if found.seeds > 1 else ''}"
    return f"{mark}{value:+.3f} ±{high - value:.3f} ({runs})"


def _spreads(page, results: Results, found: Answers) -> list[dict]:
    """The table of how much losses vary with the seed, and where that is not known. Returns: the rows of the table."""
    unknown: dict[str, set[int]] = {}
    for answer in found.answers:
        if not answer.covers_seeds:
            unknown.setdefault(answer.cell.vocabulary, set()).add(answer.cell.tokens)
    for vocabulary, lengths in unknown.items():
        shown = " and ".join(f"{tokens / 1e6:.3g}" for tokens in sorted(lengths))
        page.text(
            f"{vocabulary} ids, {shown} M tokens: too few runs as long or shorter have several seeds. Intervals cover "
            "the choice of documents alone, and no difference is marked."
        )
    rows = [
        {**cell._asdict(), **own._asdict(), "used": results.spread(cell).deviation}
        for cell, own in results.own_spreads().items()
    ]
    if rows:
        head = ["size", "ids", "tokens", "deviation", "degrees of freedom", "used"]
        caption = (
            "Standard deviation of a run's loss over seeds in bits per byte. Used: pooled over lengths up to this one, "
            "or the cell's own if Bartlett's test finds them unequal. Runs of one seed then take that of the longest "
            "runs that are not longer."
        )
        page.table(head, [list(row.values()) for row in rows], caption, csv="spreads")
    return rows


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
        exploration.crossing_table(page, results, found, "Text after which base is ahead, as measured", "crossings")
        caption = "Text after which base is ahead, as measured; an arrow: beyond the longest or shortest run"
        page.figure("crossings", comparison_plots.crossings(results, found), caption)
    return [crossing._asdict() for crossing in found]


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
