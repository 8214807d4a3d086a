"""Prometheus metrics: vLLM's names for what dashboards, autoscalers and routers read, ours under `gossamer:`."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from gossamer.kernels.layout import PAGE_SIZE
from gossamer.server.engine.quality import Checked
from gossamer.server.engine.records import EngineStats, FirstToken, RequestRecord, RuleStats, StepRecord
from gossamer.server.engine.request import AttentionUse

_FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
_PER_TOKEN = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
_REQUEST = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip
_STEP = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_LENGTHS = tuple(m * 10**e for e in range(7) for m in (1, 2, 5))
_STEP_TOKENS = (1, *(2**e for e in range(3, 15)))
_SHARE = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 0.99)
_RECALL = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 1)
_ERROR = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2)
_LABELS = ("model_name", "engine")
_CHECK_LABELS = ("point", "phase", "layers")


class Metrics:
    """What the engine and the API count. Every method is cheap and may be called from any thread.

    Counters are made for one model name; no label ever holds what a client made up.
    """

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._labels = {"model_name": model_name, "engine": "0"}
        self._model_name = model_name
        self._first_token = self._histogram("vllm:time_to_first_token_seconds", "Arrival to first token.", _FIRST_TOKEN)
        self._inter_token = self._histogram("vllm:inter_token_latency_seconds", "Between two tokens.", _PER_TOKEN)
        self._per_token = self._histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time per token after the first, by request.", _PER_TOKEN
        )
        self._end_to_end = self._histogram("vllm:e2e_request_latency_seconds", "Arrival to last token.", _REQUEST)
        self._queued = self._histogram("vllm:request_queue_time_seconds", "Arrival to first admission.", _REQUEST)
        self._inference = self._histogram("vllm:request_inference_time_seconds", "Admission to last token.", _REQUEST)
        self._prefill = self._histogram("vllm:request_prefill_time_seconds", "Admission to first token.", _REQUEST)
        self._decode = self._histogram("vllm:request_decode_time_seconds", "First token to last.", _REQUEST)
        self._prompt = self._histogram("vllm:request_prompt_tokens", "Prompt tokens of a choice.", _LENGTHS)
        self._generated = self._histogram("vllm:request_generation_tokens", "Tokens of a choice.", _LENGTHS)
        self._max_tokens = self._histogram("vllm:request_params_max_tokens", "max_tokens of a choice.", _LENGTHS)
        self._computed = self._histogram(
            "vllm:request_prefill_kv_computed_tokens", "Prompt tokens of a choice that no cache had.", _LENGTHS
        )
        self._n = self._histogram("vllm:request_params_n", "n of a choice's request.", (1, 2, 5, 10, 20))
        self._preempted = self._histogram(
            "vllm:request_num_preemptions", "How often a choice was preempted.", (0, 1, 2, 3, 4, 5, 10, 20)
        )
        self._step_tokens = self._histogram("vllm:iteration_tokens_total", "Tokens of a step.", _STEP_TOKENS)
        self._step = self._histogram("gossamer:step_seconds", "Time of a step.", _STEP)
        self._model = self._histogram(
            "gossamer:step_model_seconds", "Time of a step inside the model (on a GPU: to launch it).", _STEP
        )
        self._select = self._histogram(
            "gossamer:step_select_seconds", "Time of a step spent choosing keys (on a CPU).", _STEP
        )
        self._attend = self._histogram(
            "gossamer:step_attend_seconds", "Time of a step inside attention, keys chosen (on a CPU).", _STEP
        )
        self._prompt_tokens_computed = 0  # written by the engine's thread alone
        self._generated_total = self._counter("vllm:generation_tokens", "Tokens generated.")
        self._finished = Counter(
            "vllm:request_success",
            "Choices that ended, by reason.",
            (*_LABELS, "finished_reason"),
            registry=self.registry,
        )
        self._by_point = Counter(
            "gossamer:requests", "Choices that ended, by operating point.", (*_LABELS, "point"), registry=self.registry
        )
        self._pages_read = self._by_phase(
            "gossamer:attention_pages_read", "Pages that attention read, per query and head."
        )
        self._pages_possible = self._by_phase(
            "gossamer:attention_pages_possible", "Pages that attention could have read, per query and head."
        )
        self._density = Histogram(
            "gossamer:attention_density",
            "Share of the possible pages that the attention of a choice read.",
            (*_LABELS, "point", "phase"),
            buckets=_SHARE,
            registry=self.registry,
        )
        self._dense = Counter(
            "gossamer:dense_requests",
            "Choices whose attention left nothing out, by reason: the policy, or too short for it.",
            (*_LABELS, "point", "reason"),
            registry=self.registry,
        )
        self._recall = self._of_checks(
            "gossamer:quality_recall", "Share of the dense attention mass that was read, by check.", _RECALL
        )
        self._error = self._of_checks(
            "gossamer:quality_output_error", "Distance of a head's output from dense, relative, by check.", _ERROR
        )
        self._top1 = self._of_checks(
            "gossamer:quality_top1_agreement",
            "Share of a check's queries whose heaviest key was read.",
            _RECALL,
        )
        self._unchecked = Counter(
            "gossamer:quality_unchecked",
            "Checks that could not be made, mostly as the head had given keys back.",
            (*_LABELS, *_CHECK_LABELS),
            registry=self.registry,
        )
        self._rejected = Counter(
            "vllm:admission_rejections", "Requests turned away.", ("model_name", "reason"), registry=self.registry
        )
        self._http = Counter("gossamer:http_requests", "HTTP answers.", ("route", "status"), registry=self.registry)

    def watch(self, stats: Callable[[], EngineStats]) -> None:
        """Ask `stats` for the engine's state at every scrape. Called once."""
        self.registry.register(_State(stats, self._labels, lambda: self._prompt_tokens_computed))

    def step(self, record: StepRecord) -> None:
        self._prompt_tokens_computed += record.prompt_tokens
        self._generated_total.inc(record.generated_tokens)
        self._step_tokens.observe(record.prompt_tokens + record.generated_tokens)
        self._step.observe(record.seconds)
        self._model.observe(record.model_seconds)
        if record.select_seconds + record.attend_seconds > 0:
            self._select.observe(record.select_seconds)
            self._attend.observe(record.attend_seconds)

    def first_token(self, record: FirstToken) -> None:
        self._first_token.observe(record.seconds)

    def inter_token(self, seconds: float) -> None:
        self._inter_token.observe(seconds)

    def finished(self, record: RequestRecord) -> None:
        self._finished.labels(**self._labels, finished_reason=record.finish_reason).inc()
        self._by_point.labels(**self._labels, point=record.point).inc()
        self._note_attention(record.attention)
        self._end_to_end.observe(record.end_to_end)
        self._queued.observe(record.queued)
        self._inference.observe(record.prefill + record.decode)
        self._prefill.observe(record.prefill)
        self._decode.observe(record.decode)
        if record.generated_tokens > 1:
            self._per_token.observe(record.decode / (record.generated_tokens - 1))
        self._prompt.observe(record.prompt_tokens)
        self._generated.observe(record.generated_tokens)
        self._max_tokens.observe(record.max_tokens)
        self._computed.observe(record.prompt_tokens - record.cached_tokens)
        self._n.observe(record.n)
        self._preempted.observe(record.preemptions)

    def _note_attention(self, use: AttentionUse) -> None:
        for phase, read, possible in (
            ("prefill", use.prefill_read, use.prefill_possible),
            ("decode", use.decode_read, use.decode_possible),
        ):
            labels = {**self._labels, "point": use.point, "phase": phase}
            if possible:
                self._pages_read.labels(**labels).inc(read)
                self._pages_possible.labels(**labels).inc(possible)
                self._density.labels(**labels).observe(read / possible)
        if use.dense_because is not None:
            self._dense.labels(**self._labels, point=use.point, reason=use.dense_because).inc()

    def checked(self, checked: Checked) -> None:
        check, quality = checked.check, checked.quality
        labels = {**self._labels, "point": check.point, "phase": checked.phase, "layers": check.layers}
        if quality is None:
            self._unchecked.labels(**labels).inc()
            return
        self._recall.labels(**labels).observe(quality.recall)
        self._error.labels(**labels).observe(quality.error)
        self._top1.labels(**labels).observe(quality.top1)

    def rejected(self, reason: str) -> None:
        self._rejected.labels(model_name=self._model_name, reason=reason).inc()

    def http(self, route: str, status: int) -> None:
        """`route` is the pattern of a route, never a path as the client wrote it."""
        self._http.labels(route=route, status=str(status)).inc()

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, help, _LABELS, buckets=buckets, registry=self.registry).labels(**self._labels)

    def _of_checks(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, help, (*_LABELS, *_CHECK_LABELS), buckets=buckets, registry=self.registry)

    def _by_phase(self, name: str, help: str) -> Counter:
        return Counter(name, help, (*_LABELS, "point", "phase"), registry=self.registry)

    def _counter(self, name: str, help: str) -> Counter:
        return Counter(name, help, _LABELS, registry=self.registry).labels(**self._labels)


class _State(Collector):
    """The engine's state, read when someone asks."""

    def __init__(self, stats: Callable[[], EngineStats], labels: dict[str, str], computed: Callable[[], float]) -> None:
        self._stats = stats
        self._labels = labels
        self._computed = computed

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        yield self._gauge("vllm:num_requests_running", "Choices in the batch.", stats.running)
        yield self._gauge("vllm:num_requests_waiting", "Choices that wait.", stats.waiting)
        for name in ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"):
            yield self._gauge(name, "Share of the fullest pool of pages in use, 0 to 1.", stats.kv_usage)
        # vllm:gpu_… are older names of the same numbers, which some routers still read.
        for name in ("vllm:prefix_cache_queries", "vllm:gpu_prefix_cache_queries"):
            yield self._total(name, "Prompt tokens looked up for reuse.", stats.prefix_queried_tokens)
        for name in ("vllm:prefix_cache_hits", "vllm:gpu_prefix_cache_hits", "vllm:prompt_tokens_cached"):
            yield self._total(name, "Prompt tokens reused.", stats.prefix_hit_tokens)
        rate = stats.prefix_hit_tokens / stats.prefix_queried_tokens if stats.prefix_queried_tokens else 0.0
        yield self._gauge("vllm:gpu_prefix_cache_hit_rate", "Reused share of the tokens looked up.", rate)
        yield self._total("vllm:num_preemptions", "Preemptions.", stats.preemptions)
        yield from self._prompt_tokens(stats)
        yield from self._cache(stats)
        yield self._gauge(
            "gossamer:pending_prefill_tokens", "Prompt tokens not computed yet.", stats.pending_prefill_tokens
        )
        yield self._gauge(
            "gossamer:engine_heartbeat_age_seconds", "Since the engine's loop turned.", stats.heartbeat_age
        )
        alarms = GaugeMetricFamily(
            "gossamer:quality_alarm",
            "1 where live checks of an operating point have crossed a bound.",
            labels=[*_LABELS, "point"],
        )
        for point, crossed in stats.alarms.items():
            alarms.add_metric([*self._labels.values(), point], float(crossed))
        yield alarms

    def _prompt_tokens(self, stats: EngineStats) -> Iterator[Metric]:
        computed = self._computed()
        yield self._total(
            "vllm:prompt_tokens", "Prompt tokens, computed or reused.", computed + stats.prefix_hit_tokens
        )
        family = CounterMetricFamily(
            "vllm:prompt_tokens_by_source", "Prompt tokens by where their keys came from.", labels=[*_LABELS, "source"]
        )
        for source, value in (("local_compute", computed), ("local_cache_hit", stats.prefix_hit_tokens)):
            family.add_metric([*self._labels.values(), source], value)
        yield family

    def _cache(self, stats: EngineStats) -> Iterator[Metric]:
        yield self._gauge("gossamer:kv_token_capacity", "Tokens that fit into the KV cache.", stats.kv_token_capacity)
        about = {
            "block_size": str(PAGE_SIZE),
            "num_gpu_blocks": str(stats.kv_token_capacity // PAGE_SIZE),
            "cache_dtype": stats.kv_dtype,
        }
        info = GaugeMetricFamily("vllm:cache_config_info", "The cache.", labels=[*_LABELS, *about])
        info.add_metric([*self._labels.values(), *about.values()], 1)
        yield info
        numbers: tuple[tuple[str, str, Callable[[RuleStats], float]], ...] = (
            ("gossamer:kv_pages", "Pages of the rule's pool.", lambda rule: rule.pages),
            ("gossamer:kv_pages_owned", "Pages that running sequences hold.", lambda rule: rule.pages_owned),
            ("gossamer:kv_pages_cached", "Pages kept for reuse only.", lambda rule: rule.pages_cached),
            ("gossamer:kv_tokens_held", "Tokens in owned pages.", lambda rule: rule.pages_owned * PAGE_SIZE),
            ("gossamer:kv_bytes_held", "Bytes of owned pages.", lambda rule: rule.bytes_owned),
            ("gossamer:kv_bytes", "Bytes of the rule's pool.", lambda rule: rule.pages * rule.bytes_per_page),
        )
        for name, help, number in numbers:
            family = GaugeMetricFamily(name, help, labels=[*_LABELS, "rule"])
            sums: dict[str, float] = {}
            for rule in stats.rules:  # pools whose heads have one rule now may be several
                sums[rule.rule] = sums.get(rule.rule, 0) + number(rule)
            for label, value in sums.items():
                family.add_metric([*self._labels.values(), label], value)
            yield family

    def _gauge(self, name: str, help: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, help, labels=_LABELS)
        family.add_metric(list(self._labels.values()), value)
        return family

    def _total(self, name: str, help: str, value: float) -> Metric:
        family = CounterMetricFamily(name, help, labels=_LABELS)
        family.add_metric(list(self._labels.values()), value)
        return family
