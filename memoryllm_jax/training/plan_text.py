"""A plan as text to print."""

from collections.abc import Callable

from memoryllm_jax.common import progress
from memoryllm_jax.training.optimizer import Group
from memoryllm_jax.training.order import SourceUse
from memoryllm_jax.training.roofline import EFFICIENCY


def gb(size: float) -> str:
    """Bytes as text: 1.23 GB."""
    return f"{size / 1e9:.2f} GB"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}"


def _ms_exact(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}"


def text(p: dict) -> str:
    """The plan as text to print.

    Args:
      p: as `plan.plan` returns it.
    """
    shape = ", ".join(f"{name} {size}" for name, size in p["mesh"].items())
    lines = [
        f"{p['architecture']} on {p['devices']} x {p['chip']} ({shape}), attention {p['attention']}",
        f"compiled in {p['compile_seconds']:.0f} s by {p.get('compiler', 'XLA')}",
        *(f"assumed: {line}" for line in p["assumed"]),
        "",
        *_size_lines(p),
        *_labelled("data", [SourceUse(**use).text for use in p["sources"]]),
        "",
        *_optimizer_lines(p),
        *_labelled("besides", p["besides"]),
        "",
        *_memory_lines(p),
        "",
        *_work_lines(p),
        "",
        *_time_lines(p),
    ]
    return "\n".join(lines)


def _size_lines(p: dict) -> list[str]:
    millions = {name: f"{count / 1e6:,.1f}M" for name, count in p["parameters"].items()}
    return [
        f"parameters       {millions['total']}: active {millions['active']} (attention {millions['attention']}, FFN-C "
        f"{millions['ffn_c']}), token memory {millions['memory']}, embedding and head "
        f"{millions['embedding_and_head']}",
        f"a step           {p['batch_size']} x {p['seq_len']} = {p['tokens_a_step']:,} tokens, "
        f"{p['sequences_a_device']} a device in each of {p['accumulate']} micro-batches; {p['rows_a_step']:,} rows of "
        "token memory",
    ]


def _optimizer_lines(p: dict) -> list[str]:
    lines = [Group(**group).text for group in p["optimizer"]]
    if p["newton_schulz_flops"]:
        lines[0] += f"; Newton-Schulz {p['newton_schulz_flops'] / 1e12:,.2f} TFLOPs a step on the busiest device"
    return [*_labelled("optimizer", lines), f"learning rate    {p['learning_rate']}"]


def _labelled(label: str, lines: list[str]) -> list[str]:
    """The lines in a column of their own, with a label before the first."""
    return [f"{label if number == 0 else '':<16} {line}" for number, line in enumerate(lines)]


def _memory_lines(p: dict) -> list[str]:
    m = p["memory"]
    lines = [
        f"memory a device  {gb(m['total'])} of {gb(p['memory_of_device'])}: parameters {gb(m['parameters'])}, "
        f"optimizer {gb(m['optimizer'])}, gradients {gb(m['gradients'])}, activations and workspace "
        f"{gb(m['activations'])}",
        f"largest batch    {m['largest_sequences_a_device']:,} sequences a device in a micro-batch, by "
        f"{gb(m['each_sequence'])} a sequence",
    ]
    if not p["fits"]:
        lines.append("DOES NOT FIT.     " + "; or ".join(p["advice"]))
    return lines


def _work_lines(p: dict) -> list[str]:
    f = p["flops"]
    lines = [
        f"FLOPs a token    {f['per_token'] / 1e9:.2f} G, with FFN-M at every position {f['per_token_plain'] / 1e9:.2f} "
        f"G, recomputed {f['recomputed_per_token'] / 1e9:.2f} G"
    ]
    if p["attention_share"] < 1:
        line = f"documents        hold {p['attention_share']:.0%} of the pairs of causal attention"
        if f["masked_per_token"]:
            line += f"; {p['attention']} computes the others too, {f['masked_per_token'] / 1e9:.2f} G a token"
        lines.append(line)
    label = "traffic"
    # Leaves out transfers that would print as 0.00 GB, and those below a hundredth of all traffic.
    least = max(5e6, 0.01 * p["collective_bytes"])
    for part in p["collectives"]:
        if part["bytes"] < least:
            continue
        lines.append(
            f"{label:<16} {part['what']}: {gb(part['bytes'])} sent a device, {part['kind']} among {part['group']} "
            f"over the {part['over']}, {_range(part['seconds'], _ms_exact)} ms"
        )
        label = ""
    return lines


def _time_lines(p: dict) -> list[str]:
    s = p["seconds"]
    hours = p["run_device_hours"]
    step, network = _range(s["step"], _ms), _range(s["network"], _ms)
    after = f" after step {p['run_start']:,}" if p["run_start"] else ""
    return [
        f"step             {step} ms: compute {_ms(s['compute'])}, network {network}, optimizer {_ms(s['optimizer'])} "
        "ms; at least with the network's time hidden behind compute, at most with none of it hidden",
        f"speed            {_range(p['tokens_per_second'], '{:,.0f}'.format)} tokens/s, "
        f"MFU {_range(p['mfu'], '{:.0%}'.format)}",
        f"the run          {p['run_steps']:,} steps{after}, {p['run_tokens'] / 1e9:,.1f} G tokens: "
        f"{_range(hours, '{:,.0f}'.format)} device hours, "
        + _range(hours, lambda n: progress.duration(n / p["devices"] * 3600)),
        f"roofline, not a measurement: compute at {EFFICIENCY:.0%} of peak FLOP/s, collectives at the speeds of data "
        "sheets (memoryllm_jax/training/chips.py)",
    ]


def _range(bounds: dict[str, float], show: Callable[[float], str]) -> str:
    """Both bounds as text, or one if they look the same."""
    least, most = show(bounds["least"]), show(bounds["most"])
    return least if least == most else f"{least} to {most}"
