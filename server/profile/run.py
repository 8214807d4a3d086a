"""Loads the model, runs the profiler, writes what it found."""

import hashlib
import re
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from gossamer import __version__
from gossamer.attention.policy_file import ModelEntry
from gossamer.attention.policy_yaml import to_yaml
from gossamer.attention.profiling.device_times import load_device_profile, save_device_profile
from gossamer.attention.profiling.gate_training import rotary_of
from gossamer.attention.profiling.profile import Profile, Settings
from gossamer.attention.profiling.profiler import COMMAND, Profiler
from gossamer.attention.profiling.reading import shape_of
from gossamer.attention.profiling.report import write_report
from gossamer.attention.profiling.state import State
from gossamer.attention.profiling.subject import Progress, Subject
from gossamer.attention.profiling.tasks import Filler, Split
from gossamer.attention.profiling.text import library_lines
from gossamer.server.bench.provenance import provenance
from gossamer.server.config import ServerConfig
from gossamer.server.engine.families import StartupError
from gossamer.server.engine.graphs import CudaRecorder
from gossamer.server.engine.model import load_config, load_model
from gossamer.server.engine.tokenizer import Tokenizer

CHUNKS = {"cpu": 2048, "cuda": 8192}
SPLIT_LINES = 10  # of a user's own text every tenth stretch is kept for verification
STRETCH = 200  # lines


@dataclass(frozen=True, slots=True)
class Job:
    """What the command was asked for. data: a text file to read instead of Python's library. device_profile: a file
    that an earlier run wrote."""

    config: ServerConfig
    settings: Settings
    out: Path
    data: Path | None
    device_profile: Path | None

    @property
    def name(self) -> str:
        """Of the policy, and what the names of its files begin with."""
        return re.sub(r"[^A-Za-z0-9._-]", "-", self.out.name.removesuffix(self.out.suffix))[:48] or "policy"

    def beside(self, ending: str) -> Path:
        return self.out.with_name(f"{self.name}{ending}")


def profile(job: Job, progress: Progress) -> Profile:
    """Profile and write; every file lies beside the policy. Raises StartupError, DeviceProfileError or ValueError with
    one sentence."""
    config = job.config
    device_profile = load_device_profile(job.device_profile) if job.device_profile else None
    lines, data = held_out_text(job.data)
    subject = _subject(config, lines, progress)
    shape = subject.shape
    if device_profile and (device_profile.ratio, device_profile.head_dim) != (shape.ratio, shape.head_dim):
        raise StartupError(
            f"The device profile {job.device_profile} is for {device_profile.ratio} query heads of "
            f"{device_profile.head_dim} channels per KV head, but this model has {shape.ratio} of {shape.head_dim}; "
            "leave --device-profile out to measure."
        )
    if not shape.free:
        raise StartupError("Every layer of this model has a sliding window of its own; there is nothing to choose.")
    about = {
        "model": config.model,
        "weights": weights_digest(config.model_path),
        "data": data,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "gossamer": __version__,
    }
    stable = dict(about)
    made = provenance(shape.device.type)
    about |= {
        "commit": made["commit"],
        "machine": f"{made['device']}, {made['threads']} threads",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        COMMAND: made["command"],
    }
    found_by = replace(job.settings, bounds=(), compare=False, goal="latency", memory=None, train_heads=False)
    state = State(job.out.with_name(f".{job.name}.profile"), f"{stable}\n{found_by}\n{subject.chunk}\n")
    if state.resumed:
        progress.say("Going on where an earlier profile with the same settings stopped")
    record = CudaRecorder() if shape.device.type == "cuda" and config.cuda_graphs else None
    profiler = Profiler(subject, job.settings, job.out.parent, job.name, state, progress, device_profile, record, about)
    found = profiler.run()
    job.out.write_text(to_yaml(found.file), "utf-8")
    write_report(found, job.out)
    if device_profile is None:
        save_device_profile(found.device, job.beside("-device.json"))
    return found


def _subject(config: ServerConfig, lines: dict[Split, list[str]], progress: Progress) -> Subject:
    path = config.model_path
    declared = load_config(path, config.revision)
    try:
        tokenizer = Tokenizer.load(
            config.tokenizer or path, revision=config.revision, chat_template=config.chat_template
        )
    except ValueError as error:
        raise StartupError(str(error)) from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else None
    model = load_model(
        path,
        revision=config.revision,
        dtype=config.dtype,
        device=device or torch.device(config.device),
        served_length=config.max_model_len,
        dummy=config.load_format == "dummy",
        fused=config.fused_kernels,
        report=progress.say,
    )
    shape = shape_of(model.module)
    entry = ModelEntry(
        name=Path(config.model).name or config.model,
        model_type=declared.model_type,
        layers=shape.layers,
        kv_heads=shape.kv_heads,
        query_heads=shape.query_heads,
        head_dim=shape.head_dim,
    )
    rotary = rotary_of(model.module)
    fillers = {
        split: Filler(own, lambda text: tokenizer.encode(text, add_special_tokens=False))
        for split, own in lines.items()
    }
    pairs = rotary.inv_freq.numel() if rotary is not None else shape.head_dim // 2
    return Subject(model.module, shape, entry, tokenizer, fillers, pairs, CHUNKS[shape.device.type])


def held_out_text(data: Path | None) -> tuple[dict[Split, list[str]], str]:
    """Lines for each split, and what to call them. Of a user's text every tenth stretch of lines is held out."""
    if data is None:
        return {"train": library_lines("train"), "eval": library_lines("eval")}, "Python's standard library"
    try:
        raw = data.read_bytes()
        lines = raw.decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"--data {data} cannot be read as UTF-8 text ({error}); give a plain text file.") from error
    held: dict[Split, list[str]] = {"train": [], "eval": []}
    for number, line in enumerate(lines):
        held["eval" if number // STRETCH % SPLIT_LINES == SPLIT_LINES - 1 else "train"].append(line)
    if not all(any(line.strip() for line in own) for own in held.values()):
        raise StartupError(
            f"--data {data} has {len(lines)} lines, which are too few to hold some out; give a text of at least "
            f"{STRETCH * SPLIT_LINES} lines."
        )
    return held, f"{data.name}, SHA-256 {hashlib.sha256(raw).hexdigest()[:16]}"


def weights_digest(path: str) -> str:
    """Of the names, sizes and first and last bytes of a folder's weights: enough to tell that they have changed."""
    digest = hashlib.sha256()
    for file in sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else []:
        size = file.stat().st_size
        with file.open("rb") as raw:
            head = raw.read(1 << 20)
            raw.seek(max(0, size - (1 << 20)))
            digest.update(f"{file.name} {size}".encode() + head + raw.read())
    return digest.hexdigest()[:16]
