"""What the server counts, in the text format of Prometheus: the route /metrics."""

from collections.abc import Iterator

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Scope

from memoryllm_jax.server.served import ServedModel
from memoryllm_jax.server.statistics import Durations

_OTHER = "other"  # the route of requests to addresses that do not exist, so that these make no metrics of their own
_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")


class Metrics:
    """Counts requests, and reads the counts of the scheduler and the source of rows.

    The registry is its own: several servers of one process do not share counts.

    Args:
      model: what is served.
    """

    def __init__(self, model: ServedModel):
        self._registry = prometheus_client.CollectorRegistry()
        self._requests = prometheus_client.Counter(
            "memoryllm_requests", "Requests that were answered", ("method", "route", "status"), registry=self._registry
        )
        self._registry.register(_OfModel(model))

    def routes(self) -> list[Route]:
        """The route /metrics."""

        async def metrics(request: Request):
            text = prometheus_client.generate_latest(self._registry)
            return Response(text, headers={"Content-Type": prometheus_client.CONTENT_TYPE_LATEST})

        return [Route("/metrics", metrics)]

    def count(self, scope: Scope, route: str | None, status: int | None) -> None:
        """Counts a request.

        Args:
          scope: of the request.
          route: its route's path with the names of parameters; None for an address that does not exist.
          status: of its response; None if there was none.
        """
        method = scope["method"] if scope["method"] in _METHODS else _OTHER
        self._requests.labels(method, route or _OTHER, str(status or "none")).inc()


class _OfModel(Collector):
    """Reads counts when they are asked for."""

    def __init__(self, model: ServedModel):
        self._model = model

    def describe(self) -> list[Metric]:
        return []  # otherwise the registry collects once when this is registered

    def collect(self) -> Iterator[Metric]:
        yield from self._of_scheduler()
        yield from self._of_rows()

    def _of_scheduler(self):
        scheduler = self._model.scheduler
        found = scheduler.statistics
        yield GaugeMetricFamily("memoryllm_up", "1 while the engine works", float(self._model.is_healthy))
        yield GaugeMetricFamily("memoryllm_running_sequences", "Sequences in slots", scheduler.running)
        yield GaugeMetricFamily("memoryllm_waiting_sequences", "Sequences in the queue", scheduler.waiting)
        yield GaugeMetricFamily("memoryllm_slots", "Sequences that can run at a time", self._model.options.slots)
        yield CounterMetricFamily("memoryllm_prompt_tokens", "Tokens of prompts that were read", found.prompt_tokens)
        yield CounterMetricFamily("memoryllm_new_tokens", "Tokens that were generated", found.new_tokens)
        yield CounterMetricFamily("memoryllm_decode_steps", "Decode steps over all slots", found.steps)
        sequences = CounterMetricFamily("memoryllm_sequences", "Sequences that ended, by how", labels=("how",))
        for how, count in dict(found.sequences).items():
            sequences.add_metric((how,), count)
        yield sequences
        yield _histogram("memoryllm_queue_seconds", "Time from a request to a slot", found.queue_s)
        yield _histogram(
            "memoryllm_first_token_seconds", "Time from a request to its first new token", found.first_token_s
        )

    def _of_rows(self):
        found = self._model.engine.rows.stats()
        if "hit_rate" not in found:  # rows that are computed, or all on the device: nothing is fetched
            return
        yield CounterMetricFamily("memoryllm_row_requests", "Rows that were asked for", found["row_requests"])
        yield GaugeMetricFamily("memoryllm_row_cache_hit_rate", "Share that the cache held", found["hit_rate"])
        quantiles = GaugeMetricFamily(
            "memoryllm_row_fetch_seconds", "Time of a fetch of rows, by quantile", labels=("quantile",)
        )
        for quantile, name in (("0.5", "fetch_ms_p50"), ("0.99", "fetch_ms_p99")):
            quantiles.add_metric((quantile,), found[name] / 1e3)
        yield quantiles
        yield CounterMetricFamily("memoryllm_rows_repaired", "Damaged rows computed again", found["rows_repaired"])


def _histogram(name: str, text: str, durations: Durations) -> HistogramMetricFamily:
    counts = list(durations.counts)  # the engine thread goes on counting
    bounds = [*(str(bound) for bound in durations.bounds), "+Inf"]
    sums = [sum(counts[: i + 1]) for i in range(len(counts))]
    return HistogramMetricFamily(name, text, list(zip(bounds, sums)), durations.sum)
