"""A trained model with its rows, ready to generate. Every command that runs a model holds an `Engine`.

It takes any source of rows: `rows.LiveRows`, which computes them from the weights, or those of tol/rows.py, which look
them up. `tol.serving.open_engine` builds one from a workdir.
"""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from memoryllm_jax.checkpoint.trained import TrainedModel
from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.config import ModelConfig
from memoryllm_jax.inference import sampling
from memoryllm_jax.inference.decoder import Decoder
from memoryllm_jax.inference.rows import RowSource
from memoryllm_jax.inference.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class Contribution:
    """Factors of the FFN outputs that are added to the residual stream (the paper's Table 1, Figures 4 and 12).

    Attributes:
      alpha: factor of FFN-M in all layers; in base, which has no FFN-M, that of the FFN.
      alpha_compute: factor of FFN-C in all layers of a flex model.
      drop_layers, drop_compute: layers in which the factor is 0 instead.
    """

    alpha: float = 1.0
    alpha_compute: float = 1.0
    drop_layers: tuple[int, ...] = ()
    drop_compute: tuple[int, ...] = ()

    def factors(self, config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
        """Factors of the token memory and of FFN-C by layer, each float64 [layers]. Raises: ArgumentError."""
        of_memory = _by_layer(config, "alpha", self.alpha, "drop_layers", self.drop_layers)
        of_compute = _by_layer(config, "alpha_compute", self.alpha_compute, "drop_compute", self.drop_compute)
        if config.row_dim and config.compute_dim:
            return of_memory, of_compute
        # The model has one kind of FFN, and alpha and drop_layers are its factors.
        if (of_compute != 1).any():
            name = "alpha_compute" if self.alpha_compute != 1 else "drop_compute"
            raise ArgumentError(
                name, f"expected flex, found {config.architecture}, whose FFN takes alpha and drop_layers"
            )
        return (of_memory, of_compute) if config.row_dim else (of_compute, of_memory)


def _by_layer(config, alpha_name, alpha, drop_name, dropped):
    if not (math.isfinite(alpha) and alpha >= 0):
        raise ArgumentError(alpha_name, f"expected a number of zero or more, found {alpha}")
    factors = np.full(config.layers, alpha)
    for layer in dropped:
        if not 0 <= layer < config.layers:
            raise ArgumentError(drop_name, f"expected layers from 0 to {config.layers - 1}, found {layer}")
        factors[layer] = 0
    return factors


class Engine:
    """A decoder and the rows that it reads.

    Args:
      trained: the model.
      params: the decoder's parameters, as `TrainedModel.load` gives them.
      rows: closed together with the engine, as is `trained`.
    Attributes:
      trained, rows, decoder, tokenizer.
      config: ModelConfig.
      context: positions that a sequence may have.
    """

    def __init__(self, trained: TrainedModel, params: dict, rows: RowSource):
        self.trained, self.rows = trained, rows
        self.config, self.tokenizer, self.context = trained.config, trained.tokenizer, trained.context
        self._unscaled = Decoder(self.config, params, trained.mesh)  # what `contribute` starts from each time
        self.decoder = self._unscaled

    def contribute(self, contribution: Contribution) -> None:
        """Applies these factors to the FFN outputs from now on. Raises: ArgumentError."""
        memory_L, compute_L = contribution.factors(self.config)
        self.decoder = self._unscaled.scaled(memory_L, compute_L)

    def prompt(self, text: str) -> list[int]:
        """Token ids of a prompt, with the id that begins a document put before them if the tokenizer has one."""
        bos = self.tokenizer.bos_id
        return ([] if bos is None else [bos]) + self.tokenizer.encode(text)

    def generate(
        self, prompts: list[list[int]], max_tokens: int, how: Sampling, seed: int = 0, stop_ids=()
    ) -> Iterator[list[tuple[int, int]]]:
        """Yields new (sequence, token id) pairs step by step, as `sampling.generate`. Raises: ArgumentError."""
        return sampling.generate(
            self.decoder,
            self.rows,
            prompts,
            max_tokens,
            how,
            seed,
            context=self.context,
            vocab_size=self.tokenizer.vocab_size,
            stop_ids=frozenset(stop_ids),
        )

    def stop_ids(self, texts: list[str]) -> set[int]:
        """Ids that end a text: those of these tokens, and those that end a document.

        Args:
          texts: each a text that is one token, or #ID.
        Raises: UserError.
        """
        tokenizer = self.tokenizer
        chosen = {tokenizer.token(text, f"stop={text}", tokenizer.vocab_size) for text in texts}
        return {*tokenizer.stop_ids, *chosen}

    def close(self) -> None:
        """Frees the rows and the checkpoint."""
        self.rows.close()
        self.trained.close()
