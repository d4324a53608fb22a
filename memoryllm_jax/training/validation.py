"""The loss on the held-out split."""

from collections.abc import Callable

import jax

from memoryllm_jax.model.loss import quality
from memoryllm_jax.training.batches import ValidationBatches, place
from memoryllm_jax.training.feeder import SizeAgreement
from memoryllm_jax.training.metrics import Kind
from memoryllm_jax.training.sizes import Sizes
from memoryllm_jax.training.step import Trainer


class Validation:
    """An `Observer` that evaluates parameters on the same batches of the held-out split each time.

    Args:
      every: steps between evaluations.
      sizes: as `batches.sizes()` returns them.
      stopped: called before each batch; if it returns True, the evaluation ends without a result.
    """

    kind: Kind = "validation"
    asked = ""  # made again by a run that resumes at its step, as the end of the run needs the result

    def __init__(
        self, every: int, batches: ValidationBatches, trainer: Trainer, sizes: Sizes, stopped: Callable[[], bool]
    ):
        self.every = every
        self._batches, self._trainer, self._stopped = batches, trainer, stopped
        self._agreement = SizeAgreement(sizes, trainer.mesh)

    def __call__(self, params) -> dict | None:
        """Returns: {"loss" in nats per token, "perplexity", "bits_per_byte", "tokens"}; None if it was stopped."""
        nll = weight = 0.0
        for number in range(len(self._batches)):
            if self._stopped():
                return None
            batch = self._batches[number]
            size = self._agreement.size(self._agreement.propose(batch.distinct))
            placed = place(batch, size, self._trainer.batch_sharding)
            batch_nll, batch_weight = jax.device_get(self._trainer.evaluate(params, placed))
            nll += float(batch_nll)
            weight += float(batch_weight)
        # Bytes per token are those of the whole split, also where config.eval.batches evaluates only a part of it.
        held_out = self._batches.tokens
        return quality(nll / weight, held_out.tokens - 1, held_out.bytes) | {"tokens": int(weight)}

    def text(self, result: dict) -> str:
        """A result as a line to print."""
        return f"validation {quality_text(result)}, {result['tokens']:,} tokens"


def quality_text(result: dict) -> str:
    """Loss, perplexity and bits per byte as a clause to print."""
    return (
        f"loss {result['loss']:.4f} nats a token, perplexity {result['perplexity']:.2f}, "
        f"{result['bits_per_byte']:.4f} bits per byte"
    )
