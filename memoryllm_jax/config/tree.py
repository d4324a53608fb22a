"""The typed config tree: what each field means, its unit and its range."""

import dataclasses
import math

from memoryllm_jax.common.fields import field, rules

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
        of_values = self.key_heads * self.head_dim
        widths = {
            "ffn": self.dim if self._flex_memory_dim else 0,
            "rows": self.dim,
            "bigram": self.dim,
            "value": of_values,
            "bov": of_values,
            "per_layer": self.table_dim,
            "none": 0,
        }
        return widths[self.token_memory]

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
