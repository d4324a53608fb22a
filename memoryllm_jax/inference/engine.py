"""A decoder and its rows, ready to generate text."""

import dataclasses
import math

import numpy as np

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.tol.serving import Model


@dataclasses.dataclass(frozen=True)
class Contribution:
    """How much of what its FFNs add a model takes in (the paper's Table 1, Figures 4 and 12).

    alpha: factor of FFN-M, in base of the FFN.  alpha_compute: of FFN-C.  drop_layers, drop_compute: layers where these
    add nothing.
    """

    alpha: float = 1.0
    alpha_compute: float = 1.0
    drop_layers: tuple[int, ...] = ()
    drop_compute: tuple[int, ...] = ()

    def factors(self, config) -> tuple[np.ndarray, np.ndarray]:
        """Of the token memory and of FFN-C, [layers] each. Raises: UserError that names the flag."""
        first = self._factors(config, "alpha", "drop_layers")
        second = self._factors(config, "alpha_compute", "drop_compute")
        if config.row_dim and config.compute_dim:
            return first, second
        if (second != 1).any():
            found = config.architecture
            raise UserError(f"--alpha_compute, --drop_compute: expected flex, found {found}, which --alpha is about")
        return (first, second) if config.row_dim else (second, first)

    def _factors(self, config, alpha, drop):
        factor, dropped = getattr(self, alpha), getattr(self, drop)
        if not (math.isfinite(factor) and factor >= 0):
            raise UserError(f"--{alpha}: expected a number of zero or more, found {factor}")
        factors = np.full(config.layers, factor)
        for layer in dropped:
            if not 0 <= layer < config.layers:
                raise UserError(f"--{drop}: expected layers from 0 to {config.layers - 1}, found {layer}")
            factors[layer] = 0
        return factors


class Streamer:
    """A text that grows token by token: a character appears when all of its bytes are there."""

    def __init__(self, tokenizer, prompt: list[int]):
        self._decode, self._ids = tokenizer.decode, list(prompt)
        # Decoding starts at a token that is shown already: tokenizers treat the first token of a text apart.
        self._from, self._shown = max(0, len(prompt) - 1), len(prompt)

    def add(self, token: int) -> str:
        """What a new token adds to the text."""
        self._ids.append(token)
        return self._piece(whole=False)

    def end(self) -> str:
        """What is left, where the last character is not complete."""
        return self._piece(whole=True)

    def _piece(self, whole):
        before, text = self._decode(self._ids[self._from : self._shown]), self._decode(self._ids[self._from :])
        if text.endswith("\N{REPLACEMENT CHARACTER}") and not whole:
            return ""
        self._from, self._shown = max(self._from, self._shown - 1), len(self._ids)
        return text[len(before) :]


def text_after(tokenizer, prompt: list[int], new: list[int]) -> str:
    """The text that new tokens add to a prompt."""
    return tokenizer.decode(prompt + new)[len(tokenizer.decode(prompt)) :]


def stop_ids_of(model: Model, texts: list[str]) -> set[int]:
    """Ids of the stop tokens, and of the one that ends a document. Raises: UserError."""
    tokenizer = model.tokenizer
    return {*tokenizer.stop_ids, *(tokenizer.token(text, f"--stop={text}", tokenizer.vocab_size) for text in texts)}
