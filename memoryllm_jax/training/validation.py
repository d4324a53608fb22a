"""The loss on the held-out split."""

from collections.abc import Callable

import jax

from memoryllm_jax.data.dataset import Span
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

        Returns: {"loss" in nats per token, "perplexity", "bits_per_byte", "tokens"}, means over all tokens that were
          scored, as Levanter's `eval/loss` is; for a mixture also "sources", {name: the same of one source}. None if it
          was stopped.
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
        spans = [source.validation for source in self._batches.sources]
        result = _quality(sum(nll), sum(weight), spans)
        if self._batches.is_mixture:
            names = [source.name for source in self._batches.sources]
            result["sources"] = {name: _quality(*of, [span]) for name, *of, span in zip(names, nll, weight, spans)}
        return result

    def text(self, result: dict) -> str:
        """A result as lines to print."""
        line = f"validation {quality_text(result)}, {result['tokens']:,} tokens"
        return "\n".join([line, *source_lines(result)])


def _quality(nll: float, weight: float, spans: list[Span]) -> dict:
    """The means of a sum of `nll` nats over `weight` tokens, which were scored in these parts of the split."""
    # Bytes per token are those of the whole parts, also where config.eval.batches evaluates less of them.
    tokens = sum(span.tokens - 1 for span in spans)  # nothing predicts the first token of each
    return quality(nll / weight, tokens, sum(span.bytes for span in spans)) | {"tokens": int(weight)}


def quality_text(result: dict) -> str:
    """Loss, perplexity and bits per byte as a clause to print."""
    return (
        f"loss {result['loss']:.4f} nats a token, perplexity {result['perplexity']:.2f}, "
        f"{result['bits_per_byte']:.4f} bits per byte"
    )


def source_lines(result: dict) -> list[str]:
    """A line to print for each source of a mixture; none without one."""
    return [f"  {name}: {quality_text(of_source)}" for name, of_source in result.get("sources", {}).items()]
