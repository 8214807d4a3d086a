"""From a ServerConfig to an engine that is ready to start. Every refusal is a StartupError of one sentence."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from gossamer.attention.artefacts import Artefacts
from gossamer.attention.packaged import find_policy_file, packaged_for
from gossamer.attention.policy import AttentionPolicy, dense_policy, within_windows
from gossamer.attention.policy_file import PolicyError, check_model, load_policy_file
from gossamer.attention.quality import QualitySampler
from gossamer.kernels.dense_prefill import LEAST_QUERIES
from gossamer.kernels.fp8 import FP8
from gossamer.kernels.layout import PAGE_SIZE
from gossamer.kernels.native import compile_all
from gossamer.kvcache.cache import KVCache
from gossamer.kvcache.groups import HeadGroup, group_heads
from gossamer.kvcache.sizing import Sizing, bytes_per_page, longest_sequence, size_pools
from gossamer.kvcache.summaries import shapes_by_group
from gossamer.server.config import ServerConfig
from gossamer.server.engine.admission import QueueLoad
from gossamer.server.engine.engine import Engine, ModelCard
from gossamer.server.engine.executor import Executor
from gossamer.server.engine.families import StartupError
from gossamer.server.engine.graphs import CudaRecorder, DecodeGraphs
from gossamer.server.engine.loop import Loop
from gossamer.server.engine.memory import cache_memory
from gossamer.server.engine.model import Model, load_config, load_model
from gossamer.server.engine.observer import Observer, Sheltered
from gossamer.server.engine.pace import Pace
from gossamer.server.engine.quality import Bounds, Guard
from gossamer.server.engine.sampler import Sampler
from gossamer.server.engine.scheduler import Limits, Scheduler
from gossamer.server.engine.tokenizer import Tokenizer

CPU_STEP_TOKENS = 2048
GPU_STEP_TOKENS = 8192
ACTIVATION_COPIES = 4  # of a step's widest activation that may live at once


def build_engine(
    config: ServerConfig,
    metrics: Observer,
    report: Callable[[str], None],
    choose: Callable[[Model], AttentionPolicy] | None = None,
) -> Engine:
    """Load the model, check the policy, size the cache. `report` gets a line of progress at a time. `choose`: which
    policy, in place of the one that `config` names."""
    device = _device(config.device)
    with _alone(device, config.threads or torch.get_num_threads()):
        return _build(config, metrics, report, choose, device)


@contextmanager
def _alone(device: torch.device, threads: int) -> Iterator[None]:
    """Before the engine runs on a CPU, compute in one thread; from then on in so many.

    A thread that has once computed in parallel keeps OpenMP's helpers for ever. GNU's OpenMP lets them all wait asleep
    as soon as they outnumber the cores, and waking them costs more than a small operation takes: so the engine's
    thread is to be the only one that has any.
    """
    torch.set_num_threads(1 if device.type == "cpu" else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _build(
    config: ServerConfig,
    metrics: Observer,
    report: Callable[[str], None],
    choose: Callable[[Model], AttentionPolicy] | None,
    device: torch.device,
) -> Engine:
    path = config.model_path
    load_config(path, config.revision)  # a checkpoint that cannot be served is refused for that, not for its tokenizer
    try:
        tokenizer = Tokenizer.load(
            config.tokenizer or path, revision=config.revision, chat_template=config.chat_template
        )
    except ValueError as error:
        raise StartupError(str(error)) from error
    model = load_model(
        path,
        revision=config.revision,
        dtype=config.dtype,
        device=device,
        served_length=config.max_model_len,
        dummy=config.load_format == "dummy",
        fused=config.fused_kernels,
        report=report,
    )
    policy = attention_policy(config, model, report) if choose is None else choose(model)
    return assemble(config, model, tokenizer, policy, metrics, report)


def assemble(
    config: ServerConfig,
    model: Model,
    tokenizer: Tokenizer,
    policy: AttentionPolicy,
    metrics: Observer,
    report: Callable[[str], None],
    *,
    audit: bool = False,
    ahead: bool | None = None,
) -> Engine:
    """Size the cache and put the parts together. `audit`: check the books after every step. `ahead`: launch each step
    before the one before it is read; as configured on a GPU unless given, and else not, since a launch on a CPU returns
    when all is computed."""
    shape = model.shape
    default = config.attention_point or policy.names[0]
    step_tokens = config.max_num_batched_tokens or (CPU_STEP_TOKENS if model.device.type == "cpu" else GPU_STEP_TOKENS)
    if step_tokens < config.max_num_seqs:
        raise StartupError(
            f"--max-num-batched-tokens ({step_tokens}) must be at least --max-num-seqs ({config.max_num_seqs}): "
            "every running sequence takes one token of a step."
        )
    groups = group_heads(policy.rules())
    sizing, longest = _size_cache(config, model, policy, groups, step_tokens)
    kept = "float8_e4m3fn" if config.fp8_cache else str(model.dtype).removeprefix("torch.")
    report(f"KV cache: room for {sizing.token_capacity} tokens in {sum(sizing.num_pages)} pages ({kept})")
    try:
        cache = KVCache(
            groups,
            sizing.num_pages,
            ratio=shape.ratio,
            head_dim=shape.head_dim,
            dtype=model.dtype,
            device=model.device,
            prefix_caching=config.enable_prefix_caching,
            summaries=policy.summaries(),
            fp8=config.fp8_cache,
        )
    except (RuntimeError, MemoryError) as error:  # torch raises RuntimeError for memory that is not there
        raise StartupError(
            f"There is not enough memory for a KV cache of {sizing.token_capacity} tokens; lower --kv-cache-memory."
        ) from error
    limits = Limits(config.max_num_seqs, step_tokens, config.max_step_seconds)
    scheduler = Scheduler(cache, limits, Pace(shape.attention_crossover), config.enable_prefix_caching)
    load = QueueLoad(config.queued_requests, config.max_queued_tokens or 4 * max(sizing.token_capacity, longest))
    if ahead is None:
        ahead = config.async_scheduling and model.device.type == "cuda"
    quality = QualitySampler(config.quality_sample_rate, shape.windows) if config.quality_sample_rate else None
    guard = Guard(Bounds(config.quality_min_recall, config.quality_max_error), policy, config.quality_fall_back)
    executor = Executor(model, cache, Sampler(), quality=quality)
    loop = Loop(scheduler, executor, load, Sheltered(metrics), guard, audit, ahead)
    card = ModelCard(
        name=config.names[0],
        names=config.names,
        max_model_len=longest,
        vocab_size=shape.vocab_size,
        created=int(time.time()),
        root=config.model,
        default_sampling=model.default_sampling if config.generation_config == "auto" else {},
    )
    engine = Engine(
        card=card,
        tokenizer=tokenizer,
        policy=policy,
        default_point=default,
        allowed_points=tuple(config.attention_allow_points) or policy.names,
        cache=cache,
        loop=loop,
        eos_ids=model.eos_ids,
        token_capacity=sizing.token_capacity,
        seed=config.seed,
    )
    if model.device.type == "cpu":
        report("Compiling kernels")
        compile_all(model.dtype)
    else:
        _prepare(engine, loop.executor, config, min(step_tokens, longest - 1), -(-longest // PAGE_SIZE), report)
    return engine


def _prepare(
    engine: Engine, executor: Executor, config: ServerConfig, tokens: int, pages: int, report: Callable[[str], None]
) -> None:
    """Compile the kernels and record decode steps, before the first request comes. Prompts keep the memory that the
    longest step needs."""
    device, cache = executor.model.device, executor.cache
    report("Compiling kernels")
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        for prompt in (tokens, min(tokens, LEAST_QUERIES - 1)):  # torch's attention, and ours
            if prompt > 0:
                engine.warm_up(prompt)
    except torch.OutOfMemoryError as error:
        raise StartupError(
            f"There is not enough memory for a step of {tokens} tokens beside the KV cache; lower "
            "--gpu-memory-utilization, --kv-cache-memory or --max-num-batched-tokens."
        ) from error
    if config.cuda_graphs:
        points = tuple(engine.point(name) for name in dict.fromkeys((engine.default_point, *engine.points)))
        needed = torch.cuda.max_memory_allocated(device) - before
        executor.graphs = DecodeGraphs(
            executor.model, cache, config.max_num_seqs, pages, points, CudaRecorder(), kept_free=needed
        )
        executor.graphs.record_ahead(report)


def _size_cache(
    config: ServerConfig, model: Model, policy: AttentionPolicy, groups: Sequence[HeadGroup], step_tokens: int
) -> tuple[Sizing, int]:
    """Pages per group, and the longest sequence to serve: as asked for, or what the model can and memory holds."""
    shape = model.shape
    reserve = ACTIVATION_COPIES * step_tokens * shape.activation_width * model.dtype.itemsize
    # dense_prefill copies the keys and values of one layer of one sequence; FP8 ones once as they are.
    longest_possible = config.max_model_len or shape.max_positions
    copied = 2 * model.dtype.itemsize + (FP8.itemsize if config.fp8_cache else 0)
    reserve += longest_possible * shape.kv_heads * shape.head_dim * copied
    memory = config.kv_cache_memory or cache_memory(model.device, config.gpu_memory_utilization, reserve)
    rules = [
        [point.heads[layer][heads[0]].keep for layer, heads in (g.slots[0] for g in groups)] for point in policy.points
    ]
    tables = shapes_by_group(groups, policy.summaries(), PAGE_SIZE, shape.head_dim)
    page_bytes = [
        bytes_per_page(group, shape.head_dim, model.dtype, own, fp8=config.fp8_cache)
        for group, own in zip(groups, tables, strict=True)
    ]
    wanted = config.max_model_len or shape.max_positions
    if config.max_model_len is not None and config.max_model_len > shape.max_positions:
        raise StartupError(
            f"--max-model-len {config.max_model_len} exceeds the model's {shape.max_positions} positions; lower it."
        )
    longest = wanted
    if config.max_model_len is None:
        longest = longest_sequence(memory, rules, page_bytes, wanted, step_tokens)
    if longest == 0:
        raise StartupError(
            f"The KV cache would get {memory / 2**20:.0f} MiB, which holds not one page; raise --kv-cache-memory."
        )
    if config.kv_cache_memory is None and model.device.type == "cpu":
        # More than all sequences can fill is never used.
        most = sum(-(-longest // PAGE_SIZE) * size for size in page_bytes) * config.max_num_seqs * 2
        memory = min(memory, most)
    try:
        return size_pools(memory, groups, rules, page_bytes, config.max_num_seqs, longest, step_tokens), longest
    except ValueError as error:
        raise StartupError(f"{error} The options are --max-model-len and --kv-cache-memory.") from error


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise StartupError(
            "--device cuda was asked for, but torch sees no GPU; use --device cpu, or install torch with CUDA."
        )
    return torch.device(name)


def attention_policy(config: ServerConfig, model: Model, report: Callable[[str], None]) -> AttentionPolicy:
    """The policy asked for, or the one packaged for this model, or dense; within the windows of the model's layers."""
    policy = within_windows(_find_policy(config, model, report), model.shape.windows)
    for point in (config.attention_point, *config.attention_allow_points):
        if point is not None and point not in policy.names:
            raise StartupError(
                f"The policy {policy.name!r} has no operating point {point!r}; it has: {', '.join(policy.names)}."
            )
    if config.attention_allow_points:  # what nobody can choose needs no memory
        served = (config.attention_point or policy.names[0], *config.attention_allow_points)
        policy = AttentionPolicy(policy.name, tuple(point for point in policy.points if point.name in served))
    return policy


def _find_policy(config: ServerConfig, model: Model, report: Callable[[str], None]) -> AttentionPolicy:
    shape, asked = model.shape, config.attention_policy
    dense = dense_policy(shape.layers, shape.kv_heads)
    if asked == "dense":
        return dense
    try:
        file = _own_policy(config.model_path, report) if asked is None else find_policy_file(asked)
        if file is None:
            return dense
        entry = load_policy_file(file)
        check_model(
            entry,
            model_type=model.family,
            layers=shape.layers,
            kv_heads=shape.kv_heads,
            query_heads=shape.query_heads,
            head_dim=shape.head_dim,
        )
        return entry.policy(Artefacts(file.parent, model.device))
    except PolicyError as error:
        raise StartupError(str(error)) from error


def _own_policy(model_path: str, report: Callable[[str], None]) -> Path | None:
    """The packaged policy of this model. One that was imported, which nobody here has verified, is only mentioned."""
    file = packaged_for(model_path)
    if file is not None and load_policy_file(file).provenance.source == "imported":
        report(f"Attention is dense; a published profile comes along, not verified: --attention-policy {file.stem}")
        return None
    return file
