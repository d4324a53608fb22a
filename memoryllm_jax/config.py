"""The typed config tree: what each field means, its unit, its range, and the combinations that are refused.

Config files build an `ml_collections.ConfigDict` with `default(architecture)`, so that every field can be
overridden on the command line; `resolve` turns it into the frozen `Config` that the rest of the code reads.
"""

import dataclasses
import difflib
import math
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import ml_collections

from memoryllm_jax.common.errors import ArgumentError, UserError

ATTENTION_BACKENDS = ("auto", "plain", "blocked", "cudnn", "splash")
# What a layer reads by token id, and the name of the architectures that do: flex-B, value-B, ...
TOKEN_MEMORIES = {"ffn": "flex", "value": "value", "per_layer": "ple", "none": "no-memory"}

# FFN-M widths of the paper's Table 5 that `ModelConfig` cannot compute, as the paper rounded them by hand:
# (base width, beta) -> FFN-M width.
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
class Rule:
    """What a field says of itself beside its type and default.

    Attributes:
      least, most, above, below: bounds of a number; `above` and `below` are not themselves taken.
      choices: the only texts taken, if there are such.
      resumable: whether a run that goes on from a checkpoint may change the field. These fields decide where and how
        fast a run trains, not what it trains.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    resumable: bool = False

    def takes(self, value) -> bool:
        if self.choices and value not in self.choices:
            return False
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def expected(self) -> str:
        """The values taken, as an error names them."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        bounds = {
            "at least": self.least,
            "at most": self.most,
            "more than": self.above,
            "less than": self.below,
        }
        return " and ".join(f"{words} {bound:g}" for words, bound in bounds.items() if bound is not None)


def field(default, **rule):
    """A field with the `Rule` of these keywords."""
    return dataclasses.field(default=default, metadata={"rule": Rule(**rule)})


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    dim: int = field(256, least=1)  # h, the width of the residual stream
    layers: int = field(4, least=1)
    heads: int = field(8, least=1)
    kv_heads: int = field(0, least=0)  # key-value heads, each for heads / kv_heads query heads; 0: as many as heads
    ffn_dim: int = field(688, least=1)  # base width W; FFN-C and FFN-M share it. Follows dim (8/3 h, a multiple of 8)
    vocab_size: int = field(0, least=0)  # token ids; 0: that of the prepared data
    beta: float = field(0.0, least=0, most=8)  # FFN-C holds beta of the FFN's 8 h^2 parameters: 0 is memory, 8 is base
    # What a layer reads of the token's id: ffn (FFN-M) or, to compare with, a table's embedding: value (added to the
    # values of attention), per_layer (gated by the residual stream, as in Gemma 3n); none: FFN-C alone
    token_memory: str = field("ffn", choices=tuple(TOKEN_MEMORIES))
    table_dim: int = 32  # width P of per_layer's embeddings; follows dim (an eighth)
    # FFN-C reads X_l (block_input) or X_l + Attn (after_attention)
    compute_input: str = field("block_input", choices=("block_input", "after_attention"))
    norm: str = field("rmsnorm", choices=("rmsnorm", "layernorm"))  # both with a scale only: the model has no biases
    norm_eps: float = field(1e-5, above=0)
    rope_theta: float = field(10_000.0, above=0)  # not given in the paper; Llama 2's value, for 2,048 tokens
    # linear scales all frequencies by rope_factor, llama3 the low ones
    rope_scaling: str = field("none", choices=("none", "linear", "llama3"))
    rope_factor: float = field(1.0, above=0)
    rope_low_freq_factor: float = field(1.0, above=0)  # llama3: fewer turns in the original context are scaled fully
    rope_high_freq_factor: float = 4.0  # llama3: more turns than this in the original context are not scaled
    rope_original_context: int = field(8192, above=0)  # tokens
    tie_embeddings: bool = False  # one table for input and output
    init_std: float = field(0.02, above=0)  # not given in the paper; output projections: init_std / sqrt(2 layers)
    dtype: str = field("bfloat16", choices=("bfloat16", "float32"))  # of the computation; parameters are float32
    # auto: splash on TPU, cudnn on NVIDIA in bfloat16, else blocked
    attention: str = field("auto", choices=ATTENTION_BACKENDS, resumable=True)
    # What the backward pass recomputes: none, dots (all but matrix products and attention), full
    remat: str = field("dots", choices=("none", "dots", "full"), resumable=True)
    loss_chunk: int = field(4096, least=1, resumable=True)  # tokens a batch shard whose logits exist at one time
    # Compute each distinct token of a batch once; False: compute every position, to compare with
    unique_tokens: bool = field(True, resumable=True)

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def key_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def memory_dim(self) -> int:
        """FFN-M width."""
        return self._flex_memory_dim if self.token_memory == "ffn" else 0

    @property
    def compute_dim(self) -> int:
        """FFN-C width. The architectures to compare with have flex-B's, so that active parameters are as many."""
        width = self.ffn_dim - self._flex_memory_dim
        if self.token_memory == "per_layer":
            # The gates are active too: two matrices of width P hold as much as an FFN, of three, of width 2 P / 3.
            width -= 8 * round(self.table_dim / 12)
        return width

    @property
    def _flex_memory_dim(self) -> int:
        """FFN-M width of flex-B: (8 - B) / 8 of the base width, or what the paper's Table 5 has for its sizes."""
        if self.beta == 0:
            return self.ffn_dim
        if self.beta == 8:
            return 0
        multiple_of_8 = 8 * round(self.ffn_dim * (8 - self.beta) / 64)
        return _PAPER_MEMORY_WIDTHS.get((self.ffn_dim, self.beta), multiple_of_8)

    @property
    def row_dim(self) -> int:
        """Width of what a layer reads of a token; 0: nothing."""
        if self.token_memory == "value":
            return self.key_heads * self.head_dim
        if self.token_memory == "per_layer":
            return self.table_dim
        return self.dim if self.memory_dim else 0

    @property
    def architecture(self) -> str:
        """The name that `parse_architecture` reads."""
        if self.token_memory == "ffn" and self.beta == 0:
            return "memory"
        if self.token_memory == "ffn" and self.beta == 8:
            return "base"
        return f"{TOKEN_MEMORIES.get(self.token_memory)}-{self.beta:g}"


@dataclasses.dataclass(frozen=True)
class StartConfig:
    workdir: str = ""  # trained or imported model to start from, converted if that is base and this is not; "": none
    step: int = field(-1, least=-1)  # its checkpoint; -1: the newest
    # FFN-M of a converted model: copy (base's FFN) or new (initialised)
    memory: str = field("copy", choices=("copy", "new"))


@dataclasses.dataclass(frozen=True)
class DataConfig:
    # A folder that `prepare` wrote, or its URL; embedded: Python's own texts, in the workdir
    path: str = field("embedded", resumable=True)
    # Passes over the training tokens that may be made; a run that needs more is refused
    epochs: int = field(1, least=1, resumable=True)
    verify: bool = field(True, resumable=True)  # check every shard's checksum before training, each host its share
    threads: int = field(4, least=1, resumable=True)  # reader threads a host
    prefetch: int = field(4, least=1, resumable=True)  # batches read ahead


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    peak_lr: float = field(1e-4, above=0)
    final_lr: float = field(1e-5, least=0)
    warmup_steps: int = field(5000, least=0)
    b1: float = field(0.9, least=0, below=1)
    b2: float = field(0.95, least=0, below=1)
    eps: float = field(1e-8, above=0)
    weight_decay: float = field(0.1, least=0)  # on matrices; norms have none
    clip_norm: float = field(1.0, above=0)  # global norm of the gradient; not given in the paper
    z_loss: float = field(1e-6, least=0)  # weight of the squared log-partition


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Parts along each axis; -1: all remaining devices, on one axis."""

    data: int = field(1, resumable=True)  # replicas of the model
    fsdp: int = field(-1, resumable=True)  # parts that parameters and batch are split into
    tensor: int = field(1, resumable=True)  # parts that heads, FFN widths and vocabulary are split into


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int = field(1000, least=1, resumable=True)  # steps; the last step is always saved
    keep: int = field(3, least=1, resumable=True)  # newest checkpoints kept
    keep_every: int = field(0, least=0, resumable=True)  # steps; checkpoints at multiples are kept for good; 0: none


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    every: int = field(1000, least=1, resumable=True)  # steps; the last step is always evaluated
    batches: int = field(0, least=0, resumable=True)  # held-out batches; 0: all of the held-out split


@dataclasses.dataclass(frozen=True)
class LogConfig:
    every: int = field(10, least=1, resumable=True)  # steps between lines of metrics
    tensorboard: bool = field(True, resumable=True)
    wandb: bool = field(False, resumable=True)
    peak_flops: float = field(0.0, least=0, resumable=True)  # FLOP/s of one device, for MFU; 0: by the device's name


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    tokens: int = field(0, least=0, resumable=True)  # length of the text sampled at the end; 0: none
    prompt: str = field("", resumable=True)
    temperature: float = field(0.8, least=0, resumable=True)


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = field(0, least=0)
    steps: int = field(100_000, least=1)  # optimizer steps
    batch_size: int = field(512, least=1)  # sequences, global, per optimizer step
    accumulate: int = field(1, least=1, resumable=True)  # micro-batches that one optimizer step's batch is split into
    seq_len: int = field(2048, least=2)  # tokens
    model: ModelConfig = ModelConfig()
    start: StartConfig = StartConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    sample: SampleConfig = SampleConfig()


def _rules(group: type, prefix: str = "") -> Iterator[tuple[str, Rule]]:
    """("model.dim", its Rule), ... of all fields."""
    for f in dataclasses.fields(group):
        if dataclasses.is_dataclass(f.type):
            yield from _rules(f.type, f"{f.name}.")
        else:
            yield prefix + f.name, f.metadata.get("rule", Rule())


RULES = dict(_rules(Config))
RESUMABLE_FIELDS = frozenset(name for name, rule in RULES.items() if rule.resumable)


def parse_architecture(name: str) -> tuple[str, float]:
    """(token_memory, beta) of `base`, `memory`, `flex-B`, or `value-B`, `ple-B`, `no-memory-B`. Raises: UserError.

    The last three have flex-B's attention and FFN-C, and in place of FFN-M what TOKEN_MEMORIES says.
    """
    if name == "base":
        return "ffn", 8.0
    if name == "memory":
        return "ffn", 0.0
    for token_memory, label in TOKEN_MEMORIES.items():
        match = re.fullmatch(rf"{label}-(\d+(?:\.\d+)?)", name)
        if match:
            beta = float(match[1])
            # flex-0 and flex-8 are called memory and base.
            if 0 < beta < 8 or (beta <= 8 and token_memory != "ffn"):
                return token_memory, beta
    raise UserError(
        f"architecture {name!r}: expected base, memory, or flex-B with B between 0 and 8; or, to compare with, "
        "value-B, ple-B or no-memory-B"
    )


def default(architecture: str) -> ml_collections.ConfigDict:
    """A config with every field at its default, for config files to change. Raises: UserError."""
    config = ml_collections.ConfigDict(dataclasses.asdict(Config()))
    m = config.model
    m.token_memory, m.beta = parse_architecture(architecture)
    has_memory = m.token_memory == "ffn" and m.beta < 8
    m.compute_input = "block_input" if has_memory else "after_attention"
    # References, so that an overridden dim changes them too.
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
    """The tree that a checkpoint holds; fields that it does not have get their defaults.

    Raises: UserError that names a field that is unknown or of another type.
    """
    return _build(Config, tree, "config")


def flatten(config: Config) -> dict[str, object]:
    """{"model.dim": 256, ...}"""
    out = {}
    for name, value in dataclasses.asdict(config).items():
        if isinstance(value, dict):
            out.update({f"{name}.{key}": inner for key, inner in value.items()})
        else:
            out[name] = value
    return out


def _build(group, tree, path):
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a group of fields, found {tree!r}")
    types = {f.name: f.type for f in dataclasses.fields(group)}
    values = {}
    for name, value in tree.items():
        if name not in types:
            raise UserError(f"{path}.{name}: no such field{_did_you_mean(name, types)}")
        kind = types[name]
        if dataclasses.is_dataclass(kind):
            values[name] = _build(kind, value, f"{path}.{name}")
        elif kind is float and type(value) is int:
            values[name] = float(value)
        elif type(value) is kind and not (kind is float and not math.isfinite(value)):
            values[name] = value
        else:
            raise UserError(f"{path}.{name}: expected {kind.__name__}, found {value!r}")
    return group(**values)


def _did_you_mean(name, names):
    close = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(names) or 'none below it'}"


def validate(config: Config) -> None:
    """Refuses impossible values and combinations. Raises: UserError that names the field."""
    values = flatten(config)

    def need(condition: bool, name: str, expected: str) -> None:
        if not condition:
            raise UserError(f"config.{name}: expected {expected}, found {values[name]!r}")

    for name, rule in RULES.items():
        need(rule.takes(values[name]), name, rule.expected())
    _check_attention(config.model, need)
    _check_ffn(config.model, need)
    _check_run(config, need)


def _check_attention(m: ModelConfig, need) -> None:
    need(m.dim % m.heads == 0, "model.heads", f"a divisor of model.dim = {m.dim}")
    need(m.heads % m.key_heads == 0, "model.kv_heads", f"a divisor of model.heads = {m.heads}, or 0")
    # RoPE turns pairs of a head's components.
    need(m.head_dim % 2 == 0, "model.heads", f"an even head size (model.dim / heads = {m.dim} / {m.heads})")
    need(
        m.rope_low_freq_factor < m.rope_high_freq_factor,
        "model.rope_low_freq_factor",
        f"less than rope_high_freq_factor = {m.rope_high_freq_factor}",
    )


def _check_ffn(m: ModelConfig, need) -> None:
    if m.token_memory == "per_layer":
        need(m.table_dim >= 1, "model.table_dim", "at least 1")
        need(m.compute_dim > 0, "model.beta", f"an FFN-C with room for gates of table_dim = {m.table_dim}")
    if m.beta == 8:
        need(m.compute_input == "after_attention", "model.compute_input", "after_attention, as beta 8 is base")
    if 0 < m.beta < 8:
        need(m.ffn_dim >= 2, "model.ffn_dim", "at least 2")
        if m.token_memory == "ffn":
            need(0 < m.memory_dim < m.ffn_dim, "model.ffn_dim", f"room for both FFN-C and FFN-M at beta {m.beta:g}")


def _check_run(config: Config, need) -> None:
    o, temperature = config.optimizer, config.sample.temperature
    need(temperature == 0 or 1e-3 <= temperature <= 1e3, "sample.temperature", "0 (greedy), or from 0.001 to 1000")
    need(o.final_lr <= o.peak_lr, "optimizer.final_lr", f"at most optimizer.peak_lr = {o.peak_lr}")
    need(config.batch_size % config.accumulate == 0, "batch_size", f"a multiple of accumulate = {config.accumulate}")
    parts = dataclasses.asdict(config.mesh)
    for axis, size in parts.items():
        need(size >= 1 or size == -1, f"mesh.{axis}", "a number of parts, or -1 for all remaining devices")
    need(list(parts.values()).count(-1) <= 1, "mesh.fsdp", "-1 on one axis only (it is -1 unless set)")


def _installed() -> Path:
    """The folder of the config files that travel with the package: inside it where installed, beside it in a clone."""
    package = Path(__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def locate(path: str) -> str:
    """`FILE.py:ARCHITECTURE` with the place where FILE is found.

    `configs/NAME.py` is looked for in the current folder, and then among the files that travel with the package.
    Raises: ArgumentError that names both places.
    """
    name, colon, architecture = path.partition(":")
    if Path(name).is_file():
        return path
    installed = _installed() / Path(name).name
    if Path(name).parent == Path("configs") and installed.is_file():
        return f"{installed}{colon}{architecture}"
    known = ", ".join(f"configs/{file.name}" for file in sorted(_installed().glob("*.py")))
    raise ArgumentError(
        "config",
        f"expected FILE.py:ARCHITECTURE, found no file {name} in {Path.cwd()}; the package's own, in "
        f"{_installed().parent}, are {known}",
    )


def load(path: str) -> ml_collections.ConfigDict:
    """The config of `FILE.py:ARCHITECTURE`, before any override. Raises: UserError."""
    name, _, architecture = locate(path).partition(":")
    arguments = [architecture] if architecture else []
    try:
        return runpy.run_path(name)["get_config"](*arguments)
    except UserError:
        raise
    except Exception as error:
        problem = f"expected a file whose get_config() returns a config, found {path}: {type(error).__name__}: {error}"
        raise ArgumentError("config", problem) from error


def check_flags(argv: list[str]) -> list[str]:
    """The arguments with the place where each config file is found.

    Refuses missing files and overrides of unknown fields here, as the messages of config_flags do not name them.
    Raises: UserError that names the field.
    """
    argv = list(argv)
    config = None
    for at, argument in enumerate(argv):
        if match := re.fullmatch("(--?config=)(.*)", argument):
            argv[at], config = match[1] + locate(match[2]), load(match[2])
        elif re.fullmatch("--?config", argument) and at + 1 < len(argv):
            argv[at + 1], config = locate(argv[at + 1]), load(argv[at + 1])
    for argument in argv:
        match = re.match(r"--?(?:no)?config\.([\w.]+)", argument)
        if match and config is not None:
            _check_field(config, match[1])
    return argv


def _check_field(config: ml_collections.ConfigDict, path: str) -> None:
    """Raises: UserError if the config has no field `model.dim`."""
    node, seen = config, "config"
    for name in path.split("."):
        names = list(node.keys()) if isinstance(node, ml_collections.ConfigDict) else []
        if name not in names:
            raise UserError(f"{seen}.{name}: no such field{_did_you_mean(name, names)}")
        node, seen = node[name], f"{seen}.{name}"
