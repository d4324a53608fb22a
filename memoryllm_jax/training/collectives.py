"""What a training step sends between devices, by arithmetic on the shardings of its parameters.

The shardings (model/sharding.py) leave the compiler little choice, so each transfer follows a formula:

    fsdp     the matrices of a layer are gathered in the dtype of the computation, once for the forward pass and once
             for the backward pass; their gradients are summed and scattered in the same dtype, or in float32 with
             config.model.reduce_dtype=float32. Decoder layers do this for each micro-batch, the token memory once per
             step.
    data     the scattered sums of gradients are summed over the replicas: from jax 0.12 on once per step, as XLA moves
             these sums out of the loop over micro-batches, with older versions for each micro-batch.
    tensor   each device computes a part of attention's output and of an FFN's, and the parts are summed: a
             [tokens, dim] array in the forward pass, and in the backward pass one for the gradient of the input.
    lookups  rows of embeddings and tables are sent to the batch shard that looks them up, and their gradients are sent
             back; the gradient of a table is summed over the replicas in float32.
    Muon     an all-to-all within an fsdp group and one within a tensor group bring each device whole matrices of the
             layers, in the dtype of the computation, and two more bring the results back. The replicas share the
             matrices, and sum their results over data (training/muon.py).
    head     it is gathered for each micro-batch, and its gradient is summed in float32 for each of them, over data too.

Parameters that are frozen (config.optimizer.train) have no gradients to send. In bov-B, layers below the first that
looks up a row then need no backward pass; it is counted all the same.

Scalars, such as the norm of the gradient, are left out. docs/plan.md says how closely the formulas agree with compiled
steps, and where compilers choose otherwise.
"""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memoryllm_jax.config import Config
from memoryllm_jax.model import memories, transformer
from memoryllm_jax.training import muon, optimizer

_FLOAT32 = _INT32 = 4  # bytes


class Transfer(NamedTuple):
    """All collectives of a step that send one array for one purpose.

    what: name of the array, to print.
    kind: all-gather, all-reduce, reduce-scatter or all-to-all.
    axes: mesh axes that a group of devices spans.
    operand_bytes: bytes that one device contributes.
    """

    what: str
    kind: str
    axes: tuple[str, ...]
    operand_bytes: float

    def sent_bytes(self, group: int) -> float:
        """Bytes that each device of a group of this size sends, by ring algorithms."""
        operands_sent = {
            "all-gather": group - 1,
            "all-reduce": 2 * (group - 1) / group,
            "reduce-scatter": (group - 1) / group,
            "all-to-all": (group - 1) / group,
        }
        return self.operand_bytes * operands_sent[self.kind]


def transfers(config: Config, params, mesh_shape: Mapping[str, int], distinct: int) -> list[Transfer]:
    """The transfers of one optimizer step, without those of groups of one device.

    Args:
      params: abstract parameters with their shardings, as `transformer.abstract_params` returns them.
      mesh_shape: sizes of the axes data, fsdp and tensor.
      distinct: number of token ids that a batch shard looks up, padding included.
    """
    m = config.model
    elements = _local_elements(params)
    params = optimizer.trained(config, params)
    trained = _local_elements(params)  # all of them have gradients
    itemsize = jnp.dtype(m.dtype).itemsize
    widths = itemsize, _FLOAT32 if m.reduce_dtype == "float32" else itemsize
    sums = data_sums(config)
    norms = sums * trained["norms"] * _FLOAT32
    of_heads = m.layers * 2 * m.head_dim * _FLOAT32 if m.qk_norm and trained["layers"] else 0
    table = "embedding" if m.tie_embeddings else "head"
    layers, memory, head = ((elements[part], trained[part]) for part in ("layers", "memory", table))
    found = [
        *_matrices("layers", *layers, widths, mesh_shape, config.accumulate, sums),
        *_matrices("token memory", *memory, widths, mesh_shape, 1, 1),
        *_activations(config, mesh_shape, itemsize),
        *_rows(config, distinct, itemsize),
        *_lookups("embeddings", distinct, distinct * m.dim * itemsize, trained["embedding"]),
        *_head(config, mesh_shape, *head, itemsize),
        Transfer("norms' gradients", "all-reduce", ("data", "fsdp"), norms),
        # Of the norms of queries and keys, each device has the gradient of its own heads.
        Transfer("heads' norms' gradients", "all-reduce", ("tensor",), config.accumulate * of_heads),
    ]
    if memories.of(m).reads_x0 and m.rows in ("permuted", "shared"):
        rows = distinct * m.dim * itemsize
        found += _lookups("embeddings of other tokens", distinct, rows, trained["embedding"])
    if config.optimizer.name == "muon":
        found += _momenta(params, mesh_shape, itemsize)
    if elements["tables"]:
        # The backward pass of a norm or scale of the rows looks them up again, unless they are kept.
        looked_up_again = memories.of(m).normalises and m.remat != "none"
        ids = len(m.row_layers) * distinct
        found += _lookups("tables", ids, ids * m.row_dim * itemsize, elements["tables"], 2 if looked_up_again else 1)
    return [t for t in found if t.operand_bytes and math.prod(mesh_shape[axis] for axis in t.axes) > 1]


def data_sums(config: Config) -> int:
    """How often a step sums the gradients of the decoder layers over data (compiled with jax 0.10.2 and 0.12.0.1)."""
    moves_out = jax.__version_info__ >= (0, 12) and config.model.reduce_dtype != "float32"
    return 1 if moves_out else config.accumulate


def _local_elements(params) -> dict[str, int]:
    """Number of elements that one device stores of each part of the model, all layers together."""
    elements = dict.fromkeys(("layers", "memory", "tables", "embedding", "head", "norms"), 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [key.key for key in path]
        if names[-1] == "scale":
            part = "norms"
        elif names[-1] == "table":
            part = "tables"
        else:
            part = "layers" if names[0] in transformer.LAYERS else names[0]
        elements[part] += math.prod(leaf.sharding.shard_shape(leaf.shape))
    return elements


def _matrices(
    what: str, stored: int, trained: int, widths: tuple[int, int], mesh_shape, passes: int, sums: int
) -> Iterator[Transfer]:
    """Gathering matrices within an fsdp group, and summing their gradients.

    Args:
      what: name of the matrices.
      stored: number of elements of the matrices that one device stores.
      trained: number of these that are trained.
      widths: bytes of an element (of a weight that is gathered, of a gradient that is summed).
      passes: number of forward and backward passes of a step.
      sums: how often a step sums the gradients over data.
    """
    weights, gradients = stored * widths[0], trained * widths[1]
    whole = gradients * mesh_shape["fsdp"]
    yield Transfer(f"weights of the {what}", "all-gather", ("fsdp",), passes * 2 * weights)
    yield Transfer(f"gradients of the {what}", "reduce-scatter", ("fsdp",), passes * whole)
    yield Transfer(f"gradients of the {what}", "all-reduce", ("data",), sums * gradients)


def _momenta(params, mesh_shape, itemsize: int) -> Iterator[Transfer]:
    """Muon's whole matrices. Their number is rounded up, so that each device of a group gets equally many."""
    elements = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if muon.is_matrix(path):
            layers, *stored = leaf.sharding.shard_shape(leaf.shape)
            padding = -layers % muon.parts(leaf.sharding.spec, mesh_shape)
            elements += (layers + padding) * math.prod(stored)
    for axis in ("fsdp", "tensor"):
        yield Transfer("momenta of Muon's matrices", "all-to-all", (axis,), 2 * elements * itemsize)
    yield Transfer("updates of Muon's matrices", "all-reduce", ("data",), elements * itemsize)


def _activations(config: Config, mesh_shape, itemsize: int) -> Iterator[Transfer]:
    """Sums over the parts that heads and FFN widths are split into, for all layers and micro-batches."""
    m = config.model
    split_products = 1  # attention's output
    if m.compute_dim:
        split_products += 1
    if memories.of(m).gate_weights:
        split_products += 1  # output of the gate
    forward = split_products
    if m.remat == "full" and m.compute_dim and m.compute_input == "after_attention":
        forward += 1  # to recompute the FFN's input, the backward pass sums attention's output again
    states = m.layers * _tokens(config, mesh_shape) * m.dim * itemsize
    yield Transfer("activations, forward", "all-reduce", ("tensor",), forward * states)
    yield Transfer("activations, backward", "all-reduce", ("tensor",), split_products * states)


def _rows(config: Config, distinct: int, itemsize: int) -> Iterator[Transfer]:
    """Sums over the parts that FFN-M's width is split into, for the rows of the token memory."""
    if memories.of(config.model).row_weights:
        rows = config.model.layers * distinct * config.model.dim * itemsize
        yield Transfer("rows of the token memory, forward", "all-reduce", ("tensor",), rows)
        yield Transfer("rows of the token memory, backward", "all-reduce", ("tensor",), rows)


def _lookups(what: str, ids: int, rows: float, trained: int, forward_passes: int = 1) -> Iterator[Transfer]:
    """Lookups by `token_memory.embed`: a device looks up its columns for all ids of its fsdp group, and sends them.

    Args:
      what: name of the table.
      ids: number of ids that a batch shard looks up.
      rows: bytes of their rows.
      trained: number of elements of the table that one device trains; 0: the table is frozen.
      forward_passes: how often the rows are looked up in a step.
    """
    yield Transfer(f"ids of the {what}", "all-gather", ("fsdp",), forward_passes * ids * _INT32)
    yield Transfer(f"rows of the {what}", "all-reduce", ("tensor",), forward_passes * rows)
    passes = forward_passes + 1 if trained else forward_passes
    yield Transfer(f"rows of the {what}", "all-to-all", ("fsdp",), passes * rows)
    yield Transfer(f"gradients of the {what}", "all-reduce", ("data",), trained * _FLOAT32)


def _head(config: Config, mesh_shape, stored: int, trained: int, itemsize: int) -> Iterator[Transfer]:
    """Gathering the output embedding, its gradient, and the sums over a split vocabulary (model/loss.py).

    Args:
      stored: number of elements of the output embedding that one device stores.
      trained: as many, or 0 if it is frozen.
    """
    tokens = _tokens(config, mesh_shape)
    gradient = config.accumulate * trained * _FLOAT32
    yield Transfer("output head", "all-gather", ("fsdp",), config.accumulate * stored * itemsize)
    yield Transfer("gradient of the output head", "reduce-scatter", ("fsdp",), gradient * mesh_shape["fsdp"])
    yield Transfer("gradient of the output head", "all-reduce", ("data",), gradient)
    yield Transfer("states below the head, backward", "all-reduce", ("tensor",), tokens * config.model.dim * itemsize)
    # The largest logit, the sum of the exponentials and the target's logit of each token.
    yield Transfer("softmax over the vocabulary", "all-reduce", ("tensor",), 3 * tokens * _FLOAT32)


def _tokens(config: Config, mesh_shape) -> int:
    """Tokens of a batch shard in one step."""
    return config.batch_size * config.seq_len // (mesh_shape["data"] * mesh_shape["fsdp"])
