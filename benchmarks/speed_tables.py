"""The tables of docs/performance.md about training speed, from records of speed.py."""

import statistics

from memoryllm_jax.common import records


def markdown(path: str) -> str:
    """A line about the setup, the tables and the command of one record of this script."""
    record = records.read(dict, path, "a record of speed.py")
    shape, results = record["shape"], record["results"]
    tokens = shape["batch_size"] * shape["seq_len"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    parts = [
        f"{shape['layers']} layers of width {shape['dim']}, {tokens:,} tokens a step in sequences of "
        f"{shape['seq_len']:,}, {shape['dtype']}; {record['ids']}; {record['machine']}; Python {record['python']}, "
        f"{versions}; commit {record['commit']}.",
        _table(*_ours(results)),
    ]
    head, rows = _peers(results)
    if rows:
        parts.append(_table(head, rows))
    return "\n\n".join([*parts, f"    {record['command']}"])


def _ours(results):
    on_device = any("mfu" in r for r in results.values())
    head = ["side", "s a step", "tokens/s", "peak GB", "over base", "FLOPs predict", "share"]
    if on_device:
        head += ["MFU", "all attention", "FFN-M everywhere"]
    rows = []
    for side, r in results.items():
        if "error" in r:
            rows.append([side, r["error"], *[""] * (len(head) - 2)])
        elif "rows" in r:  # peers have none
            row = [*_plain(side, r), "", "", ""]
            if "base" in r["speed_over"]:
                base = r["speed_over"]["base"]
                row[-3:] = [_range(base), f"{base['predicted']:.2f}", f"{base['share']:.0%}"]
            if on_device:
                row += [f"{r[f'mfu{ending}']:.1%}" for ending in ("", "_full_attention", "_every_position")]
            rows.append(row)
    return head, rows


def _peers(results):
    ours = [side for side, r in results.items() if "rows" in r]
    head = ["side", "s a step", "tokens/s", "peak GB", *(f"{side} over it" for side in ours)]
    rows = []
    for peer, r in results.items():
        if "seconds" in r and "rows" not in r:
            rows.append([*_plain(peer, r), *(_range(results[side]["speed_over"][peer]) for side in ours)])
    return head, rows


def _plain(side, r):
    seconds = statistics.median(r["seconds"])
    return [side, f"{seconds:.2f}", f"{r['tokens_per_second']:,.0f}", f"{r['peak_bytes'] / 1e9:.1f}"]


def _range(ratio):
    return f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})" if ratio else ""


def _table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
