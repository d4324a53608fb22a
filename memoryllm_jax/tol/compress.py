"""The compression options of a ToL file, and the file that they lead to."""

import dataclasses
import math

import jax
import numpy as np
from absl import flags

from memoryllm_jax import config
from memoryllm_jax.checkpoint.trained import TrainedModel
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.legacy import size
from memoryllm_jax.data import statistics
from memoryllm_jax.data.dataset import open_for
from memoryllm_jax.model import sharding
from memoryllm_jax.tol import budget, build
from memoryllm_jax.tol import budget as budget_lib
from memoryllm_jax.tol.codec import FLOATS, INTEGERS, Band, Part
from memoryllm_jax.tol.layout import Layout, Tier

flags.disclaim_key_flags()  # they are the command's: its --help lists them


@dataclasses.dataclass(frozen=True)
class Options:
    """bits, rank: "DEFAULT" or "DEFAULT,LAYER:VALUE,..."; drop_layers: layer numbers; sizes as `size` reads them."""

    bits: str = ""
    rank: str = "1.0"
    drop_layers: tuple[str, ...] = ()
    bytes_per_token: str = ""
    total_size: str = ""
    data: str = ""


def define_flags() -> None:
    flags.DEFINE_string(
        "bits",
        "",
        "bits of an element: 32, 16 or 2 to 8; for some layers otherwise as 4,0:8,23:16; by default those of the "
        "computation (32 or 16). An embedding that is stored (x0) has at least 8 unless x0:BITS says so",
    )
    flags.DEFINE_string("rank", "1.0", "share (0.5) or number (1024) of SVD directions kept; per layer as 0.5,0:1.0")
    flags.DEFINE_list("drop_layers", [], "layers whose rows are left out")
    flags.DEFINE_string(
        "bytes_per_token", "", "budget: choose bits, rank and layers for rows of this mean size (12KiB)"
    )
    flags.DEFINE_string("total_size", "", "budget: likewise for this size of all rows and bases (1.5GB)")
    flags.DEFINE_string("data", "", "prepared data: rows in order of frequency, and text to measure a budget on")


def from_flags() -> Options:
    values = {field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(Options)}
    return Options(**values | {"drop_layers": tuple(values["drop_layers"])})


def write(source, options: Options, output: str, scorer=None, label: str = "precompute") -> str:
    """Writes the file that the options ask for. Returns: one line on it. Raises: UserError.

    `scorer`: budget.Scorer of the model, needed for a budget.
    """
    counts, successors = source.counts, source.successors
    if options.data:
        dataset = open_for(options.data, source.identity.tokenizer.digest)
        counts = statistics.token_counts(dataset, source.vocab_size)
        successors, _ = statistics.likely_successors(dataset, source.vocab_size)
    order = np.arange(source.vocab_size) if counts is None else np.argsort(-counts, kind="stable")
    if options.bytes_per_token or options.total_size:
        layout, bases = _within_budget(source, options, scorer, counts)
    else:
        layout = uniform(source, options)
        bases = {}
        if layout.rotated:
            full = build.grams(source, layout, list(layout.rotated), np.ones(source.vocab_size), "singular vectors")
            bases = {name: build.basis_of(gram)[1][: layout.rotated[name]] for name, gram in full.items()}
    return build.build(source, layout, output, order, counts, successors, bases, label)


def _within_budget(source, options, scorer, counts):
    if options.bits or options.rank != "1.0" or options.drop_layers or (options.bytes_per_token and options.total_size):
        raise UserError("--bytes_per_token, --total_size: expected one of them, without --bits, --rank, --drop_layers")
    if jax.process_count() > 1:
        raise UserError("a budget is planned on one host: run without --multihost")
    if scorer is None or counts is None:
        raise UserError("a budget is measured on text: give --data, and --workdir for the model")
    if options.bytes_per_token:
        total = size(options.bytes_per_token, "bytes_per_token") * source.vocab_size
    else:
        total = size(options.total_size, "total_size")
    return budget.choose(source, scorer, counts, total)


def uniform(source, options: Options) -> Layout:
    """One tier with the bits, ranks and dropped layers as given. Raises: UserError."""
    names = [f"ffn.{layer}" for layer in range(source.layers)]
    default_bits = "32" if source.identity.dtype == "float32" else "16"
    bits = _per_layer("bits", options.bits or default_bits, source.layers)
    ranks = _per_layer("rank", options.rank, source.layers)
    if "x0" in ranks:
        raise UserError("--rank: expected layers, found x0, which is stored as it is")
    dropped = {f"ffn.{_layer('drop_layers', layer, source.layers)}" for layer in options.drop_layers}
    parts = []
    if source.has_x0:
        x0_bits = _bits(bits["x0"]) if "x0" in bits else max(_bits(bits[""]), 8)
        parts.append(Part("x0", (Band(source.dim, x0_bits),)))
    for name in names:
        if name not in dropped:
            kept = _rank(ranks.get(name, ranks[""]), source.dim)
            band = Band(kept or source.dim, _bits(bits.get(name, bits[""])))
            parts.append(Part(name, (band,), rotated=bool(kept)))
    if len(dropped) == source.layers:
        raise UserError("--drop_layers: expected at least one layer to stay, found all of them")
    return Layout(source.dim, source.layers, source.has_x0, (Tier(source.vocab_size, tuple(parts)),))


def _per_layer(flag, text, layers) -> dict[str, str]:
    """{"": default, "ffn.3": value of layer 3, ...}"""
    out = {}
    for item in text.split(","):
        layer, _, value = item.rpartition(":")
        name = layer if layer in ("", "x0") else f"ffn.{_layer(flag, layer, layers)}"
        if name in out:
            raise UserError(f"--{flag}: expected one value for {name or 'all layers'}, found another: {item}")
        out[name] = value.strip()
    if "" not in out:
        raise UserError(f"--{flag}: expected a value for all layers first, as in 4,0:8, found {text!r}")
    return out


def _layer(flag, text, layers) -> int:
    if not text.strip().isdecimal() or int(text) >= layers:
        raise UserError(f"--{flag}: expected a layer from 0 to {layers - 1}, found {text!r}")
    return int(text)


def _bits(text) -> int:
    known = (*FLOATS, *reversed(INTEGERS))
    if not text.isdecimal() or int(text) not in known:
        raise UserError(f"--bits: expected one of {', '.join(map(str, known))}, found {text!r}")
    return int(text)


def _rank(text, dim) -> int:
    """Directions kept; 0 for all, which needs no rotation."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    value = value if math.isfinite(value) else 0.0
    kept = round(value * dim) if value <= 1 else int(min(value, dim + 1))
    if not 0 < kept <= dim or (value > 1 and value != int(value)):
        raise UserError(f"--rank: expected a share up to 1.0 or a number of directions up to {dim}, found {text!r}")
    return 0 if kept == dim else kept


def precompute(workdir: str, output: str, choices: Options, step: int | None = None, dtype: str = "") -> str:
    """Writes the file. Returns: one line on it. Raises: UserError."""
    mesh = sharding.make_mesh(config.MeshConfig(1, -1, 1))
    trained = TrainedModel(workdir, step, dtype, mesh)
    if not trained.config.memory_dim:
        raise UserError(
            f"{workdir}: expected a memory or flex model, found {trained.config.architecture}, without FFN-M"
        )
    if trained.config.dim % mesh.size:
        raise UserError(f"{workdir}: expected a number of devices that divides the width {trained.config.dim}")
    budget = choices.bytes_per_token or choices.total_size
    scorer = budget_lib.scorer(trained, choices.data) if budget and choices.data else None
    return write(build.LiveSource(trained), choices, output, scorer)
