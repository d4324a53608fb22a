"""What the scheduler generates, and the events that come of it."""

import dataclasses
from typing import NamedTuple

from memoryllm_jax.inference.engine import Contribution
from memoryllm_jax.inference.sampling import Sampling
from memoryllm_jax.tol.overlay import Overlay


@dataclasses.dataclass(frozen=True)
class Work:
    """One sequence to generate.

    Attributes:
      ids: token ids of the prompt, at least one.
      max_tokens: most new tokens; 0 only scores the prompt.
      sampling: how tokens are drawn.
      seed: seed of the draws, from 0 to 2^32 - 1.
      number: number of the sequence among those of its request, which its draws depend on.
      stop_ids: ids that end the text; they are no part of it.
      stop_texts: texts that end the text; they are no part of it, even where they begin or end inside a token.
      alternatives: how many of the likeliest tokens to report with each token; 0 reports the drawn token's
        log-probability alone, None nothing.
      echo: whether events begin with the tokens of the prompt.
      contribution: factors of the FFN outputs.
      overlay: edits of the token memory, or None.
    """

    ids: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    seed: int = 0
    number: int = 0
    stop_ids: frozenset[int] = frozenset()
    stop_texts: tuple[str, ...] = ()
    alternatives: int | None = None
    echo: bool = False
    contribution: Contribution = dataclasses.field(default_factory=Contribution)
    overlay: Overlay | None = None


class Token(NamedTuple):
    """An event: one more token of the sequence.

    Attributes:
      id: the token.
      text: the characters that it completes; "" while they could be part of a stop text or an unfinished character.
      log_prob: the natural logarithm of its probability in the model's distribution (temperature 1, all ids); None if
        it was not asked for, and for the first token of a prompt.
      alternatives: (id, log-probability) of the likeliest tokens, likeliest first.
    """

    id: int
    text: str
    log_prob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()


class Finished(NamedTuple):
    """The last event of a sequence.

    Attributes:
      reason: "stop" if a stop id or text ended it, "length" if `max_tokens` or the context did.
      text: the characters that were still held back.
    """

    reason: str
    text: str = ""
