"""FLOPs, traffic and time of a planned step: a roofline from data sheets, not a measurement.

    compute   = (FLOPs of a step by model/flops.py + recomputed + masked FLOPs) / (peak FLOP/s * EFFICIENCY)
    network   = sum of the times of the transfers (collectives.py)
    optimizer = bytes of parameters, moments and gradients read and written / memory bandwidth
                + FLOPs of Muon's Newton-Schulz on the busiest device / (peak FLOP/s * EFFICIENCY)

The step takes at least max(compute, network) + optimizer, where transfers overlap with computation, and at most
compute + network + optimizer, where none does. Latency is left out.

A transfer takes the bytes that a device sends, divided by the speed of the links. Where a group spans several domains,
which are GPU nodes or TPU slices, its time has two bounds. At least, its k devices in each domain share the traffic to
other domains, as in NCCL's rings, which are as many as a node has network adapters, if messages are large: a device
sends 1/k of its bytes of an all-gather, all-reduce or reduce-scatter to other domains; of an all-to-all, all that their
devices receive from it. At most, one ring joins all devices, so that all bytes go through one device's share of the
network.
"""

import numpy as np
from jax.sharding import Mesh

from memoryllm_jax.config import Config
from memoryllm_jax.model import attention, flops
from memoryllm_jax.training.chips import Chip
from memoryllm_jax.training.collectives import Transfer
from memoryllm_jax.training.muon import Work

EFFICIENCY = 0.5  # share of peak FLOP/s that well-tuned trainers publish near 1B parameters
# AdamW reads and writes the parameters and two moments, and reads the gradients: 7 times the bytes of what is trained.
# Muon has one moment.
_UPDATES = 7
_UPDATES_OF_MUON = 5


def flops_a_token(config: Config, rows: int, attention_share: float = 1.0) -> dict[str, float]:
    """FLOPs per token of a step that evaluates `rows` rows of token memory.

    Args:
      attention_share: as of `flops.train_flops`.
    Returns: "per_token"; "per_token_plain", for a row at every position; and what comes on top: "recomputed_per_token",
      and "masked_per_token", attention between documents that its kernel computes all the same.
    """
    tokens = config.batch_size * config.seq_len
    return {
        "per_token": flops.train_flops(config, tokens, rows, attention_share) / tokens,
        "per_token_plain": flops.train_flops(config, 1, 1, attention_share),
        "recomputed_per_token": _recomputed(config, tokens, rows, attention_share) / tokens,
        "masked_per_token": _masked(config, attention_share),
    }


def _masked(config: Config, attention_share: float) -> float:
    """FLOPs per token of attention between documents, if the config's kernel computes them to mask them."""
    if attention.skips_other_documents(config.model.attention):
        return 0.0
    once = flops.train_flops(config, 1, 1) - flops.train_flops(config, 1, 1, attention_share)
    return once * 4 / 3 if config.model.remat == "full" else once  # a forward pass, a third of a step, is recomputed


def _recomputed(config: Config, tokens: int, rows: int, attention_share: float = 1.0) -> float:
    """FLOPs that the backward pass recomputes.

    With remat `full` that is the layers' forward pass; else nothing or, with micro-batches, FFN-M alone (`Trainer`).
    """
    once = flops.forward(config, tokens, rows, attention_share)
    if config.model.remat != "full":
        return once.memory if config.accumulate > 1 else 0.0
    head = 2 * tokens * config.model.dim * config.model.vocab_size  # is not recomputed
    return sum(once) - head


def traffic(transfers: list[Transfer], mesh: Mesh, chip: Chip, domain: int) -> list[dict]:
    """Each transfer's bytes that one device sends, and bounds of their seconds, the largest first.

    Args:
      domain: number of devices that `chip.network` joins, which follow each other in the mesh.
    """
    places = np.arange(mesh.size).reshape(mesh.devices.shape)
    found = []
    for transfer in transfers:
        # All groups of a transfer are alike, so look at the one with the first device.
        along = tuple(slice(None) if axis in transfer.axes else 0 for axis in mesh.axis_names)
        group = places[along].ravel()
        in_a_domain = len(group) // len(set(group // domain))
        sent = transfer.sent_bytes(len(group))
        between = _sent_between_domains(transfer, len(group), in_a_domain)
        found.append(
            {
                "what": transfer.what,
                "kind": transfer.kind,
                "group": len(group),
                "over": "network" if between else "links",
                "bytes": sent,
                "bytes_between": between,
                "seconds": {
                    "least": max(sent / chip.network, between / chip.between),
                    "most": sent / (chip.between if between else chip.network),
                },
            }
        )
    return sorted(found, key=lambda part: -part["bytes"])


def _sent_between_domains(transfer: Transfer, group: int, in_a_domain: int) -> float:
    """Bytes that each device sends to other domains, if `in_a_domain` devices of the group are in each domain."""
    if in_a_domain == group:
        return 0.0
    if transfer.kind == "all-to-all":
        return transfer.operand_bytes * (group - in_a_domain) / group
    return transfer.sent_bytes(group) / in_a_domain


def times(
    devices: int,
    chip: Chip,
    tokens: int,
    flops_per_token: dict,
    transfers: list[dict],
    trained: int,
    muon: Work,
) -> dict:
    """Seconds of a step's parts and of the step.

    Args:
      devices: number of devices.
      tokens: tokens of a step.
      flops_per_token: as `flops_a_token` returns it.
      transfers: as `traffic` returns them.
      trained: bytes of the trained parameters that one device stores.
      muon: as `muon.work` returns it.
    Returns: "compute", "network", "optimizer" and "step"; network and step have the bounds "least" and "most".
    """
    parts = ("per_token", "recomputed_per_token", "masked_per_token")
    computed = sum(flops_per_token[part] for part in parts) * tokens
    compute = computed / (devices * chip.peak_flops * EFFICIENCY)
    network = {bound: sum(part["seconds"][bound] for part in transfers) for bound in ("least", "most")}
    updates = _UPDATES * (trained - muon.stored) + _UPDATES_OF_MUON * muon.stored
    optimizer = updates / chip.bandwidth + muon.flops / (chip.peak_flops * EFFICIENCY)
    return {
        "compute": compute,
        "network": network,
        "optimizer": optimizer,
        "step": {
            "least": max(compute, network["least"]) + optimizer,
            "most": compute + network["most"] + optimizer,
        },
    }
