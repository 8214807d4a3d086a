"""The demo model behind the real server, asked by the real openai-python: right answers about long documents."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from serving import running_server

from gossamer.attention.profiling.tasks import TASKS, Filler, Prompt, Task, make_prompt, score
from gossamer.server.config import ServerConfig
from gossamer.server.engine.build import build_engine
from gossamer.server.engine.tokenizer import Tokenizer
from gossamer.server.metrics import Metrics

SOURCES = (
    "argparse.py",
    "typing.py",
    "pathlib.py",
    "tarfile.py",
    "subprocess.py",
    "zipfile.py",
    "inspect.py",
    "doctest.py",
)


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    config = ServerConfig(device="cpu", kv_cache_memory=2**30, max_num_seqs=16)
    metrics = Metrics(config.names[0])
    engine = build_engine(config, metrics, lambda line: None)
    with (
        running_server(engine, config, metrics) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def filler() -> Filler:
    """Lines of Python's own library, which is wherever these tests run."""
    tokenizer = Tokenizer.load(ServerConfig().model_path)
    library = Path(sysconfig.get_paths()["stdlib"])
    lines = [line for name in SOURCES for line in (library / name).read_text("utf-8").splitlines() if line.strip()]
    return Filler(lines, lambda text: tokenizer.encode(text, add_special_tokens=False))


def ask(client: openai.OpenAI, prompt: Prompt, number: int = 0) -> str:
    reply = client.chat.completions.create(
        model="gossamer-demo",
        messages=prompt.messages(number),
        temperature=0,
        max_tokens=80,  # type: ignore[arg-type]
    )
    return reply.choices[0].message.content or ""


@pytest.mark.parametrize(("task", "length"), [("single", 4096), ("multikey", 4096)])
def test_finds_facts(client: openai.OpenAI, filler: Filler, task: str, length: int) -> None:
    """Most of several documents that the model has never seen; its accuracy is measured elsewhere."""
    prompts = [make_prompt(TASKS[task], length, seed, filler) for seed in range(5)]
    shares = [score(ask(client, prompt), prompt.questions[0].references) for prompt in prompts]
    assert sum(shares) / len(shares) >= 0.8


def test_long_document_streams_and_is_reused(client: openai.OpenAI, filler: Filler) -> None:
    """32K tokens, twice: the second question finds the document in the prefix cache. One answer at least is right."""
    prompt = make_prompt(Task("facts", keys=4), 32_000, 1, filler, questions=2)
    cached: list[int] = []
    shares: list[float] = []
    for number in range(2):
        text, finish = "", None
        stream = client.chat.completions.create(
            model="gossamer-demo",
            messages=prompt.messages(number),  # type: ignore[arg-type]
            temperature=0,
            max_tokens=80,
            stream=True,
            stream_options={"include_usage": True},
        )
        for chunk in stream:
            if chunk.choices:
                text += chunk.choices[0].delta.content or ""
                finish = chunk.choices[0].finish_reason or finish
            elif chunk.usage is not None and chunk.usage.prompt_tokens_details is not None:
                assert chunk.usage.prompt_tokens > 31_000
                cached.append(chunk.usage.prompt_tokens_details.cached_tokens)
        assert finish in ("stop", "length")
        shares.append(score(text, prompt.questions[number].references))
    assert sum(shares) >= 1
    assert cached[0] == 0
    assert cached[1] > 31_000
