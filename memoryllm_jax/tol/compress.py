"""The compression options of a ToL file, and the writing of the file that they ask for."""

import contextlib
import dataclasses
import math
import os
from typing import Annotated

import numpy as np

from memoryllm_jax import config
from memoryllm_jax.checkpoint.trained import TrainedModel
from memoryllm_jax.common import options
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.common.options import Option
from memoryllm_jax.data import statistics
from memoryllm_jax.data.dataset import open_for
from memoryllm_jax.model import memories, sharding
from memoryllm_jax.tol import budget, build
from memoryllm_jax.tol.budget import Scorer
from memoryllm_jax.tol.codec import FLOATS, INTEGERS, Band, Part
from memoryllm_jax.tol.format import TolFile
from memoryllm_jax.tol.layout import Layout, Tier
from memoryllm_jax.tol.sources import FileSource, Identity, LiveSource, Source
from memoryllm_jax.tol.writer import to_replace


@dataclasses.dataclass(frozen=True)
class Options:
    """How rows are stored: bits, rank and layers as given, or chosen by measurement for a size."""

    bits: Annotated[
        str,
        Option(
            "bits of an element: 32, 16 or 2 to 8; 4,0:8,23:16 sets 4, but 8 for layer 0 and 16 for layer 23; by "
            "default 32 or 16, as the computation or the file that is compressed has. A stored embedding (x0) has at "
            "least 8 unless x0:BITS is set"
        ),
    ] = ""
    rank: Annotated[
        str,
        Option("share (0.5) or number (1024) of singular vectors kept; 0.5,0:1.0 sets half, but all for layer 0"),
    ] = "1.0"
    drop_layers: Annotated[tuple[str, ...], Option("layers whose rows are left out, such as 11,12")] = ()
    bytes_per_token: Annotated[
        str, Option("budget: choose bits, rank and layers so that rows have this mean size, such as 12KiB")
    ] = ""
    total_size: Annotated[
        str, Option("budget: choose bits, rank and layers so that all rows and bases have this size, such as 1.5GB")
    ] = ""
    data: Annotated[
        str, Option("prepared data: its most frequent tokens come first in the file, and a budget is measured on it")
    ] = ""

    @property
    def has_budget(self) -> bool:
        return bool(self.bytes_per_token or self.total_size)


def precompute(
    workdir: str,
    output: str,
    choices: Options,
    step: int | None = None,
    dtype: str = "",
    chunk_rows: int = build.CHUNK_ROWS,
) -> str:
    """Writes the ToL file of a checkpoint, on all devices of this process.

    Args:
      workdir: folder with the model's checkpoints.
      output: path of the file.
      choices: how rows are stored.
      step, dtype: as of `TrainedModel`.
      chunk_rows: as of `build.build`.
    Returns: one line on what was written. Raises: UserError.
    """
    to_replace(output)  # what is in the way shows before the weights are read, which takes longest
    mesh = sharding.make_mesh(config.MeshConfig(1, -1, 1))  # every device holds a part of the weights
    with contextlib.closing(TrainedModel(workdir, step, dtype, mesh)) as trained:
        memory = memories.of(trained.config)
        if not memory.adds_rows or memory.by_bigram:
            expected = "expected a memory, flex or rows model, whose rows of tokens are added to the residual stream"
            raise UserError(f"{workdir}: {expected}, found {trained.config.architecture}")
        if trained.config.dim % mesh.size:  # the weights are cut along the width
            expected = f"expected a number of devices that divides the width {trained.config.dim}"
            raise UserError(f"{workdir}: {expected}, found {mesh.size}")
        scorer = budget.scorer(trained, choices.data) if choices.has_budget and choices.data else None
        return write(LiveSource(trained), choices, output, scorer, chunk_rows=chunk_rows, workdir=trained.workdir)


def compress_file(tol: TolFile, choices: Options, output: str, workdir: str = "") -> str:
    """Writes a smaller ToL file from one of 16 or 32 bits.

    Args:
      tol: the file to compress.
      choices: how rows are stored.
      output: path of the smaller file.
      workdir: checkpoints of the model that a budget is measured with; "" where there is no budget.
    Returns: one line on what was written. Raises: UserError.
    """
    if os.path.exists(output) and os.path.samefile(output, tol.path):
        raise ArgumentError("output", f"expected another file than the one that is compressed, found {output}")
    to_replace(output)  # before the weights are read
    # Integers would be quantised twice, and dropped layers are read as zeros, which would be stored like other rows.
    parts = [part for tier in tol.layout.tiers for part in tier.parts]
    is_exact = all(band.bits in FLOATS and not part.rotated for part in parts for band in part.bands)
    dropped = tol.layout.dropped_layers()
    if not is_exact or dropped:
        found = f"{tol.layout.codec()}, with {len(dropped)} of {tol.layout.layers} layers dropped in some tier"
        raise UserError(
            f"{tol.path}: expected a file of 16 or 32 bits with all layers, found {found}; compress the file that it "
            "was made from"
        )
    scorer = None
    if workdir:
        with contextlib.closing(TrainedModel(workdir, tol.step, tol.metadata["dtype"])) as trained:
            tol.check_model(trained.config, trained.tokenizer.digest, None)
            scorer = budget.scorer(trained, choices.data) if choices.data else None
    with contextlib.closing(FileSource(tol)) as source:
        return write(source, choices, output, scorer, "compress", workdir=workdir)


def write(
    source: Source,
    choices: Options,
    output: str,
    scorer: Scorer | None = None,
    label: str = "precompute",
    chunk_rows: int = build.CHUNK_ROWS,
    workdir: str = "",
) -> str:
    """Writes the file that the options ask for.

    Args:
      source: the full rows.
      choices: how rows are stored.
      output: path of the file.
      scorer: measures the model's loss, which a budget needs; else None.
      label, chunk_rows: as of `build.build`.
      workdir: remembers which file shards of the data are verified; "": nothing does.
    Returns: one line on what was written. Raises: UserError.
    """
    _check_output(output, source.identity)
    counts = source.counts
    if choices.data:
        dataset = open_for(choices.data, source.identity.tokenizer.digest, workdir)
        counts = statistics.token_counts(dataset, source.vocab_size)
    # Stable, so that tokens that are equally frequent stay in the order of their ids on any machine.
    order = np.arange(source.vocab_size) if counts is None else np.argsort(-counts, kind="stable")
    if choices.has_budget:
        layout, bases = _within_budget(source, choices, scorer, counts)
    else:
        layout = uniform(source, choices)
        found = build.singular_bases(source, list(layout.rotated), np.ones(source.vocab_size), chunk_rows)
        bases = {name: basis.stored[: layout.rotated[name]] for name, basis in found.items()}
    return build.build(source, layout, output, order, counts, bases, label, chunk_rows)


def _check_output(output: str, identity: Identity) -> None:
    """Refuses to replace anything but a ToL file of the same weights. Raises: ArgumentError."""
    found = to_replace(output)
    if found and any(found[key] != getattr(identity, key) for key in ("rows_digest", "decoder_digest")):
        expected = "expected a name that is free, or a ToL file of the same weights"
        other = f"a file of other weights or with edits ({found['architecture']} at step {found['step']})"
        raise ArgumentError("output", f"{expected}, found {other}: {output}; remove it or choose another name")


def _within_budget(source, choices, scorer, counts) -> tuple[Layout, dict]:
    name = "bytes_per_token" if choices.bytes_per_token else "total_size"
    if choices.bytes_per_token and choices.total_size:
        raise ArgumentError(name, "expected no total_size too, as both are budgets")
    default = Options()
    for other in ("bits", "rank", "drop_layers"):
        if getattr(choices, other) != getattr(default, other):
            raise ArgumentError(name, f"expected no {other} too, as a budget chooses it")
    if scorer is None or counts is None:
        missing = "workdir" if choices.data else "data"
        raise ArgumentError(name, f"expected {missing} too, as a budget is measured on text with the model")
    total = options.size(getattr(choices, name), name)
    if choices.bytes_per_token:
        total *= source.vocab_size
    return budget.choose(source, scorer, counts, total, name)


def uniform(source: Source, choices: Options) -> Layout:
    """The layout of options without a budget: one tier, with bits, ranks and dropped layers as given.

    Raises: ArgumentError.
    """
    bits = _per_part("bits", choices.bits or str(source.bits), source.layers)
    ranks = _per_part("rank", choices.rank, source.layers)
    if "x0" in ranks:
        raise ArgumentError("rank", "expected layers, found x0, which is always stored whole")
    dropped = options.layers(choices.drop_layers, "drop_layers", source.layers)
    if len(dropped) == source.layers:
        raise ArgumentError("drop_layers", "expected at least one layer to stay, found all of them")
    parts = []
    if source.has_x0:
        # Every layer reads the embedding, so that its errors do the most harm: few bits must be asked for by name.
        x0_bits = _bits(bits["x0"]) if "x0" in bits else max(_bits(bits[""]), 8)
        parts.append(Part("x0", (Band(source.dim, x0_bits),), rotated=False))
    for layer in range(source.layers):
        if layer in dropped:
            continue
        name = f"ffn.{layer}"
        rank = _rank(ranks.get(name, ranks[""]), source.dim)
        band = Band(rank, _bits(bits.get(name, bits[""])))
        parts.append(Part(name, (band,), rotated=rank < source.dim))  # the full rank needs no rotation
    return Layout(source.dim, source.layers, source.has_x0, (Tier(source.vocab_size, tuple(parts)),))


def _per_part(name: str, text: str, layers: int) -> dict[str, str]:
    """Parses DEFAULT,LAYER:VALUE,... to {"": default, "ffn.3": value of layer 3, ...}.

    Args:
      name: of the option, for errors.
      layers: the model's number of layers.
    Raises: ArgumentError.
    """
    out = {}
    for item in text.split(","):
        layer, _, value = item.rpartition(":")
        part = layer
        if layer not in ("", "x0"):
            (number,) = options.layers((layer,), name, layers)
            part = f"ffn.{number}"
        if part in out:
            raise ArgumentError(name, f"expected one value for {part or 'all layers'}, found another: {item}")
        out[part] = value.strip()
    if "" not in out:
        raise ArgumentError(name, f"expected a value for all layers first, as in 4,0:8, found {text!r}")
    return out


def _bits(text: str) -> int:
    known = (*FLOATS, *reversed(INTEGERS))
    if not text.isdecimal() or int(text) not in known:
        raise ArgumentError("bits", f"expected one of {', '.join(map(str, known))}, found {text!r}")
    return int(text)


def _rank(text: str, dim: int) -> int:
    """Number of singular vectors kept, of `dim`.

    Args:
      text: a share of 1 or less, or the number itself.
    Raises: ArgumentError.
    """
    problem = f"expected a share up to 1.0 or a number of singular vectors up to {dim}, found {text!r}"
    try:
        value = float(text)
    except ValueError as error:
        raise ArgumentError("rank", problem) from error
    if not math.isfinite(value) or (value > 1 and value != int(value)):
        raise ArgumentError("rank", problem)
    rank = round(value * dim) if value <= 1 else int(value)  # 1 is the share: all of them
    if not 0 < rank <= dim:
        raise ArgumentError("rank", problem)
    return rank
