"""The names and numbers that dashboards and routers read."""

import re

import fake_engine
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gossamer.attention.second_look import Check, Quality
from gossamer.server.engine.quality import Checked
from gossamer.server.engine.records import FirstToken, RequestRecord, StepRecord
from gossamer.server.engine.request import AttentionUse
from gossamer.server.metrics import Metrics

RECORD = RequestRecord(
    finish_reason="stop", prompt_tokens=100, cached_tokens=64, generated_tokens=11, max_tokens=16, n=2, preemptions=1,
    end_to_end=3.5, queued=0.5, prefill=1.0, decode=2.0, point="exact",
    attention=AttentionUse(
        point="exact", prefill_read=30.0, prefill_possible=120.0, decode_read=8.0, decode_possible=10.0, kv_bytes=4096,
        dense_because="short",
    ),
)  # fmt: skip
TIMES = {"seconds": 0.1, "model_seconds": 0.09, "select_seconds": 0.002, "attend_seconds": 0.02}
# What Grafana boards, KEDA triggers, llm-d and the Gateway API Inference Extension ask for.
NAMES = """
vllm:num_requests_running vllm:num_requests_waiting vllm:kv_cache_usage_perc vllm:cache_config_info
vllm:prefix_cache_queries_total vllm:prefix_cache_hits_total vllm:prompt_tokens_total vllm:generation_tokens_total
vllm:prompt_tokens_cached_total vllm:prompt_tokens_by_source_total vllm:num_preemptions_total
vllm:request_success_total vllm:admission_rejections_total vllm:time_to_first_token_seconds_bucket
vllm:inter_token_latency_seconds_bucket vllm:request_time_per_output_token_seconds_bucket
vllm:e2e_request_latency_seconds_bucket vllm:request_queue_time_seconds_bucket
vllm:request_inference_time_seconds_bucket vllm:request_prefill_time_seconds_bucket
vllm:request_decode_time_seconds_bucket vllm:request_prompt_tokens_bucket vllm:request_generation_tokens_bucket
vllm:request_params_max_tokens_bucket vllm:request_prefill_kv_computed_tokens_bucket vllm:iteration_tokens_total_bucket
vllm:request_params_n_bucket vllm:request_num_preemptions_bucket vllm:gpu_cache_usage_perc
vllm:gpu_prefix_cache_hits_total vllm:gpu_prefix_cache_queries_total vllm:gpu_prefix_cache_hit_rate
gossamer:kv_bytes_held gossamer:kv_tokens_held gossamer:kv_pages_owned gossamer:kv_token_capacity
"""


@pytest.fixture
def metrics() -> Metrics:
    metrics = Metrics("m")
    metrics.watch(fake_engine.FakeEngine().stats)
    metrics.step(StepRecord(prompt_tokens=30, generated_tokens=4, sequences=5, **TIMES))
    metrics.step(StepRecord(prompt_tokens=6, generated_tokens=5, sequences=5, **TIMES))
    metrics.first_token(FirstToken(seconds=0.3))
    metrics.inter_token(0.02)
    metrics.finished(RECORD)
    metrics.rejected("max_num_queued_reqs")
    check = Check("fast", True, "0-10", 3, 1, 0)
    metrics.checked(Checked(check, Quality(recall=0.75, error=0.2, top1=0.5, density=0.1)))
    metrics.checked(Checked(check._replace(decode=False), None))
    return metrics


def numbers(metrics: Metrics) -> dict[str, float]:
    """name{labels but model_name and engine} -> value"""
    found = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            found[sample.name + "".join(f" {k}={v}" for k, v in sorted(labels.items()))] = sample.value
    return found


def test_the_names_that_others_read(metrics: Metrics) -> None:
    names = {name.split(" ")[0] for name in numbers(metrics)}
    assert set(NAMES.split()) - names == set()


def test_labels(metrics: Metrics) -> None:
    for line in metrics.text().decode().splitlines():
        if line.startswith("vllm:") and "admission" not in line:
            assert 'model_name="m"' in line and 'engine="0"' in line, line


def test_numbers(metrics: Metrics) -> None:
    seen = numbers(metrics)
    expected = {
        "vllm:num_requests_waiting": 2,
        "vllm:kv_cache_usage_perc": 0.25,
        "vllm:gpu_prefix_cache_hit_rate": 0.25,
        "vllm:prompt_tokens_total": 36 + 50,
        "vllm:prompt_tokens_by_source_total source=local_compute": 36,
        "vllm:prompt_tokens_by_source_total source=local_cache_hit": 50,
        "vllm:generation_tokens_total": 9,
        "vllm:iteration_tokens_total_sum": 45,
        "vllm:request_success_total finished_reason=stop": 1,
        "vllm:admission_rejections_total reason=max_num_queued_reqs": 1,
        "vllm:request_prefill_kv_computed_tokens_sum": 36,
        "vllm:request_time_per_output_token_seconds_sum": 0.2,
        "vllm:request_inference_time_seconds_sum": 3.0,
        "vllm:cache_config_info block_size=64 cache_dtype=bfloat16 num_gpu_blocks=100": 1,
        "gossamer:requests_total point=exact": 1,
        "gossamer:attention_pages_read_total phase=prefill point=exact": 30,
        "gossamer:attention_pages_possible_total phase=prefill point=exact": 120,
        "gossamer:attention_density_sum phase=prefill point=exact": 0.25,
        "gossamer:attention_density_sum phase=decode point=exact": 0.8,
        "gossamer:dense_requests_total point=exact reason=short": 1,
        "gossamer:step_select_seconds_sum": 0.004,
        "gossamer:step_attend_seconds_sum": 0.04,
        "gossamer:kv_tokens_held rule=all": 7 * 64,
        "gossamer:kv_bytes_held rule=all": 7 * 4096,
        "gossamer:kv_bytes_held rule=sink64+recent256": 5 * 4096,
        "gossamer:kv_pages_cached rule=all": 3,
        "gossamer:quality_recall_sum layers=0-10 phase=decode point=fast": 0.75,
        "gossamer:quality_output_error_sum layers=0-10 phase=decode point=fast": 0.2,
        "gossamer:quality_output_error_count layers=0-10 phase=decode point=fast": 1,
        "gossamer:quality_top1_agreement_sum layers=0-10 phase=decode point=fast": 0.5,
        "gossamer:quality_unchecked_total layers=0-10 phase=prefill point=fast": 1,
        "gossamer:quality_alarm point=fast": 1,
        "gossamer:quality_alarm point=exact": 0,
    }
    assert {name: seen[name] for name in expected} == pytest.approx(expected)


def test_buckets_are_those_of_the_dashboards(metrics: Metrics) -> None:
    edges = re.findall(r'vllm:time_to_first_token_seconds_bucket\{.*?le="([^"]+)"', metrics.text().decode())
    assert edges[:3] == ["0.001", "0.005", "0.01"] and edges[-2:] == ["2560.0", "+Inf"]


def test_two_servers_in_one_process_do_not_meet(metrics: Metrics) -> None:
    other = Metrics("other")
    assert numbers(other)["vllm:generation_tokens_total"] == 0
