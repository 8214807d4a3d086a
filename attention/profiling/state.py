"""What a profile has found so far, on disk, so that it can be stopped and gone on with."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

KEY = "key.txt"
T = TypeVar("T")


class State:
    """A folder of results by name. `key` stands for everything that they depend on: what was found under another key is
    thrown away."""

    def __init__(self, folder: Path, key: str) -> None:
        self._folder = folder
        self.resumed = False
        if folder.is_dir() and (folder / KEY).is_file():
            self.resumed = (folder / KEY).read_text("utf-8") == key
            if not self.resumed:
                shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / KEY).write_text(key, "utf-8")

    def value(self, name: str, kind: Any, make: Callable[[], T]) -> T:
        """The value of this name, made now if it is not known. kind: its type, as pydantic knows it."""
        adapter: TypeAdapter[T] = TypeAdapter(kind)
        path = self._folder / f"{name}.json"
        if path.is_file():
            try:
                return adapter.validate_json(path.read_bytes())
            except ValidationError:  # cut off while it was written
                path.unlink()
        made = make()
        self._write(path, lambda part: part.write_bytes(adapter.dump_json(made)))
        return made

    def keep(self, name: str, kind: Any, value: T) -> None:
        """Let the value of this name be another one from now on."""
        adapter: TypeAdapter[T] = TypeAdapter(kind)
        self._write(self._folder / f"{name}.json", lambda part: part.write_bytes(adapter.dump_json(value)))

    def tensors(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The same for tensors."""
        path = self._folder / f"{name}.safetensors"
        if path.is_file():
            try:
                return load_file(path)
            except (SafetensorError, OSError):
                path.unlink()
        made = {key: tensor.cpu().contiguous() for key, tensor in make().items()}
        self._write(path, lambda part: save_file(made, part))
        return made

    def _write(self, path: Path, write: Callable[[Path], object]) -> None:
        part = path.with_suffix(".part")
        write(part)
        part.replace(path)
