"""Reading files that others wrote: recognised by their contents, bounded in size, and never trusted."""

import hashlib
import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from gossamer.attention.policy_view import printable

MOST_TEXT = 64 << 20  # bytes
MOST_TENSORS = 4 << 30
FOLDERS = ("full_attention_heads.tsv", "attn_gate_weights.pth", "config.json")  # what a published folder is known by


class ImportRefused(Exception):
    """A foreign file cannot be imported. The message is one sentence that says what to do, without characters of the
    file that a terminal would obey."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


@dataclass(frozen=True, slots=True)
class ForeignFile:
    """What a file holds: a JSON value, a text, one tensor, or tensors by name."""

    path: Path
    sha256: str
    kind: Literal["json", "text", "tensors"]
    value: Any

    @property
    def name(self) -> str:
        """Without its folder, and fit to be printed."""
        return printable(self.path.name)

    def config_beside(self) -> Mapping[str, Any]:
        """The config.json in the same folder, empty where there is none. Raises ImportRefused."""
        path = self.path.with_name("config.json")
        if not path.is_file():
            return {}
        config = _json(path, _text(path))
        if not isinstance(config, dict):
            raise ImportRefused(f"{path} holds no JSON object; copy it again.")
        return config


def read_foreign(path: Path) -> ForeignFile:
    """A file, or a folder that holds one of `FOLDERS`. Raises ImportRefused."""
    if path.is_dir():
        inside = [path / name for name in FOLDERS if (path / name).is_file()]
        if not inside:
            raise ImportRefused(f"The folder {path} holds none of {', '.join(FOLDERS)}; name the file to import.")
        path = inside[0]
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise ImportRefused(f"{path} {what}; name a file that holds a profile.")
    try:
        with path.open("rb") as file:
            start = file.read(16)
            file.seek(0)
            size = path.stat().st_size
            limit = MOST_TENSORS if _is_binary(start) else MOST_TEXT
            if size > limit:
                raise ImportRefused(f"{path} is larger than {limit >> 20} MiB; it cannot be a profile.")
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ImportRefused(f"{path} cannot be read: {error.strerror or error}.") from error
    if _is_binary(start):
        return ForeignFile(path, digest, "tensors", _tensors(path, start))
    text = _text(path)
    if text.lstrip()[:1] in ("[", "{"):
        return ForeignFile(path, digest, "json", _json(path, text))
    return ForeignFile(path, digest, "text", text)


def _is_binary(start: bytes) -> bool:
    """Whether a file begins as torch's zip or pickle files do, or safetensors with the length of its header."""
    length = int.from_bytes(start[:8], "little")
    return start.startswith((b"PK\x03\x04", b"\x80")) or (length < 2**32 and start[8:9] == b"{")


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MOST_TEXT:
            raise ImportRefused(f"{path} is larger than {MOST_TEXT >> 20} MiB; it cannot be a profile.")
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ImportRefused(f"{path} is neither text nor a file of tensors; name a profile.") from error
    except OSError as error:
        raise ImportRefused(f"{path} cannot be read: {error.strerror or error}.") from error


def _json(path: Path, text: str) -> Any:
    """Strict JSON: no NaN, no infinity, no key twice."""

    def refuse(constant: str) -> None:
        raise ValueError(f"it holds {constant}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
            raise ValueError(f"it gives the key {twice[:80]!r} twice")
        return found

    try:
        return json.loads(text, parse_constant=refuse, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ImportRefused(f"{path} cannot be read as JSON: {str(error)[:200]}.") from error


def _tensors(path: Path, start: bytes) -> Tensor | dict[str, Tensor]:
    """A torch file, of which only tensors are taken and no code is run, or a safetensors file."""
    try:
        if not start.startswith((b"PK", b"\x80")):
            return load_file(path)
        if start.startswith(b"PK"):
            with zipfile.ZipFile(path) as archive:
                if sum(each.file_size for each in archive.infolist()) > MOST_TENSORS:
                    raise ImportRefused(
                        f"{path} unpacks to more than {MOST_TENSORS >> 20} MiB; it cannot be a profile."
                    )
        value = torch.load(path, map_location="cpu", weights_only=True)
    except ImportRefused:
        raise
    except Exception as error:  # torch, zipfile and safetensors raise many kinds
        raise ImportRefused(
            f"{path} cannot be read as a file of tensors ({str(error)[:120].rstrip('. ')}); copy it again."
        ) from error
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, dict) or not all(isinstance(each, Tensor) for each in value.values()):
        raise ImportRefused(f"{path} holds other things than tensors by name; name a file of gates or masks.")
    return {str(name): each for name, each in value.items()}


def why_no_profile(file: ForeignFile) -> str | None:
    """What a text that is no profile may be instead."""
    if file.kind != "text":
        return None
    if file.value.startswith("version https://git-lfs"):
        return f"{file.path} is a Git LFS pointer, not the file itself; fetch it with git lfs pull."
    if re.fullmatch(r"[\w./=+-]+\.(?:tsv|json)\s*", file.value):
        return (
            f"{file.path} is a Git link that was downloaded as text; download the file it points to, "
            f"{file.value.strip()[:120]}."
        )
    return None
