"""Counts Prometheus metrics under vLLM's names, and the programs compiled since the server was ready."""

import collections
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import prometheus_client as prometheus
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from stages.serve.engine_thread import EngineThread

prometheus.disable_created_metrics()  # no series of creation times

# Upper bounds of the buckets as in vLLM, in seconds: to the first token.
TTFT_BUCKETS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
)
# In seconds, for each token after it.
TPOT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
# In seconds, for a whole request.
LATENCY_BUCKETS = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
# In tokens.
TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


class ServerMetrics(Collector):
    """The metrics, in a registry of their own: two servers in one process share none.

    Those of the engine are read when they are asked for; the others are counted here. `adapters`:
    those that are served, by name; they may change. `training_flops`: as of ServerState.
    """

    def __init__(
        self,
        model: str,
        engine: EngineThread,
        adapters: Mapping[str, Any],
        training_flops: int | None = None,
    ) -> None:
        self._engine = engine
        self._adapters = adapters
        self._registry = registry = prometheus.CollectorRegistry()
        of_model: dict[str, Any] = {"labelnames": ["model_name"], "registry": registry}

        def counter(name: str, about: str) -> prometheus.Counter:
            return prometheus.Counter(name, about, **of_model).labels(model)

        def histogram(name: str, about: str, buckets: Sequence[float]) -> prometheus.Histogram:
            return prometheus.Histogram(name, about, buckets=buckets, **of_model).labels(model)

        def gauge(name: str, about: str, value: Callable[[], float]) -> None:
            prometheus.Gauge(name, about, **of_model).labels(model).set_function(value)

        self.generated = counter("vllm:generation_tokens", "Tokens that were generated.")
        self._prompt_tokens = counter(
            "vllm:prompt_tokens", "Tokens of prompts that were computed or found in the prefix cache."
        )
        self._cache_lookups = counter("vllm:prefix_cache_queries", "Tokens looked up in the prefix cache.")
        self._cache_hits = counter("vllm:prefix_cache_hits", "Tokens of prompts that the prefix cache held.")
        self._prompt_lengths = histogram("vllm:request_prompt_tokens", "Tokens of a prompt.", TOKEN_BUCKETS)
        self._completion_lengths = histogram(
            "vllm:request_generation_tokens", "Tokens generated for a request.", TOKEN_BUCKETS
        )
        self._request_seconds = histogram(
            "vllm:e2e_request_latency_seconds", "From request to last token.", LATENCY_BUCKETS
        )
        self.ttft = histogram(
            "vllm:time_to_first_token_seconds", "From request to first token.", TTFT_BUCKETS
        )
        self._seconds_per_token = histogram(
            "vllm:time_per_output_token_seconds", "Mean between tokens of a request.", TPOT_BUCKETS
        )
        success = prometheus.Counter(
            "vllm:request_success",
            "Completions by why they ended.",
            ["model_name", "finished_reason"],
            registry=registry,
        )
        self._ends = {
            reason: success.labels(model, reason) for reason in ("stop", "length", "abort", "error")
        }
        self._responses = collections.Counter[int]()
        gauge("vllm:num_requests_running", "Requests that have a slot.", lambda: engine.engine.running)
        gauge("vllm:num_requests_waiting", "Requests that wait for a slot.", lambda: engine.waiting)
        for name in ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"):  # the second is its older name
            gauge(
                name, "Share of all slots' positions that is filled, 1 is all.", lambda: engine.kv_cache_usage
            )
        gauge(
            "thrice_seconds_since_engine_tick",
            "Since the engine thread's last tick.",
            lambda: engine.seconds_since_tick,
        )
        if training_flops is not None:
            gauge("thrice_training_flops", "Of the run that trained the model.", lambda: training_flops)
        registry.register(self)
        prometheus.ProcessCollector(registry=registry)

    def collect(self) -> list[Metric]:
        """Returns the metrics that no object of the library counts; the registry asks for them."""
        compiles = CounterMetricFamily(
            "thrice_compiles_after_ready",
            "Programs compiled since the server was ready.",
            value=self._engine.compiles_after_ready,
        )
        responses = CounterMetricFamily("thrice_responses", "HTTP responses by status.", labels=["status"])
        for status, count in sorted(self._responses.items()):
            responses.add_metric([str(status)], count)
        return [compiles, responses, *self._meter(), self._cache_info(), *self._adapter_info()]

    def _meter(self) -> list[Metric]:
        """Returns what the engine has computed, and for how long: see Meter."""
        meter = self._engine.engine.meter
        flops = CounterMetricFamily(
            "thrice_serving_flops", "FLOPs that the engine has computed, by what for.", labels=["what_for"]
        )
        flops.add_metric(["requests"], meter.request_flops)
        flops.add_metric(["dropped tokens"], meter.dropped_flops)
        flops.add_metric(["idle rows"], meter.idle_flops)
        seconds = CounterMetricFamily(
            "thrice_engine_busy_seconds", "Seconds that the engine's steps have taken.", value=meter.seconds
        )
        return [flops, seconds]

    def _cache_info(self) -> Metric:
        """Returns how many tokens the prefix cache compares at once, and how many such pieces fit
        into all slots: a router of Kubernetes' gateway API reads both by vLLM's names.
        """
        engine = self._engine.engine
        chunk = engine.config.chunk
        labels = {"block_size": chunk, "num_gpu_blocks": engine.config.slots * engine.capacity // chunk}
        info = GaugeMetricFamily("vllm:cache_config_info", "Sizes of the KV cache.", labels=[*labels])
        info.add_metric([str(value) for value in labels.values()], 1)
        return info

    def _adapter_info(self) -> list[Metric]:
        """Returns which adapters are served, at this time; nothing where none can be."""
        most = self._engine.engine.config.adapters
        if not most:
            return []
        labels = {
            "max_lora": str(most),
            "running_lora_adapters": ",".join(sorted(self._adapters)),
            "waiting_lora_adapters": "",  # an adapter is served once it is there
        }
        about = "The adapters that are served, and when this was so, in seconds since 1970."
        info = GaugeMetricFamily("vllm:lora_requests_info", about, labels=[*labels])
        info.add_metric([*labels.values()], time.time())
        return [info]

    def count_response(self, status: int) -> None:
        self._responses[status] += 1

    def count_end(self, reason: str) -> None:
        """Counts a completion that has ended: stop, length, abort or error."""
        self._ends[reason].inc()

    def count_prompt(self, tokens: int, looked_up: int, cached: int) -> None:
        """Counts the tokens of a prompt, those looked up in the prefix cache, and those that it held."""
        self._prompt_tokens.inc(tokens)
        self._cache_lookups.inc(looked_up)
        self._cache_hits.inc(cached)

    def count_completion(self, prompt: int, generated: int, seconds: float, decoding: float) -> None:
        """Counts a completion that was not cut off.

        `prompt`, `generated`: its tokens. `seconds`: from request to last token. `decoding`: from
        first token to last.
        """
        self._prompt_lengths.observe(prompt)
        self._completion_lengths.observe(generated)
        self._request_seconds.observe(seconds)
        if generated > 1:
            self._seconds_per_token.observe(decoding / (generated - 1))

    def text(self) -> bytes:
        return prometheus.generate_latest(self._registry)
