"""The loss on the held-out split."""

from collections.abc import Callable

import jax
import numpy as np

from memoryllm_jax.data.dataset import Source, Span
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
        """Evaluates the parameters.

        Returns: {"loss" in nats per token, "perplexity", "bits_per_byte", "tokens"}, means over all held-out tokens;
          for a mixture also "sources", {name: the same of one source}. None if it was stopped.
        """
        nll, weight = [0.0] * len(self._batches.sources), [0.0] * len(self._batches.sources)
        for number in range(len(self._batches)):
            if self._stopped():
                return None
            batch = self._batches[number]
            size = self._agreement.size(self._agreement.propose(batch.distinct))
            placed = place(batch, size, self._trainer.batch_sharding)
            batch_nll, batch_weight = jax.device_get(self._trainer.evaluate(params, placed))
            source = self._batches.source_of(number)
            nll[source] += float(batch_nll)
            weight[source] += float(batch_weight)
        results = {
            source.name: _quality(*sums, source.validation) for source, *sums in zip(self._batches.sources, nll, weight)
        }
        return _whole(results, self._batches.sources) if self._batches.is_mixture else results.popitem()[1]

    def text(self, result: dict) -> str:
        """A result as lines to print."""
        line = f"validation {quality_text(result)}, {result['tokens']:,} tokens"
        return "\n".join([line, *source_lines(result)])


def _quality(nll: float, weight: float, held_out: Span) -> dict:
    """The means of a sum of `nll` nats over `weight` tokens, which were scored in this part of the split."""
    # Bytes per token are those of the whole part, also where config.eval.batches evaluates less of it.
    return quality(nll / weight, held_out.tokens - 1, held_out.bytes) | {"tokens": int(weight)}


def _whole(results: dict[str, dict], sources: list[Source]) -> dict:
    """The result of a mixture, from those of its sources."""
    # A source counts by all of its held-out tokens, as config.eval.batches may evaluate a larger share of one source.
    tokens = [source.validation.tokens - 1 for source in sources]
    loss = float(np.average([result["loss"] for result in results.values()], weights=tokens))
    whole = quality(loss, sum(tokens), sum(source.validation.bytes for source in sources))
    return whole | {"tokens": sum(result["tokens"] for result in results.values()), "sources": results}


def quality_text(result: dict) -> str:
    """Loss, perplexity and bits per byte as a clause to print."""
    return (
        f"loss {result['loss']:.4f} nats a token, perplexity {result['perplexity']:.2f}, "
        f"{result['bits_per_byte']:.4f} bits per byte"
    )


def source_lines(result: dict) -> list[str]:
    """A line to print for each source of a mixture; none without one."""
    return [f"  {name}: {quality_text(of_source)}" for name, of_source in result.get("sources", {}).items()]
