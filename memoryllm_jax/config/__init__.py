"""The config of a run: each field once (tree.py), and the values and combinations that are refused (checks.py).

Config files build an `ml_collections.ConfigDict` with `default(architecture)`, so that every field can be
overridden on the command line; `resolve` turns it into the frozen `Config` that the rest of the code reads.
"""

import dataclasses
import math
import re
from collections.abc import Collection

import ml_collections

from memoryllm_jax.common import fields
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.config.checks import TEMPERATURES, check_length, is_temperature, validate
from memoryllm_jax.config.tree import (
    ATTENTION_BACKENDS,
    RESUMABLE_FIELDS,
    RULES,
    TOKEN_MEMORIES,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    SampleConfig,
    StartConfig,
)

__all__ = [
    "ATTENTION_BACKENDS",
    "RESUMABLE_FIELDS",
    "RULES",
    "TEMPERATURES",
    "TOKEN_MEMORIES",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "LogConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "SampleConfig",
    "StartConfig",
    "default",
    "from_saved",
    "is_temperature",
    "parse_architecture",
    "resolve",
    "validate",
]


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
    check_length(resolved)
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
