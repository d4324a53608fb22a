"""The typed config tree: what each field means, its unit, and the combinations that are refused.

Config files build an `ml_collections.ConfigDict` with `default(architecture)`, so that every field can be
overridden on the command line; `resolve` turns it into the frozen `Config` that the rest of the code reads.
"""

import dataclasses
import difflib
import math
import os
import re
import runpy

import ml_collections

from memoryllm_jax.common.errors import UserError

ATTENTION_BACKENDS = ("auto", "plain", "blocked", "cudnn", "splash")
REMAT_POLICIES = ("none", "dots", "full")
ROPE_SCALINGS = ("none", "linear", "llama3")
# What a model reads by token id, with the names of the architectures that have it.
TOKEN_MEMORIES = {"ffn": "flex", "value": "value", "per_layer": "ple", "none": "narrow"}

# FFN-M widths of the paper's Table 5 that its own rounding, not ours, gives: (base width, beta) -> FFN-M width.
# Table 5 prints beta 1 and 3 of the 1B model the wrong way round; Table 6 and section 4.2 confirm this order.
_PAPER_MEMORY_WIDTHS = {
    (4272, 1): 3738,
    (4272, 2): 3200,
    (4272, 3): 2668,
    (5464, 1): 4778,
    (5464, 2): 4096,
    (5464, 3): 3418,
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    dim: int = 256  # h, the width of the residual stream
    layers: int = 4
    heads: int = 8
    kv_heads: int = 0  # key-value heads, each for heads / kv_heads query heads; 0: as many as heads
    ffn_dim: int = 688  # base width W; FFN-C and FFN-M share it. Follows dim (8/3 h, up to a multiple of 8)
    vocab_size: int = 0  # token ids; 0: that of the prepared data
    beta: float = 0.0  # FFN-C holds beta of the FFN's 8 h^2 parameters: 0 is memory, 8 is base
    # What a layer reads of the token's id: ffn (FFN-M) or, to compare with, a table's embedding: value (added to the
    # values of attention), per_layer (gated by the residual stream, as in Gemma 3n); none: FFN-C alone
    token_memory: str = "ffn"
    table_dim: int = 32  # width P of per_layer's embeddings; follows dim (an eighth)
    compute_input: str = "block_input"  # FFN-C reads X_l (block_input) or X_l + Attn (after_attention)
    norm: str = "rmsnorm"  # or layernorm (scale only: the model has no biases)
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0  # not given in the paper; Llama 2's value, for 2,048 tokens
    rope_scaling: str = "none"  # linear, or llama3 (low frequencies only), both by rope_factor
    rope_factor: float = 1.0
    rope_low_freq_factor: float = 1.0  # llama3: slower than this many turns in the original context is scaled whole
    rope_high_freq_factor: float = 4.0  # llama3: faster than this many turns is not scaled
    rope_original_context: int = 8192  # tokens
    tie_embeddings: bool = False  # one table for input and output
    init_std: float = 0.02  # not given in the paper; output projections use init_std / sqrt(2 layers)
    dtype: str = "bfloat16"  # of the computation; parameters are float32
    attention: str = "auto"  # plain, blocked, cudnn, splash; auto: splash on TPU, cudnn on NVIDIA in bf16, else blocked
    remat: str = "dots"  # what the backward pass recomputes: none, dots (all but matrix products and attention), full
    loss_chunk: int = 4096  # tokens a batch shard whose logits exist at one time
    unique_tokens: bool = True  # compute each distinct token of a batch once; False: every position (to compare)

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def key_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def memory_dim(self) -> int:
        """FFN-M width."""
        return self._given_away if self.token_memory == "ffn" else 0

    @property
    def compute_dim(self) -> int:
        """FFN-C width, less what the gates of per-layer embeddings hold: active parameters stay as many."""
        gates = 8 * round(self.table_dim / 12) if self.token_memory == "per_layer" else 0
        return self.ffn_dim - self._given_away - gates

    @property
    def _given_away(self) -> int:
        """Of the base width, (8 - beta) / 8 to a multiple of 8; for its sizes, the paper's Table 5."""
        if self.beta in (0, 8):
            return 0 if self.beta else self.ffn_dim
        plain = 8 * round(self.ffn_dim * (8 - self.beta) / 64)
        return _PAPER_MEMORY_WIDTHS.get((self.ffn_dim, self.beta), plain)

    @property
    def row_dim(self) -> int:
        """Width of what a layer reads of a token; 0: nothing."""
        widths = {"value": self.key_heads * self.head_dim, "per_layer": self.table_dim, "none": 0}
        return widths.get(self.token_memory, self.dim if self.memory_dim else 0)

    @property
    def architecture(self) -> str:
        known = {0.0: "memory", 8.0: "base"} if self.token_memory == "ffn" else {}
        return known.get(self.beta, f"{TOKEN_MEMORIES.get(self.token_memory)}-{self.beta:g}")


@dataclasses.dataclass(frozen=True)
class StartConfig:
    workdir: str = ""  # trained or imported model to start from, converted if that is base and this is not; "": none
    step: int = -1  # its checkpoint; -1: the newest
    memory: str = "copy"  # FFN-M of a converted model: copy (base's FFN) or new (initialised)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    path: str = "embedded"  # a folder that `prepare` wrote, or its URL; embedded: Python's own texts, in the workdir
    epochs: int = 1  # passes over the training tokens that may be made; a run that needs more is refused
    verify: bool = True  # check every shard's checksum before training, for which each host reads its share of them
    threads: int = 4  # reader threads a host
    prefetch: int = 4  # batches read ahead


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    peak_lr: float = 1e-4
    final_lr: float = 1e-5
    warmup_steps: int = 5000
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices; norms have none
    clip_norm: float = 1.0  # global norm of the gradient; not given in the paper
    z_loss: float = 1e-6  # weight of the squared log-partition


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int = 1  # replicas of the model; -1: all remaining devices
    fsdp: int = -1  # parts that parameters and batch are split into; -1: all remaining devices
    tensor: int = 1  # parts that heads, FFN widths and vocabulary are split into; -1: all remaining devices


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int = 1000  # steps; the last step is always saved
    keep: int = 3  # newest checkpoints kept
    keep_every: int = 0  # steps; checkpoints at multiples are kept for good; 0: none


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    every: int = 1000  # steps; the last step is always evaluated
    batches: int = 0  # held-out batches; 0: all of the held-out split


@dataclasses.dataclass(frozen=True)
class LogConfig:
    every: int = 10  # steps between lines of metrics
    tensorboard: bool = True
    wandb: bool = False
    peak_flops: float = 0.0  # FLOP/s of one device, for MFU; 0: looked up by the device's name


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    tokens: int = 0  # length of the text sampled at the end; 0: none
    prompt: str = ""
    temperature: float = 0.8


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
    steps: int = 100_000  # optimizer steps
    batch_size: int = 512  # sequences, global, per optimizer step
    accumulate: int = 1  # micro-batches that one optimizer step's batch is split into
    seq_len: int = 2048  # tokens
    model: ModelConfig = ModelConfig()
    start: StartConfig = StartConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    sample: SampleConfig = SampleConfig()


# Fields that may differ between a checkpoint and the run that goes on from it: where and how fast, not what.
MAY_CHANGE = (
    *("accumulate", "data.path", "data.epochs", "data.verify", "data.threads", "data.prefetch"),
    *("mesh.data", "mesh.fsdp", "mesh.tensor"),
    *("checkpoint.every", "checkpoint.keep", "checkpoint.keep_every", "eval.every", "eval.batches"),
    *("log.every", "log.tensorboard", "log.wandb", "log.peak_flops"),
    *("sample.tokens", "sample.prompt", "sample.temperature"),
    *("model.attention", "model.remat", "model.loss_chunk", "model.unique_tokens"),
)


_AT_LEAST_ONE = (
    *("steps", "batch_size", "accumulate", "model.dim", "model.layers", "model.heads", "model.loss_chunk"),
    *("data.epochs", "data.threads", "data.prefetch", "checkpoint.every", "checkpoint.keep", "eval.every", "log.every"),
)
_ZERO_OR_MORE = (
    *("seed", "model.vocab_size", "model.kv_heads", "checkpoint.keep_every", "eval.batches"),
    *("sample.tokens", "sample.temperature"),
    *("optimizer.warmup_steps", "optimizer.weight_decay", "optimizer.z_loss", "optimizer.final_lr", "log.peak_flops"),
)
_POSITIVE = (
    *("model.norm_eps", "model.rope_theta", "model.rope_factor", "model.rope_original_context", "model.init_std"),
    *("optimizer.peak_lr", "optimizer.eps", "optimizer.clip_norm"),
)


def parse_architecture(name: str) -> tuple[str, float]:
    """(token_memory, beta) of `base`, `memory`, `flex-B`, or `value-B`, `ple-B`, `narrow-B`. Raises: UserError.

    The last three have flex-B's attention and FFN-C, and in place of FFN-M what TOKEN_MEMORIES says.
    """
    if name in ("base", "memory"):
        return "ffn", 8.0 if name == "base" else 0.0
    match = re.fullmatch(rf"({'|'.join(TOKEN_MEMORIES.values())})-(\d+(?:\.\d+)?)", name)
    if not match or not (0 < float(match[2]) < 8 or (match[1] != "flex" and float(match[2]) <= 8)):
        raise UserError(
            f"architecture {name!r}: expected base, memory, or flex-B with B between 0 and 8; or, to compare with, "
            "value-B, ple-B or narrow-B"
        )
    return {label: memory for memory, label in TOKEN_MEMORIES.items()}[match[1]], float(match[2])


def default(architecture: str) -> ml_collections.ConfigDict:
    """A config with every field at its default, for config files to change. Raises: UserError."""
    config = ml_collections.ConfigDict(dataclasses.asdict(Config()))
    m = config.model
    m.token_memory, m.beta = parse_architecture(architecture)
    flex = m.token_memory == "ffn" and m.beta < 8
    m.compute_input = "block_input" if flex else "after_attention"
    m.ffn_dim = (m.get_ref("dim") * 8 + 23) // 24 * 8
    m.table_dim = (m.get_ref("dim") + 7) // 8
    return config


def resolve(config: ml_collections.ConfigDict | dict) -> Config:
    """The frozen, validated tree. Raises: UserError that names the field."""
    tree = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    resolved = _build(Config, tree, "config")
    validate(resolved)
    return resolved


def from_saved(tree: dict) -> Config:
    """The tree that a checkpoint holds. Raises: UserError that names the field."""
    return _build(Config, tree, "config")


def flatten(config: Config) -> dict[str, object]:
    """{"model.dim": 256, ...}"""
    out = {}
    for name, value in dataclasses.asdict(config).items():
        out.update({f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value})
    return out


def _build(cls, tree, path):
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a group of fields, found {tree!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    for name, value in tree.items():
        if name not in fields:
            raise UserError(f"{path}.{name}: no such field{_did_you_mean(name, fields)}")
        kind = fields[name].type
        if dataclasses.is_dataclass(kind):
            value = _build(kind, value, f"{path}.{name}")
        elif kind is float and type(value) is int:
            value = float(value)
        elif type(value) is not kind or (kind is float and not math.isfinite(value)):
            raise UserError(f"{path}.{name}: expected {kind.__name__}, found {value!r}")
        values[name] = value
    return cls(**values)


def _did_you_mean(name, names):
    close = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(names) or 'none below it'}"


def validate(config: Config) -> None:
    """Refuses impossible values and combinations. Raises: UserError that names the field."""

    def need(condition, field, expected):
        if not condition:
            raise UserError(f"config.{field}: expected {expected}, found {flat[field]!r}")

    flat = flatten(config)
    m, o = config.model, config.optimizer
    for field in _AT_LEAST_ONE:
        need(flat[field] >= 1, field, "at least 1")
    for field in _ZERO_OR_MORE:
        need(flat[field] >= 0, field, "zero or more")
    for field in _POSITIVE:
        need(flat[field] > 0, field, "more than zero")
    for field in ("optimizer.b1", "optimizer.b2"):
        need(0 <= flat[field] < 1, field, "a number from 0 up to 1")
    need(config.seq_len >= 2, "seq_len", "at least 2 tokens")
    temperature = config.sample.temperature
    need(temperature == 0 or 1e-3 <= temperature <= 1e3, "sample.temperature", "0 (greedy), or from 0.001 to 1000")
    need(m.dim % m.heads == 0, "model.heads", f"a divisor of model.dim = {m.dim}")
    need(m.heads % m.key_heads == 0, "model.kv_heads", f"a divisor of model.heads = {m.heads}, or 0")
    need(m.rope_scaling in ROPE_SCALINGS, "model.rope_scaling", "one of " + ", ".join(ROPE_SCALINGS))
    need(
        0 < m.rope_low_freq_factor < m.rope_high_freq_factor,
        "model.rope_low_freq_factor",
        f"more than zero and less than rope_high_freq_factor = {m.rope_high_freq_factor}",
    )
    need(m.head_dim % 2 == 0, "model.heads", f"an even head size (model.dim / heads = {m.dim} / {m.heads})")
    need(0 <= m.beta <= 8, "model.beta", "a number from 0 (memory) to 8 (base)")
    need(m.token_memory in TOKEN_MEMORIES, "model.token_memory", "one of " + ", ".join(TOKEN_MEMORIES))
    if m.token_memory == "per_layer":
        need(m.table_dim >= 1, "model.table_dim", "at least 1")
        need(m.compute_dim > 0, "model.beta", f"an FFN-C with room for gates of table_dim = {m.table_dim}")
    need(m.compute_input in ("block_input", "after_attention"), "model.compute_input", "block_input or after_attention")
    need(
        m.beta < 8 or m.compute_input == "after_attention", "model.compute_input", "after_attention, as beta 8 is base"
    )
    smallest = 1 if m.beta in (0, 8) else 2
    need(m.ffn_dim >= smallest, "model.ffn_dim", f"at least {smallest}")
    if 0 < m.beta < 8 and m.token_memory == "ffn":
        need(0 < m.memory_dim < m.ffn_dim, "model.ffn_dim", f"room for both FFN-C and FFN-M at beta {m.beta:g}")
    need(config.start.step >= -1, "start.step", "a checkpoint's step, or -1 for the newest")
    need(config.start.memory in ("copy", "new"), "start.memory", "copy or new")
    need(m.norm in ("rmsnorm", "layernorm"), "model.norm", "rmsnorm or layernorm")
    need(m.dtype in ("bfloat16", "float32"), "model.dtype", "bfloat16 or float32")
    need(m.attention in ATTENTION_BACKENDS, "model.attention", "one of " + ", ".join(ATTENTION_BACKENDS))
    need(m.remat in REMAT_POLICIES, "model.remat", "one of " + ", ".join(REMAT_POLICIES))
    need(o.final_lr <= o.peak_lr, "optimizer.final_lr", f"at most optimizer.peak_lr = {o.peak_lr}")
    need(config.batch_size % config.accumulate == 0, "batch_size", f"a multiple of accumulate = {config.accumulate}")
    for field in ("mesh.data", "mesh.fsdp", "mesh.tensor"):
        need(flat[field] >= 1 or flat[field] == -1, field, "a number of parts, or -1 for all remaining devices")
    need(
        [config.mesh.data, config.mesh.fsdp, config.mesh.tensor].count(-1) <= 1,
        "mesh.fsdp",
        "-1 on one axis only (it is -1 unless set)",
    )


def load(path: str) -> ml_collections.ConfigDict:
    """The config of `FILE.py:ARCHITECTURE`, before any override. Raises: UserError."""
    name, _, architecture = path.partition(":")
    if not os.path.isfile(name):
        raise UserError(f"--config={path}: expected FILE.py:ARCHITECTURE, found no file {name}")
    try:
        return runpy.run_path(name)["get_config"](*([architecture] if architecture else []))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--config={path}: cannot be loaded: {type(error).__name__}: {error}") from error


def check_flags(argv: list[str]) -> None:
    """Refuses a missing config file and overrides of unknown fields, which config_flags names too little of.

    Raises: UserError that names the field.
    """
    argv = [re.sub("^--?config$", "--config=", a) for a in argv]
    joined = [a + argv[i + 1] if a == "--config=" and i + 1 < len(argv) else a for i, a in enumerate(argv)]
    configs = [load(a.partition("=")[2]) for a in joined if re.match("--?config=", a)]
    if not configs:
        return
    for argument in argv:
        match = re.match(r"--?(?:no)?config\.([\w.]+)", argument)
        node, seen = configs[-1], "config"
        for name in match[1].split(".") if match else ():
            if not isinstance(node, ml_collections.ConfigDict) or name not in node:
                names = list(node.keys()) if isinstance(node, ml_collections.ConfigDict) else []
                raise UserError(f"{seen}.{name}: no such field{_did_you_mean(name, names)}")
            node, seen = node[name], f"{seen}.{name}"
