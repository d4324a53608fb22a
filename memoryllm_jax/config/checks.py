"""The values and combinations of config fields that are refused."""

import dataclasses

from memoryllm_jax.common.errors import UserError, shown
from memoryllm_jax.common.fields import flatten
from memoryllm_jax.config.tree import RULES, Config, ModelConfig

TEMPERATURES = "0 (greedy), or from 0.001 to 1000"  # the valid values, for help texts and error messages


def is_temperature(value: float) -> bool:
    """Whether the value is a valid temperature of sampling, as `TEMPERATURES` says."""
    # Outside this range float32 logits overflow, or all differ by less than their rounding.
    return value == 0 or 1e-3 <= value <= 1e3


def validate(config: Config) -> None:
    """Refuses impossible values and combinations. Raises: UserError that names the field."""
    values = flatten(config)

    def need(condition: bool, name: str, expected: str) -> None:
        if not condition:
            raise UserError(f"config.{name}: expected {expected}, found {shown(values[name])}")

    for name, rule in RULES.items():
        need(rule.takes(values[name]), name, rule.expected())
    _check_attention(config.model, need)
    _check_ffn(config.model, need)
    _check_run(config, need)


def _check_attention(m: ModelConfig, need) -> None:
    need(m.dim % m.heads == 0, "model.heads", f"a divisor of model.dim = {m.dim}")
    need(m.heads % m.key_heads == 0, "model.kv_heads", f"a divisor of model.heads = {m.heads}, or 0")
    # RoPE rotates a head's components in pairs.
    need(m.head_dim % 2 == 0, "model.heads", f"an even head size (model.dim / heads = {m.dim} / {m.heads})")
    need(
        m.rope_low_freq_factor < m.rope_high_freq_factor,
        "model.rope_low_freq_factor",
        f"less than rope_high_freq_factor = {m.rope_high_freq_factor}",
    )


def _check_ffn(m: ModelConfig, need) -> None:
    need(m.rows == "own" or m.row_dim > 0, "model.rows", "own, as the layers look up no rows")
    if m.token_memory == "per_layer":
        need(m.table_dim >= 1, "model.table_dim", "at least 1")
        need(m.compute_dim > 0, "model.beta", f"an FFN-C wider than the gates of table_dim = {m.table_dim}")
    if m.token_memory == "bov":
        need(m.layers >= 2, "model.layers", "at least 2 for bov, of which the last third has no values of its own")
    if m.beta == 8:
        need(m.compute_input == "after_attention", "model.compute_input", "after_attention, as beta 8 is base")
    if 0 < m.beta < 8:
        need(m.ffn_dim >= 2, "model.ffn_dim", "at least 2")
        if m.token_memory == "ffn":
            need(0 < m.compute_dim < m.ffn_dim, "model.ffn_dim", f"room for both FFN-C and FFN-M at beta {m.beta:g}")


def _check_run(config: Config, need) -> None:
    o, architecture = config.optimizer, config.model.architecture
    if config.model.token_memory == "bigram":
        why = f"as {architecture} can only be trained and score text"
        need(config.sample.tokens == 0, "sample.tokens", f"0, {why}")
        need(config.eval.tasks == "", "eval.tasks", f"no tasks, {why}")
    need(is_temperature(config.sample.temperature), "sample.temperature", TEMPERATURES)
    need(
        config.start.workdir != "" or config.start.optimizer == "new",
        "start.workdir",
        "the workdir of the run that start.optimizer=continue goes on from",
    )
    need(
        config.start.memory != "zero" or architecture in ("rows-8", "rows-8 with shared rows"),
        "start.memory",
        f"copy, new or distill for {architecture}, as rows-8 alone begins with zeros",
    )
    _check_trained(config, need)
    need(o.final_lr <= o.peak_lr, "optimizer.final_lr", f"at most optimizer.peak_lr = {o.peak_lr}")
    need(config.batch_size % config.accumulate == 0, "batch_size", f"a multiple of accumulate = {config.accumulate}")
    parts = dataclasses.asdict(config.mesh)
    for axis, size in parts.items():
        need(size >= 1 or size == -1, f"mesh.{axis}", "a number of parts, or -1 for all remaining devices")
    need(list(parts.values()).count(-1) <= 1, "mesh.fsdp", "-1 on one axis only (it is -1 unless set)")


def _check_trained(config: Config, need) -> None:
    """Refuses a run that would train nothing, and Muon without a matrix."""
    o, m = config.optimizer, config.model
    if o.train == "all":
        return
    need(m.row_dim > 0, "optimizer.train", f"all, as {m.architecture} has no token memory")
    need(m.rows != "frozen", "optimizer.train", "all, as no parameters make frozen rows")
    need(
        o.name != "muon" or m.memory_dim > 0,
        "optimizer.name",
        f"adamw, as the token memory of {m.architecture}, which alone is trained, has no matrices",
    )


def check_length(config: Config) -> None:
    """Refuses what the run's steps cannot hold. Raises: UserError."""
    _check_schedule(config)
    _check_distillation(config)


def _check_schedule(config: Config) -> None:
    """Refuses a warm-up that the run's steps cannot hold, together with a decay. Raises: UserError."""
    o, steps = config.optimizer, config.steps
    if o.warmup_steps > steps:
        raise UserError(
            f"config.optimizer.warmup_steps: expected at most the {steps:,} steps of the run, found "
            f"{o.warmup_steps:,}; set it to {steps // 20}, a twentieth of them, or train longer"
        )
    if o.schedule == "wsd" and o.warmup_steps > config.decay_begins:
        raise UserError(
            f"config.optimizer.decay_share: expected a decay that begins after the {o.warmup_steps:,} steps of "
            f"warm-up, found {o.decay_share:g} of {steps:,} steps, so that it begins after {config.decay_begins:,}"
        )


def _check_distillation(config: Config) -> None:
    """Refuses a text longer than the run's, whose first tokens it is. Raises: UserError."""
    start, most = config.start, config.steps * config.batch_size * config.seq_len
    if start.memory == "distill" and start.distill_tokens > most:
        raise UserError(
            f"config.start.distill_tokens: expected at most the {most:,} tokens of the run, found "
            f"{start.distill_tokens:,.0f}"
        )
