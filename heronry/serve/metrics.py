"""GET /metrics: what Prometheus collects, under names of our own and under those that users of vLLM and llama.cpp have
in their dashboards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..engine.scheduler import Scheduler
from ..engine.state_cache import CacheStats, StateCache
from .server import server_of

router = APIRouter()
FAST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)  # seconds


class Metrics:
    """The metrics of one server.

    first_token, between: to be told of each piece of text. completions: of each end, with its reason.
    longest: tokens of a prompt and its completion.
    """

    def __init__(self, scheduler: Scheduler, cache: StateCache | None, model_name: str):
        """model_name: that vLLM's names are told with, for all models together."""
        self.registry = CollectorRegistry()
        self.longest = 0
        self.first_token = self._seconds("time_to_first_token_seconds", "From a request to its first piece of text.")
        self.between = self._seconds("inter_token_latency_seconds", "Between two pieces of one completion.")
        self._whole = self._seconds("e2e_request_latency_seconds", "From a request to its end.")
        self._queued = self._seconds(
            "request_queue_time_seconds", "From a request to when its prompt began to be read."
        )
        self._prefill = self._seconds("request_prefill_time_seconds", "For which a prompt was read.")
        self._decode = self._seconds("request_decode_time_seconds", "From the end of a prompt to the end of a request.")
        self._token = self._seconds("request_time_per_output_token_seconds", "Of a request, for each of its tokens.")
        self.completions = Counter(
            "heronry:request_success", "Completions that have ended.", ["finished_reason"], registry=self.registry
        )
        self.registry.register(_Counts(scheduler, cache))
        self.registry.register(_VllmNames(self, scheduler, model_name))
        self.registry.register(_LlamaCppNames(self, scheduler))

    def _seconds(self, name: str, what: str) -> Histogram:
        return Histogram(f"heronry:{name}", what, buckets=FAST, registry=self.registry)

    def note_end(
        self, begun: float, admitted: float, read: float, latest: float, lengths: tuple[int, Sequence[int]]
    ) -> None:
        """Of a request: when it came, had waited, its prompt was read and its last piece came; the tokens of its prompt
        and of each completion."""
        self._whole.observe(latest - begun)
        self._queued.observe(admitted - begun)
        self._prefill.observe(read - admitted)
        self._decode.observe(latest - read)
        of_prompt, written = lengths
        if most := max(written):
            self._token.observe((latest - read) / most)
        self.longest = max(self.longest, of_prompt + most)

    @property
    def under_vllms_names(self) -> tuple[Histogram | Counter, ...]:
        """Those that differ in nothing else."""
        times = (self._whole, self._queued, self._prefill, self._decode, self._token)
        return self.first_token, self.between, *times, self.completions

    def seconds(self) -> tuple[float, float]:
        """In which prompts were read, and completions written."""
        read, written = (_sum(histogram) for histogram in (self._prefill, self._decode))
        return read, written


def _sum(histogram: Histogram) -> float:
    return next(x.value for metric in histogram.collect() for x in metric.samples if x.name.endswith("_sum"))


class _Counts(Collector):
    """What the scheduler and the cache count, read when somebody asks."""

    def __init__(self, scheduler: Scheduler, cache: StateCache | None):
        self.scheduler, self.cache = scheduler, cache

    def collect(self) -> Iterable[Metric]:
        return self._metrics()

    def _metrics(self) -> Iterator[Metric]:
        totals = self.scheduler.totals
        cache = CacheStats() if self.cache is None else self.cache.stats
        for name, what, value in (
            ("requests_waiting", "Requests that wait for rows.", totals.waiting),
            ("requests_reading", "Requests whose prompt is being read.", totals.reading),
            ("sequences_decoding", "Sequences that are being written.", totals.decoding),
            ("state_cache_ram_bytes", "Of states of prompts' beginnings in RAM.", cache.ram_bytes),
            ("state_cache_store_bytes", "Of those in the store.", cache.store_bytes),
        ):
            yield GaugeMetricFamily(f"heronry:{name}", what, value)
        for name, what, value in (
            ("prompt_tokens", "Tokens of prompts that were read.", totals.prompt_tokens),
            ("prompt_tokens_cached", "Tokens of prompts that did not have to be read.", totals.cached_tokens),
            ("generation_tokens", "Tokens that were written.", totals.generated_tokens),
            ("steps", "Steps of a batch.", totals.steps),
            ("requests_finished", "Requests that have ended.", totals.finished),
            ("state_cache_hits", "Prompts of which a beginning was known.", cache.hits),
            ("state_cache_misses", "Prompts of which none was.", cache.misses),
            ("state_cache_evictions", "States that went from RAM for want of room.", cache.evicted),
        ):
            yield CounterMetricFamily(f"heronry:{name}", what, value)


class _VllmNames(Collector):
    def __init__(self, metrics: Metrics, scheduler: Scheduler, model_name: str):
        self.metrics, self.scheduler, self.labels = metrics, scheduler, {"model_name": model_name}

    def collect(self) -> Iterable[Metric]:
        return map(self._labelled, self._metrics())

    def _labelled(self, metric: Metric) -> Metric:
        metric.samples = [x._replace(labels=x.labels | self.labels) for x in metric.samples]
        return metric

    def _metrics(self) -> Iterator[Metric]:
        totals, rows = self.scheduler.totals, self.scheduler.limits.rows
        running, prompts = totals.reading + totals.decoding, totals.prompt_tokens + totals.cached_tokens
        for name, what, gauge in (
            ("num_requests_running", "Sequences that are read or written.", running),
            ("num_requests_waiting", "Requests that wait for rows.", totals.waiting),
            ("kv_cache_usage_perc", "Of the rows, those in use; 1 is all of them.", running / rows),
        ):
            yield GaugeMetricFamily(f"vllm:{name}", what, gauge)
        for name, what, count in (
            ("prefix_cache_queries", "Tokens of prompts.", prompts),
            ("prefix_cache_hits", "Those of them that did not have to be read.", totals.cached_tokens),
            ("prompt_tokens", "Tokens of prompts.", prompts),
            ("prompt_tokens_cached", "Those of them that did not have to be read.", totals.cached_tokens),
            ("generation_tokens", "Tokens that were written.", totals.generated_tokens),
        ):
            yield CounterMetricFamily(f"vllm:{name}", what, count)
        for known in self.metrics.under_vllms_names:
            for metric in known.collect():
                metric.name = metric.name.replace("heronry:", "vllm:")
                metric.samples = [x._replace(name=x.name.replace("heronry:", "vllm:")) for x in metric.samples]
                yield metric


class _LlamaCppNames(Collector):
    def __init__(self, metrics: Metrics, scheduler: Scheduler):
        self.metrics, self.scheduler = metrics, scheduler

    def collect(self) -> Iterable[Metric]:
        return self._metrics()

    def _metrics(self) -> Iterator[Metric]:
        totals, (reading, writing) = self.scheduler.totals, self.metrics.seconds()
        read, written, steps = totals.prompt_tokens, totals.generated_tokens, totals.steps
        for name, what, count in (
            ("prompt_tokens", "Tokens of prompts that were read.", read),
            ("prompt_seconds", "In which they were read.", reading),
            ("tokens_predicted", "Tokens that were written.", written),
            ("tokens_predicted_seconds", "In which they were written.", writing),
            ("n_decode", "Steps of a batch.", steps),
        ):
            yield CounterMetricFamily(f"llamacpp:{name}", what, count)
        for name, what, gauge in (
            ("prompt_tokens_seconds", "Tokens of prompts a second.", read / reading if reading else 0),
            (
                "predicted_tokens_seconds",
                "Tokens written a second, in one request.",
                written / writing if writing else 0,
            ),
            ("requests_processing", "Sequences that are read or written.", totals.reading + totals.decoding),
            ("requests_deferred", "Requests that wait for rows.", totals.waiting),
            ("n_busy_slots_per_decode", "Rows of a step, on average.", written / steps if steps else 0),
            ("n_tokens_max", "Tokens of the longest prompt with its completion.", self.metrics.longest),
        ):
            yield GaugeMetricFamily(f"llamacpp:{name}", what, gauge)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    return Response(generate_latest(server_of(request).metrics.registry), media_type=CONTENT_TYPE_LATEST)
