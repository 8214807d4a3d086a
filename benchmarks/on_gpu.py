"""Everything worth doing on a GPU machine in a short time, in order of worth.

    python benchmarks/on_gpu.py [STAGE ...] [--seconds 560] [--again] [--list]

Each stage writes one JSON file to the folder $OUT, or benchmarks/results when that is not set, and is left out when its
file is in either: the next call goes on where the last one stopped. A call starts nothing that does not fit into
--seconds any more. A stage that fails or runs too long leaves what it wrote as *.part.json, and the next stage runs. At
the end a table says what happened; the exit status is 1 when a stage failed.

Nothing needs to be installed but torch, transformers and triton: what else is missing is taken from wheels/
(benchmarks/carry_wheels.sh), into a temporary folder. Without a GPU the stages that need one are left out, and the
others run on tiny shapes.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS, RESULTS, WHEELS = ROOT / "benchmarks", ROOT / "benchmarks" / "results", ROOT / "wheels"
TUNING = BENCHMARKS / "tune_kernels.py"
LEAST = 20  # seconds below which no stage is started; on a GPU, half of the stage's limit
CHECKED = 200  # seconds for one check of compute-sanitizer
SHOWN = 40  # lines of a stage's output
NEEDED = "fastapi orjson prometheus_client pydantic rich starlette typer uvicorn yaml"  # modules


@dataclass(frozen=True)
class Place:
    """Where this call runs."""

    gpu: bool
    environment: dict[str, str]
    scratch: Path

    def python(self, *arguments: object) -> list[str]:
        """-P: a script's own folder is still found, the current one is not, where kernels/ would hide another."""
        return [sys.executable, *map(str, arguments)]

    def script(self, name: str, *arguments: object) -> list[str]:
        return self.python(BENCHMARKS / name, *arguments)


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit status, None when it ran too long, and what it printed."""

    status: int | None
    output: str


class Run(Protocol):
    """Runs a command to its end, or until its time is over."""

    def __call__(self, command: Sequence[str], seconds: float = ...) -> Ended: ...


@dataclass(frozen=True)
class Stage:
    """work(place, run, file) writes `file` and says in a line what is in it; it raises Failed otherwise."""

    name: str
    about: str
    limit: int  # seconds
    needs_gpu: bool
    work: Callable[[Place, Run, Path], str]


class Failed(Exception):
    """A stage that did not do what it should, in one sentence."""


def plain(command: Callable[[Place, Path], list[str]]) -> Callable[[Place, Run, Path], str]:
    """A stage that is one command, which writes its own file."""

    def work(place: Place, run: Run, file: Path) -> str:
        ended = run(command(place, file))
        if ended.status is None:
            raise Failed("it ran too long")
        if ended.status != 0 or not file.exists():
            raise Failed(f"exit status {ended.status}")
        found = json.loads(file.read_text(encoding="utf-8"))
        return f"{len(found.get('results', found))} results"

    return work


def each(place: Place, file: Path) -> list[str]:
    return place.script("one_of_each_kernel.py", "--out", file)


def tests(place: Place, run: Run, file: Path) -> str:
    """Files without a GPU test are not even read: they need more than is carried."""
    report = place.scratch / "tests.xml"
    marked = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    # other versions than the pinned ones may warn of other things
    ended = run(
        place.python(
            *("-P", "-m", "pytest", "-m", "gpu", "-q", "-o", "filterwarnings=default", "-p", "no:cacheprovider"),
            *("--junitxml", report, "--maxfail", 200, *marked),
        )
    )
    cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    failed = [
        {"test": f"{case.get('classname')}.{case.get('name')}", "message": (bad.get("message") or "")[:600]}
        for case in cases
        for bad in case
        if bad.tag in ("failure", "error")
    ]
    skipped = sum(bad.tag == "skipped" for case in cases for bad in case)
    counts = {"tests": len(cases), "failed": len(failed), "skipped": skipped}
    write(file, {**about(), "status": ended.status, **counts, "results": failed, "end": ended.output[-3000:]})
    said = f"{len(cases) - len(failed) - skipped} of {len(cases)} tests passed, {skipped} skipped"
    if ended.status is None:
        raise Failed("the tests ran too long")
    if ended.status not in (0, 1) or not cases:
        raise Failed(f"pytest ended with {ended.status}")
    return said  # failures are a result: running the stage again would say the same


def sanitizer(place: Place, run: Run, file: Path) -> str:
    """Some runtimes have no compute-sanitizer, on some it refuses the device: that is a result too."""
    installed = [*Path("/usr/local").glob("cuda*/bin/compute-sanitizer")]
    tool = shutil.which("compute-sanitizer") or next(map(str, installed), None)
    found: list[dict[str, object]] = []
    for check in ("memcheck", "racecheck"):
        if tool is None:
            found.append({"check": check, "result": "compute-sanitizer is not installed"})
            continue
        # every allocation its own, so that reading behind one is seen
        given = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", tool, "--tool", check, "--error-exitcode", "9"]
        ended = run([*given, *place.script("one_of_each_kernel.py", "--dtype", "bfloat16", "--dim", 64)], CHECKED)
        lines = ended.output.splitlines()
        totals = [line.strip("= ") for line in lines if "SUMMARY" in line]
        refused = next((line.strip("= ") for line in lines if "not supported" in line), None)
        result = "ran too long" if ended.status is None else refused or (totals[-1] if totals else "no summary")
        own = {"check": check, "result": result, "status": ended.status}
        found.append({**own, "right": ended.output.count(" right "), "end": ended.output[-6000:]})
    write(file, {**about(), "results": found})
    return "; ".join(f"{each['check']}: {each['result']}" for each in found)


def table(place: Place, file: Path) -> list[str]:
    tiny = ["--lengths", 512, "--heads", "4,2,32", "--rounds", 1, "--batch", 2, "--tokens", 128]
    sizes = ["--lengths", "8k,32k,128k"] if place.gpu else tiny
    return place.python("-P", "-m", "gossamer", "bench", "kernels", *sizes, "--json", file)


def dense(place: Place, file: Path) -> list[str]:
    tiny = ["--lengths", 512, "--heads", 4, 2, 32, "--rounds", 1, "--batches", 1]
    sizes = ["--lengths", 8192, 32768, 131072, "--batches", 1, 8] if place.gpu else tiny
    return place.script("dense_attention.py", *sizes, "--out", file)


def sparse(place: Place, file: Path) -> list[str]:
    tiny = ["prefill", "decode", "--lengths", 2048, "--decode-lengths", 512, "--batches", 1, "--heads", 4, 2, 32]
    tiny += ["--rounds", 1, "--tokens", 128]
    large = ["--lengths", 32768, "--decode-lengths", 32768, 131072, "--batches", 1, 8, "--heads", 32, 8, 128]
    return place.script("sparse_attention.py", *(large if place.gpu else tiny), "--out", file)


def tuning(place: Place, file: Path) -> list[str]:
    return place.script(TUNING.name, "--out", file)


def serving(place: Place, file: Path) -> list[str]:
    tiny = ["--shape", "tiny", "--lengths", 512, "--decode", "300x2", "--tokens", 5, "--rounds", 1, "--budget", 128]
    large = ["--shape", "8b", "--lengths", 32768, 131072, "--rounds", 2, "--tokens", 65]
    large += ["--decode", "32768x1", "32768x8", "8192x32", "131072x1", "131072x4"]
    return place.script("sparse_serving.py", *(large if place.gpu else tiny), "--out", file)


def profiling(place: Place, file: Path) -> list[str]:
    sizes = ["--shape", "8b", "--lengths", 8192, 32768] if place.gpu else ["--shape", "tiny", "--lengths", 1024]
    return place.script("profile_shape.py", *sizes, "--out", file)


def quality(place: Place, file: Path) -> list[str]:
    tiny = ["--length", 2048, "--estimated", 1024, "--new", 8, "--rounds", 1, "--documents", 1]
    return place.script("quality_sampling.py", *([] if place.gpu else tiny), "--out", file)


STAGES = (
    Stage("each", "every kernel once against its twin", 180, False, plain(each)),
    Stage("tests", "pytest -m gpu", 420, True, tests),
    Stage("sanitizer", "compute-sanitizer on every kernel once", 420, True, sanitizer),
    Stage("table", "gossamer bench kernels", 240, False, plain(table)),
    Stage("dense", "dense attention against torch's", 180, False, plain(dense)),
    Stage("sparse", "every backend against dense, one layer", 240, False, plain(sparse)),
    Stage("tuning", "sweeps of the kernels' settings", 480, True, plain(tuning)),
    Stage("serving", "first token and time per token, 8B shape", 540, False, plain(serving)),
    Stage("profile", "gossamer profile, 8B shape", 540, False, plain(profiling)),
    Stage("quality", "what looking twice costs, demo model", 180, False, plain(quality)),
)


def about() -> dict[str, object]:
    """As provenance(), of what does not need torch in this process."""
    code = "import json; from gossamer.server.bench.provenance import provenance as p; print(json.dumps(p()))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    found: dict[str, object] = json.loads(done.stdout) if done.returncode == 0 else {}
    return {**found, "command": "python benchmarks/on_gpu.py"}


def write(file: Path, found: dict[str, object]) -> None:
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def run_for(seconds: float, environment: dict[str, str]) -> Run:
    """Runs commands, all of them together for so long; a command that is too slow ends with all that it started."""
    ends = time.monotonic() + seconds

    def run(command: Sequence[str], seconds: float = seconds) -> Ended:
        print("$", " ".join(command), flush=True)
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            own = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            status: int | None = None
            try:
                status = own.wait(max(1.0, min(seconds, ends - time.monotonic())))
            except subprocess.TimeoutExpired:
                os.killpg(own.pid, signal.SIGKILL)
                own.wait()
            output.seek(0)
            text = output.read()
        print("\n".join(text.splitlines()[-SHOWN:]), flush=True)
        return Ended(status, text)

    return run


def prepare(scratch: Path) -> Place:
    """A PYTHONPATH on which `gossamer` is this clone, and what is missing is there too."""
    site = scratch / "site"
    site.mkdir()
    (site / "gossamer").symlink_to(ROOT / "gossamer")
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    missing = ask(f"import importlib.util as u; print(*[n for n in '{NEEDED}'.split() if not u.find_spec(n)])")
    old = ask("import pytest; print(int(pytest.__version__.split('.')[0]) < 9)") != "False"
    if (missing or old) and (wheels := sorted(WHEELS.glob("*.whl"))):
        given = ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade", "--target", str(site)]
        done = subprocess.run([sys.executable, "-m", "pip", "install", "-q", *given, *map(str, wheels)], check=False)
        print(f"missing: {missing or 'a newer pytest'}; wheels/ {'failed' if done.returncode else 'installed'}")
    elif missing:
        print(f"missing: {missing}; run benchmarks/carry_wheels.sh where there is a network, and bring wheels/ along")
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    gpu = ask("import torch; print(torch.cuda.is_available())") == "True"
    return Place(gpu, {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}, scratch)


def ask(code: str) -> str:
    """What a line of Python prints; nothing when it fails."""
    return subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False
    ).stdout.strip()


def outcome(stage: Stage, place: Place, folder: Path, seconds: float, again: bool) -> str:
    """Runs the stage, unless there is a reason not to."""
    file = folder / f"gpu_{stage.name}.json"
    done = next((path for path in (file, RESULTS / file.name) if path.exists()), None)
    if done is not None and not again:
        return f"done before: {done.name}"
    if stage.needs_gpu and not place.gpu:
        return "left out: needs a GPU"
    if stage.name == "tuning" and not TUNING.exists():
        return f"left out: there is no {TUNING.name}"
    if seconds < (stage.limit / 2 if place.gpu else LEAST):
        return "left out: no time left in this call"
    part = file.with_suffix(".part.json")
    if stage.name != "tuning":  # which goes on from there
        part.unlink(missing_ok=True)
    try:
        said = stage.work(place, run_for(min(stage.limit, seconds), place.environment), part)
    except Exception as reason:  # whatever it is, the next stage runs
        return f"FAILED: {'' if isinstance(reason, Failed) else f'{type(reason).__name__}: '}{reason}"
    part.replace(file)
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of: {', '.join(s.name for s in STAGES)}")
    parser.add_argument("--seconds", type=float, default=560, help="that this call may take")
    parser.add_argument("--again", action="store_true", help="also what is done")
    parser.add_argument("--list", action="store_true", help="say what the stages are")
    options = parser.parse_args()
    if unknown := set(options.stages) - {stage.name for stage in STAGES}:
        parser.error(f"there is no stage {sorted(unknown)[0]}; there are: {', '.join(s.name for s in STAGES)}")
    if options.list:
        for stage in STAGES:
            print(f"{stage.name:10} {stage.about}; at most {stage.limit} s{'; needs a GPU' * stage.needs_gpu}")
        return
    folder = Path(os.environ.get("OUT") or RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    ends, lines = time.monotonic() + options.seconds, []
    with tempfile.TemporaryDirectory() as scratch:
        place = prepare(Path(scratch))
        for stage in STAGES:
            if options.stages and stage.name not in options.stages:
                continue
            print(f"\n== {stage.name}: {stage.about}", flush=True)
            began = time.monotonic()
            said = outcome(stage, place, folder, ends - began, options.again)
            lines.append(f"{stage.name:10} {time.monotonic() - began:6.0f} s  {said}")
            print(said, flush=True)
    print("\n" + "\n".join(lines))
    sys.exit(any("FAILED" in line for line in lines))


if __name__ == "__main__":
    main()
