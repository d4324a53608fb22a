"""The typed config tree: what each field means, its unit, its range, and the combinations that are refused.

Config files build an `ml_collections.ConfigDict` with `default(architecture)`, so that every field can be
overridden on the command line; `resolve` turns it into the frozen `Config` that the rest of the code reads.
"""

import dataclasses
import math
import re
from collections.abc import Collection

import ml_collections

from memoryllm_jax.common import fields
from memoryllm_jax.common.errors import ArgumentError, UserError, shown
from memoryllm_jax.common.fields import field, flatten, rules

ATTENTION_BACKENDS = ("auto", "plain", "blocked", "cudnn", "splash")
# {what each layer looks up by token id: the name of the architectures that do, as in flex-B or value-B}
TOKEN_MEMORIES = {
    "ffn": "flex",
    "rows": "rows",
    "bigram": "bigram",
    "value": "value",
    "bov": "bov",
    "per_layer": "ple",
    "none": "no-memory",
}

# Whose row a token's layers read: its own, or as controls, which say what the rows' meaning is worth
ROWS = ("own", "permuted", "shared", "frozen")

# {(base width, beta): FFN-M width} from the paper's Table 5, where its rounding follows no rule that could be computed.
# Table 5 swaps beta 1 and 3 of the 1B model; the definition of beta and Table 6 give the order here.
_PAPER_MEMORY_WIDTHS = {
    (4272, 1): 3738,
    (4272, 2): 3200,
    (4272, 3): 2668,
    (5464, 1): 4778,
    (5464, 2): 4096,
    (5464, 3): 3418,
}

# Larger sizes are mistakes or damage: they are refused before memory is allocated for them.
_MOST_LAYERS = 10_000
_MOST_WIDTH = 10_000_000
_MOST_IDS = 2**31 - 1  # ids and positions are int32

TEMPERATURES = "0 (greedy), or from 0.001 to 1000"  # the valid values, for help texts and error messages


def is_temperature(value: float) -> bool:
    """Whether the value is a valid temperature of sampling, as `TEMPERATURES` says."""
    # Outside this range float32 logits overflow, or all differ by less than their rounding.
    return value == 0 or 1e-3 <= value <= 1e3


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture and its sizes, and how the model is computed."""

    dim: int = field(256, least=1, most=_MOST_WIDTH)  # h, the width of the residual stream
    layers: int = field(4, least=1, most=_MOST_LAYERS)
    heads: int = field(8, least=1, most=_MOST_WIDTH)
    # Key-value heads, each for heads / kv_heads query heads; 0: as many as heads
    kv_heads: int = field(0, least=0, most=_MOST_WIDTH)
    # Base width W, the widths of FFN-C and FFN-M together; by default 8/3 of dim
    ffn_dim: int = field(688, least=1, most=_MOST_WIDTH)
    vocab_size: int = field(0, least=0, most=_MOST_IDS)  # number of token ids; 0: that of the prepared data
    beta: float = field(0.0, least=0, most=8)  # FFN-C holds beta of the FFN's 8 h^2 parameters: 0 is memory, 8 is base
    # What each layer looks up by token id. ffn: the output of FFN-M. The others are baselines. rows: an embedding that
    # is added to the residual stream; bigram: such an embedding of the token and the one before; value: an embedding
    # that is added to the values of attention; bov (Bank of Values): one that the last third of the layers has in place
    # of these values; per_layer: one that the residual stream gates, as in Gemma 3n; none: nothing, so that FFN-C is
    # alone
    token_memory: str = field("ffn", choices=tuple(TOKEN_MEMORIES))
    # Controls of the token memory. own: a token reads its own row; permuted: that of another token, by a fixed
    # permutation of the ids; shared: all tokens read the row of id 0; frozen: rows are drawn at random by id, and no
    # parameters make them (model/memories.py)
    rows: str = field("own", choices=ROWS)
    table_dim: int = field(32, most=_MOST_WIDTH)  # width P of per_layer's embeddings; by default an eighth of dim
    # FFN-C reads X_l (block_input) or X_l + Attn (after_attention)
    compute_input: str = field("block_input", choices=("block_input", "after_attention"))
    norm: str = field("rmsnorm", choices=("rmsnorm", "layernorm"))  # both with a scale only: the model has no biases
    norm_eps: float = field(1e-5, above=0)
    rope_theta: float = field(10_000.0, above=0)  # not given in the paper; Llama 2's value, for 2,048 tokens
    # linear divides all frequencies by rope_factor, llama3 only the low ones
    rope_scaling: str = field("none", choices=("none", "linear", "llama3"))
    rope_factor: float = field(1.0, above=0)
    # llama3: frequencies with fewer turns than low_freq_factor in the original context are divided by rope_factor,
    # those with more turns than high_freq_factor stay as they are, and those between are interpolated
    rope_low_freq_factor: float = field(1.0, above=0)
    rope_high_freq_factor: float = 4.0
    rope_original_context: int = field(8192, above=0)  # tokens
    tie_embeddings: bool = False  # one table for input and output
    # Normalise each head's queries and keys before the rotary embedding, as Qwen3 does
    qk_norm: bool = False
    # Soft cap c: logits become c tanh(logits / c), as in Gemma 2; 0: they stay as they are
    logit_softcap: float = field(0.0, least=0)
    init_std: float = field(0.02, above=0)  # not given in the paper; output projections: init_std / sqrt(2 layers)
    dtype: str = field("bfloat16", choices=("bfloat16", "float32"))  # of the computation; parameters are float32
    # auto: splash on TPU, cudnn on NVIDIA in bfloat16, else blocked
    attention: str = field("auto", choices=ATTENTION_BACKENDS, resumable=True)
    # What the backward pass recomputes: none, dots (all but matrix products and attention) or full (everything)
    remat: str = field("dots", choices=("none", "dots", "full"), resumable=True)
    # Tokens of a batch shard whose logits are in memory at the same time
    loss_chunk: int = field(4096, least=1, resumable=True)
    # Dtype in which devices sum the gradients of weight matrices: compute (that of the computation) or float32, which
    # sends twice the bytes and is exact where the sum over many devices in bfloat16 is not (docs/performance.md)
    reduce_dtype: str = field("compute", choices=("compute", "float32"), resumable=True)
    # Compute the token memory once for each distinct token of a batch; False: at every position, for comparison
    unique_tokens: bool = field(True, resumable=True)

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def key_heads(self) -> int:
        """Number of key-value heads."""
        return self.kv_heads or self.heads

    @property
    def memory_dim(self) -> int:
        """FFN-M width; 0 without FFN-M."""
        return self._flex_memory_dim if self.token_memory == "ffn" and self.rows != "frozen" else 0

    @property
    def compute_dim(self) -> int:
        """FFN-C width. The baselines have that of flex-B, so that they have equally many active parameters."""
        width = self.ffn_dim - self._flex_memory_dim
        if self.token_memory == "per_layer":
            # The gate's two matrices, h x P, are active parameters too: as many as an FFN (three matrices) of width
            # 2 P / 3 has. FFN-C gives up that width, rounded to a multiple of 8.
            width -= 8 * round(self.table_dim / 12)
        if self.token_memory == "bov":
            # W_V of the last third of the layers, h x E each, is left out: it has as many parameters as an FFN of width
            # E / 3. FFN-C gets that width, in all layers alike, rounded to a multiple of 8.
            width += 8 * round(self.row_dim * len(self.row_layers) / (24 * self.layers))
        return width

    @property
    def _flex_memory_dim(self) -> int:
        """FFN-M width of flex-B: (8 - B) / 8 of the base width, or the paper's width for a size of its Table 5."""
        if self.beta == 0:
            return self.ffn_dim
        if self.beta == 8:
            return 0
        multiple_of_8 = 8 * round(self.ffn_dim * (8 - self.beta) / 64)
        return _PAPER_MEMORY_WIDTHS.get((self.ffn_dim, self.beta), multiple_of_8)

    @property
    def matrix_parameters(self) -> int:
        """Parameters of attention and FFNs in base of these sizes, which `Config.tokens_per_parameter` multiplies.

        All architectures of a size have the same, so that they train on equally many tokens. Embedding, head, norms and
        the baselines' tables are not counted.
        """
        attention = 2 * self.dim * (self.heads + self.key_heads) * self.head_dim
        return self.layers * (attention + 3 * self.dim * self.ffn_dim)

    @property
    def row_dim(self) -> int:
        """Width of the vector that a layer looks up for a token; 0: it looks up nothing."""
        if self.token_memory in ("value", "bov"):
            return self.key_heads * self.head_dim
        if self.token_memory == "per_layer":
            return self.table_dim
        adds_rows = self.token_memory in ("rows", "bigram") or (
            self.token_memory == "ffn" and self._flex_memory_dim > 0
        )
        return self.dim if adds_rows else 0

    @property
    def row_layers(self) -> range:
        """The layers that look up a vector: the last third of the layers in bov-B, else all layers or none."""
        if not self.row_dim:
            return range(0)
        # Rounded as in the paper's code: two of 4 layers, and 4 of 12.
        first = 2 * self.layers // 3 if self.token_memory == "bov" else 0
        return range(first, self.layers)

    @property
    def architecture(self) -> str:
        """The name that `parse_architecture` reads, after which controls are named: "flex-3 with permuted rows"."""
        name = f"{TOKEN_MEMORIES.get(self.token_memory)}-{self.beta:g}"
        if self.token_memory == "ffn" and self.beta in (0, 8):
            name = "memory" if self.beta == 0 else "base"
        return name if self.rows == "own" else f"{name} with {self.rows} rows"


@dataclasses.dataclass(frozen=True)
class StartConfig:
    """The model whose parameters a run starts from."""

    # Workdir of a trained or imported model; "": start from random parameters. base is converted to memory or flex-B
    workdir: str = ""
    step: int = field(-1, least=-1)  # step of the checkpoint; -1: the newest
    # new: moments and step begin at zero; continue: the run goes on from the checkpoint's moments, step and place in
    # the data, so that a decay branches off the stable part of another run
    optimizer: str = field("new", choices=("new", "continue"))
    # Token memory of a converted model: FFN-M as a copy of base's FFN (copy), random (new), or fitted to what base's
    # layers add for each token on average (distill); or rows of zeros beside base's whole FFNs, so that the model
    # begins as base (zero)
    memory: str = field("copy", choices=("copy", "new", "distill", "zero"), only_with="start.workdir")
    # Tokens of text that FFN-M is fitted on: the first ones of the run, which then trains on them too
    distill_tokens: float = field(1e6, above=0, only_with="start.memory=distill")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The training text and how it is read."""

    # A folder that `prepare` wrote, or its URL; several, separated by commas, are one stream in this order;
    # FOLDER:WEIGHT,FOLDER:WEIGHT is a mixture in which sequences come from the folders in proportion to the weights;
    # embedded: Python's own texts, which are prepared in the workdir
    path: str = field("embedded", resumable=True)
    # Passes over the training tokens at most, in a mixture over those of each source; a run that needs more is refused
    epochs: int = field(1, least=1, resumable=True)
    # Keep attention inside a document, with positions that start anew in each
    document_mask: bool = False
    # Check the checksums of all file shards before training; each host checks its share, and the workdir remembers it
    verify: bool = field(True, resumable=True)
    threads: int = field(4, least=1, resumable=True)  # reader threads of each host
    prefetch: int = field(4, least=1, resumable=True)  # batches read ahead


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its schedule. The defaults are those of the paper's Table 3, as far as it goes."""

    # Parameters that are trained: all, or those of the token memory alone; the others stay as they are
    train: str = field("all", choices=("all", "memory"))
    # muon: Muon for the matrices of the layers, AdamW for the other parameters
    name: str = field("adamw", choices=("adamw", "muon"))
    # After the warm-up: cosine (down to final_lr), wsd (peak_lr, then down to final_lr) or constant (peak_lr)
    schedule: str = field("cosine", choices=("cosine", "wsd", "constant"))
    # Share of the run's steps, the last ones, in which wsd decays
    decay_share: float = field(0.2, above=0, below=1, only_with="optimizer.schedule=wsd")
    peak_lr: float = field(1e-4, above=0)
    final_lr: float = field(1e-5, least=0)
    warmup_steps: int = field(5000, least=0)
    b1: float = field(0.9, least=0, below=1)
    b2: float = field(0.95, least=0, below=1)
    eps: float = field(1e-8, above=0)
    weight_decay: float = field(0.1, least=0)  # of matrices; norm scales have none
    clip_norm: float = field(1.0, above=0)  # largest global norm of the gradient; not given in the paper
    z_loss: float = field(1e-6, least=0)  # weight of the squared log-partition function
    # Muon's own peak rate, momentum and weight decay; AdamW's parameters keep the fields above
    muon_lr: float = field(0.02, above=0, only_with="optimizer.name=muon")
    muon_momentum: float = field(0.95, least=0, below=1, only_with="optimizer.name=muon")
    muon_weight_decay: float = field(0.1, least=0, only_with="optimizer.name=muon")
    # Steps that a run may skip because their loss or gradient norm is not finite or a spike; one more ends the run
    max_skipped: int = field(0, least=0, resumable=True)
    # A spike is more than this many standard deviations above the mean of the last 128 applied steps; 0: only what is
    # not finite is skipped
    spike_deviations: float = field(0.0, least=0, only_with="optimizer.max_skipped")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh. One axis may be -1: all remaining devices."""

    data: int = field(1, resumable=True)  # replicas of the model, each on a part of the batch
    fsdp: int = field(-1, resumable=True)  # parts that parameters and batch are split into
    tensor: int = field(1, resumable=True)  # parts that heads, FFN widths and vocabulary are split into


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are saved, and which are kept."""

    every: int = field(1000, least=1, resumable=True)  # steps between checkpoints; the last step is always saved
    keep: int = field(3, least=1, resumable=True)  # number of newest checkpoints that are kept
    # Checkpoints of steps that are multiples of this are never removed; 0: none
    keep_every: int = field(0, least=0, resumable=True)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """When a run is evaluated on held-out text, and on how much of it."""

    every: int = field(1000, least=1, resumable=True)  # steps between evaluations; the last step is always evaluated
    # Held-out batches, divided among the sources of a mixture; 0: all of the validation split
    batches: int = field(0, least=0, resumable=True)
    # Tasks of the evaluation harness, separated by commas, that are run while the model trains; "": none
    tasks: str = field("", resumable=True)
    # Folder with task files (.yaml) and data of the tasks; "": the harness's own tasks, which fetch their data
    tasks_folder: str = field("", resumable=True, only_with="eval.tasks")
    # Steps between runs of the tasks; 0: after the last step only
    tasks_every: int = field(0, least=0, resumable=True, only_with="eval.tasks")
    tasks_limit: int = field(0, least=0, resumable=True, only_with="eval.tasks")  # examples of each task; 0: all


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Where metrics are written, and how often."""

    every: int = field(10, least=1, resumable=True)  # steps between lines of metrics
    tensorboard: bool = field(True, resumable=True)
    wandb: bool = field(False, resumable=True)
    trackio: bool = field(False, resumable=True)
    # Steps between records of each layer's norms: of its gradients, and of what attention, FFN-C and FFN-M add to the
    # residual stream; 0: none
    norms_every: int = field(0, least=0, resumable=True)
    # Peak FLOP/s of one device, for MFU; 0: look them up by the device's name
    peak_flops: float = field(0.0, least=0, resumable=True)


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """A text that is sampled at the end of the run and, if asked for, while it trains."""

    # Steps between samples; 0: at the end only
    every: int = field(0, least=0, resumable=True, only_with="sample.tokens")
    tokens: int = field(0, least=0, resumable=True)  # length of the text; 0: sample none
    prompt: str = field("", resumable=True)
    temperature: float = field(0.8, least=0, resumable=True)


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that a training run depends on."""

    seed: int = field(0, least=0)
    steps: int = field(100_000, least=1)  # optimizer steps
    # The length of the run in tokens, or in tokens for each of model.matrix_parameters: `resolve` sets steps, rounded
    # up. 0: not given. They may change on resume because steps may not.
    tokens: float = field(0.0, least=0, resumable=True)
    tokens_per_parameter: float = field(0.0, least=0, resumable=True)
    batch_size: int = field(512, least=1, most=_MOST_IDS)  # sequences of one optimizer step, over all devices
    accumulate: int = field(1, least=1, resumable=True)  # micro-batches that the batch of a step is split into
    seq_len: int = field(2048, least=2, most=_MOST_IDS)  # tokens
    # Compiler options: default, or overlap, with which GPUs gather the weights of the next layer while they compute one
    xla: str = field("default", choices=("default", "overlap"), resumable=True)
    model: ModelConfig = ModelConfig()
    start: StartConfig = StartConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    sample: SampleConfig = SampleConfig()

    @property
    def decay_begins(self) -> int:
        """Steps that are done when the learning rate begins to fall; `steps` if it does not fall."""
        o = self.optimizer
        if o.schedule == "cosine":
            return o.warmup_steps
        if o.schedule == "constant":
            return self.steps
        # Rounded down, but for a share that is a rounding error below a whole number of steps
        return self.steps - max(1, math.floor(o.decay_share * self.steps + 1e-6))


RULES = dict(rules(Config))
RESUMABLE_FIELDS = frozenset(name for name, rule in RULES.items() if rule.resumable)


def parse_architecture(name: str, argument: str = "config") -> tuple[str, float]:
    """The fields (token_memory, beta) of an architecture, by its name.

    Args:
      name: base, memory or flex-B, or one of the baselines, such as rows-B. Baselines have as many active parameters as
        flex-B, and replace FFN-M as `ModelConfig.token_memory` says.
      argument: name of the argument that the name comes from.
    Raises: ArgumentError that names the argument.
    """
    if name == "base":
        return "ffn", 8.0
    if name == "memory":
        return "ffn", 0.0
    for token_memory, label in TOKEN_MEMORIES.items():
        match = re.fullmatch(rf"{label}-(\d+(?:\.\d+)?)", name)
        if match:
            beta = float(match[1])
            # flex-0 and flex-8 have names of their own: memory and base.
            if 0 < beta < 8 or (beta <= 8 and token_memory != "ffn"):
                return token_memory, beta
    *baselines, last = [f"{label}-B" for token_memory, label in TOKEN_MEMORIES.items() if token_memory != "ffn"]
    raise ArgumentError(
        argument,
        "expected the architecture base, memory or flex-B with B between 0 and 8, or one of the baselines "
        f"{', '.join(baselines)} and {last}, found {name!r}",
    )


def default(architecture: str) -> ml_collections.ConfigDict:
    """The config of an architecture with every other field at its default. Config files start from it.

    Raises: ArgumentError for an unknown architecture.
    """
    config = ml_collections.ConfigDict(dataclasses.asdict(Config()))
    m = config.model
    m.token_memory, m.beta = parse_architecture(architecture)
    has_memory = m.token_memory == "ffn" and m.beta < 8
    m.compute_input = "block_input" if has_memory else "after_attention"
    # Lazy references, so that --config.model.dim=64 changes these two as well. ffn_dim is 8/3 of dim, rounded up to a
    # multiple of 8, which gives an FFN 8 dim^2 parameters.
    m.ffn_dim = (m.get_ref("dim") * 8 + 23) // 24 * 8
    m.table_dim = (m.get_ref("dim") + 7) // 8
    return config


def resolve(config: ml_collections.ConfigDict | dict, given: Collection[str] = ()) -> Config:
    """Turns the tree of a config file into the frozen, validated `Config` of a run, whose `steps` are its length.

    Args:
      config: the tree, with the fields that the command line overrides.
      given: dotted names of these fields. Of steps, tokens and tokens_per_parameter, the one among them counts.
    Raises: UserError that names the field.
    """
    tree = _values(config) if isinstance(config, ml_collections.ConfigDict) else config
    resolved = fields.build(Config, tree, "config")
    validate(resolved)
    fields.check_used(resolved, "config")
    resolved = _with_steps(resolved, given)
    _check_schedule(resolved)
    _check_distillation(resolved)
    return resolved


def _values(config: ml_collections.ConfigDict) -> dict:
    """The tree with the values of fields that follow from others. Raises: UserError if one cannot be computed."""
    try:
        return config.to_dict()
    except (ArithmeticError, ValueError) as error:  # such as a batch of 0 sequences, or a share that is not a number
        problem = "expected values from which other fields can be computed"
        raise UserError(f"config: {problem}, found one with which they cannot: {error}") from error


def _with_steps(config: Config, given: Collection[str]) -> Config:
    """The config with the steps that `tokens` or `tokens_per_parameter` ask for. Raises: UserError."""
    asked = [name for name in ("steps", "tokens", "tokens_per_parameter") if name in given]
    if not asked:
        asked = [name for name in ("tokens", "tokens_per_parameter") if getattr(config, name)]
    if len(asked) > 1:
        raise UserError(f"config.{asked[1]}: expected one length of the run, found config.{asked[0]} beside it")
    if asked:
        # The command line goes before the config file.
        dropped = {"tokens", "tokens_per_parameter"} - set(asked)
        config = dataclasses.replace(config, **dict.fromkeys(dropped, 0.0))
    tokens = config.tokens or config.tokens_per_parameter * config.model.matrix_parameters
    if not tokens:
        return config
    return dataclasses.replace(config, steps=math.ceil(tokens / (config.batch_size * config.seq_len)))


def from_saved(tree: dict) -> Config:
    """The `Config` saved in a checkpoint. Fields that did not exist when it was saved get their defaults.

    Schedules that `resolve` refuses are accepted, as earlier versions trained with them, and so are unused fields.
    Raises: UserError that names a field that is unknown, or has a value of the wrong type or out of its range.
    """
    saved = fields.build(Config, tree, "config")
    validate(saved)
    return saved


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
        for name in ("sample.tokens", "eval.tasks"):
            need(not flatten(config)[name], name, "its default, as bigram-B can only be trained and score text")
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
