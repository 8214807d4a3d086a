"""The user's own prompts: a file of JSON lines with `messages` or `prompt`, `references`, and perhaps `task`."""

from pathlib import Path

from gossamer.server.eval.fitting import Speech
from gossamer.server.eval.qa import json_lines
from gossamer.server.eval.question import EvalError, Question

SHORTEST = 512  # tokens; the first bucket of lengths


def own_questions(path: Path, speech: Speech, most: int) -> list[Question]:
    """A question per line. Its length is the next power of two of prompt and reply, so that alike ones are counted
    together. Raises EvalError with one sentence."""
    questions = []
    for number, line in json_lines(path, "--suite"):
        chat, prompt = _messages(line.get("messages")), line.get("prompt")
        references, task = line.get("references"), line.get("task", path.stem)
        right = isinstance(references, list) and references and all(isinstance(r, str) and r for r in references)
        one = (chat is None) != (prompt is None) and (prompt is None or (isinstance(prompt, str) and prompt))
        if not (right and one and isinstance(task, str) and task and ("messages" in line) == (chat is not None)):
            raise EvalError(
                f'--suite {path} is wrong in line {number}: write {{"prompt": "…", "references": ["…"]}}, or messages '
                "with role and content in place of the prompt; task may name what is counted together."
            )
        if chat is not None and not speech.has_chat_template:
            raise EvalError(
                f"--suite {path} has messages in line {number}, but this model has no chat template; write a prompt."
            )
        text = prompt if isinstance(prompt, str) else ""
        tokens = len(speech.encode(text) if chat is None else speech.encode_chat(chat))
        length = SHORTEST
        while length < tokens + most:
            length *= 2
        assert isinstance(references, list)
        questions.append(
            Question(
                task=task,
                length=length,
                document=f"{path.name}-{number}",
                number=0,
                chat=tuple(chat or ()),
                prompt=text,
                references=tuple(references),
                tokens=tokens,
                most=most,
            )
        )
    return questions


def _messages(value: object) -> list[dict[str, str]] | None:
    if not isinstance(value, list) or not value:
        return None
    messages = []
    for each in value:
        if not isinstance(each, dict) or not all(isinstance(each.get(name), str) for name in ("role", "content")):
            return None
        messages.append({"role": each["role"], "content": each["content"]})
    return messages
