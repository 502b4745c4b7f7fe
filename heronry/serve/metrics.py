"""GET /metrics: what Prometheus collects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..engine.scheduler import Scheduler
from .server import server_of

router = APIRouter()
FAST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)  # seconds


class Metrics:
    """The metrics of one server."""

    def __init__(self, scheduler: Scheduler):
        self.registry = CollectorRegistry()
        self.registry.register(_Counts(scheduler))
        self.first_token = self._seconds("time_to_first_token_seconds", "From a request to its first piece of text.")
        self.between = self._seconds("inter_token_latency_seconds", "Between two pieces of one completion.")
        self.whole = self._seconds("e2e_request_latency_seconds", "From a request to its end.")

    def _seconds(self, name: str, what: str) -> Histogram:
        return Histogram(f"heronry:{name}", what, buckets=FAST, registry=self.registry)


class _Counts(Collector):
    """What the scheduler counts, read when somebody asks."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler

    def collect(self) -> Iterable[Metric]:
        return self._metrics()

    def _metrics(self) -> Iterator[Metric]:
        totals = self.scheduler.totals
        for name, what, value in (
            ("requests_waiting", "Requests that wait for rows.", totals.waiting),
            ("requests_reading", "Requests whose prompt is being read.", totals.reading),
            ("sequences_decoding", "Sequences that are being written.", totals.decoding),
        ):
            yield GaugeMetricFamily(f"heronry:{name}", what, value)
        for name, what, value in (
            ("prompt_tokens", "Tokens of prompts that were read.", totals.prompt_tokens),
            ("prompt_tokens_cached", "Tokens of prompts that did not have to be read.", totals.cached_tokens),
            ("generation_tokens", "Tokens that were written.", totals.generated_tokens),
            ("steps", "Steps of a batch.", totals.steps),
            ("requests_finished", "Requests that have ended.", totals.finished),
        ):
            yield CounterMetricFamily(f"heronry:{name}", what, value)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    return Response(generate_latest(server_of(request).metrics.registry), media_type=CONTENT_TYPE_LATEST)
