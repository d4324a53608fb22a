"""A trained model that is ready to generate and to score text, as an `Engine`.

An engine takes any source of rows: `rows.LiveRows` computes them from the weights, and the sources of tol/rows.py look
them up in a ToL file. `tol.serving.open_engine` builds an engine from a workdir.
"""

import copy
import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from memoryllm_jax.checkpoint.trained import TrainedModel
from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.config import ModelConfig
from memoryllm_jax.inference import generation
from memoryllm_jax.inference.decoder import Decoder
from memoryllm_jax.inference.rows import RowSource
from memoryllm_jax.inference.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class Contribution:
    """Factors of the FFN outputs that are added to the residual stream (the paper's Table 1, Figures 4 and 12).

    Attributes:
      alpha: factor of FFN-M in all layers or, in a model with one FFN per layer such as base, of that FFN.
      alpha_compute: factor of FFN-C in all layers of a model that has both.
      drop_layers: layers in which the factor of `alpha` is 0 instead.
      drop_compute: layers in which the factor of `alpha_compute` is 0 instead.
    """

    alpha: float = 1.0
    alpha_compute: float = 1.0
    drop_layers: tuple[int, ...] = ()
    drop_compute: tuple[int, ...] = ()

    def factors(self, config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
        """The factors of the token memory and of FFN-C by layer, each float64 [layers]. Raises: ArgumentError."""
        main_L = _by_layer(config, "alpha", self.alpha, "drop_layers", self.drop_layers)
        compute_L = _by_layer(config, "alpha_compute", self.alpha_compute, "drop_compute", self.drop_compute)
        if config.row_dim and config.compute_dim:
            return main_L, compute_L
        # The model has one FFN per layer, which alpha and drop_layers scale.
        if (compute_L != 1).any():
            name = "alpha_compute" if self.alpha_compute != 1 else "drop_compute"
            raise ArgumentError(
                name, f"expected a flex model, found {config.architecture}, whose one FFN takes alpha and drop_layers"
            )
        ones_L = compute_L  # as checked above
        if config.row_dim:
            return main_L, ones_L
        return ones_L, main_L


def _by_layer(config, alpha_name, alpha, drop_name, dropped):
    """float64 [layers]: alpha, and 0 in the dropped layers."""
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
      trained: the model; for one that is still trained, what says the same of it (training/during.py). The engine
        closes it.
      params: the decoder's parameters, as `TrainedModel.load` gives them; or their shapes until `fill` is called.
      rows: the source of rows. The engine closes it.
    Attributes:
      trained, params, rows: as given.
      decoder: the `Decoder`, with the factors of `contribute`.
      tokenizer: the model's tokenizer.
      config: the model's `ModelConfig`.
      context: most positions that a sequence may have.
    """

    def __init__(self, trained: TrainedModel, params: dict, rows: RowSource):
        self.trained, self.params, self.rows = trained, params, rows
        self.config, self.tokenizer, self.context = trained.config, trained.tokenizer, trained.context
        self._unscaled = Decoder(self.config, params, trained.mesh)  # what `contribute` starts from each time
        self.decoder = self._unscaled

    def fill(self, params: dict) -> None:
        """Takes the parameters of an engine with live rows that was made from their shapes alone."""
        self.params = params
        self._unscaled.fill(params)
        self.rows.fill(params)

    @property
    def weights_bytes(self) -> int:
        """Bytes of the weights on the devices: the decoder's, and those that live rows are computed from."""
        return self._unscaled.weights_bytes + self.rows.weights_bytes

    def contribute(self, contribution: Contribution) -> None:
        """Applies these factors to the FFN outputs from now on. Raises: ArgumentError."""
        memory_L, compute_L = contribution.factors(self.config)
        self.decoder = self._unscaled.scaled(memory_L, compute_L)

    def changed(self, rows: RowSource, contribution: Contribution) -> "Engine":
        """The same model with other rows and factors. It shares the weights with this engine, which the caller closes.

        Raises: ArgumentError.
        """
        other = copy.copy(self)
        other.rows = rows
        if contribution != Contribution():
            other.contribute(contribution)
        return other

    def prompt(self, text: str) -> list[int]:
        """Token ids of a prompt, after the id that begins a document if the tokenizer has one."""
        ids = self.tokenizer.encode_prompt(text)
        if self.tokenizer.bos_id is not None:
            ids = [self.tokenizer.bos_id, *ids]
        return ids

    def generate(
        self,
        prompts: list[list[int]],
        max_tokens: int,
        how: Sampling,
        seed: int = 0,
        stop_ids=(),
        steps_per_call: int = 1,
    ) -> Iterator[list[tuple[int, int]]]:
        """Samples one continuation of each prompt. It is `generation.generate` with this engine's decoder and rows.

        Yields: after each step, the new (sequence, token id) pairs.
        Raises: ArgumentError.
        """
        return generation.generate(
            self.decoder,
            self.rows,
            prompts,
            max_tokens,
            how,
            seed,
            context=self.context,
            vocab_size=self.tokenizer.vocab_size,
            stop_ids=frozenset(stop_ids),
            steps_per_call=steps_per_call,
        )

    def stop_ids(self, texts: list[str]) -> set[int]:
        """Ids that end a text: those of the given tokens, and those that end a document.

        Args:
          texts: the tokens, each as text that is one token or as #ID.
        Raises: ArgumentError for a text that is not one token.
        """
        tokenizer = self.tokenizer
        chosen = {tokenizer.token(text, "stop", tokenizer.vocab_size) for text in texts}
        return {*tokenizer.stop_ids, *chosen}

    def close(self) -> None:
        """Closes the source of rows and the checkpoint."""
        self.rows.close()
        self.trained.close()
