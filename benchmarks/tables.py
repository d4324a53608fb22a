"""The Markdown tables of docs/performance.md, from the records of speed.py."""

import statistics

from memoryllm_jax.common import storage


def markdown(path: str) -> str:
    """A heading line and the tables of one record."""
    record = storage.read_json(path, "a record of speed.py")
    shape, results = record["shape"], record["results"]
    tokens = shape["batch_size"] * shape["seq_len"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    parts = [
        f"{shape['layers']} layers of width {shape['dim']}, {tokens:,} tokens a step in sequences of "
        f"{shape['seq_len']:,}, {shape['dtype']}; {record['ids']}; {record['machine']}; Python {record['python']}, "
        f"{versions}; commit {record['commit']}.",
        _table(*_ours(results)),
    ]
    peers = _peers(results)
    parts += [_table(*peers)] if peers[1] else []
    if "decode" in record:
        parts.append(_table(*_decoding(record["decode"])))
        build = record["tol_build"]
        parts.append(f"ToL build: {build['bytes'] / 1e9:.1f} GB in {build['seconds']:.0f} s.")
    return "\n\n".join([*parts, f"    {record['command']}"])


def _ours(results):
    on_device = any("mfu" in r for r in results.values())
    head = ["side", "s a step", "tokens/s", "peak GB", "over base", "FLOPs predict", "share"]
    head += ["MFU", "all attention", "FFN-M everywhere"] if on_device else []
    rows = []
    for side, r in results.items():
        if "error" in r:
            rows.append([side, r["error"], *[""] * (len(head) - 2)])
        elif "rows" in r:
            base = r["speed_over"].get("base")
            predicted = [_range(base), f"{base['predicted']:.2f}", f"{base['share']:.0%}"] if base else [""] * 3
            mfu = [r[f"mfu{kind}"] for kind in ("", "_full_attention", "_every_position")] if on_device else []
            rows.append([*_plain(side, r), *predicted, *(f"{x:.1%}" for x in mfu)])
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


def _decoding(record):
    head = ["side", "ms a token", "over base", "GB touched", "bandwidth alone, ms", "times that", "held GB"]
    rows = []
    for side, r in record["results"].items():
        ms, floor = statistics.median(r["ms_per_token"]), r["bandwidth_ms"]
        row = [side.split(": ")[1], f"{ms:.2f}", _range(r.get("speed_over_base")), f"{r['bytes_touched'] / 1e9:.2f}"]
        rows.append([*row, f"{floor:.2f}", f"{ms / floor:.2f}", f"{r['held_bytes'] / 1e9:.1f}"])
    return head, rows


def _range(ratio):
    return f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})" if ratio else ""


def _table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
