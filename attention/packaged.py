"""Policies by name: those that come with Gossamer, and files of one's own."""

import re
from importlib.resources import files
from pathlib import Path

from gossamer.attention.policy_file import PolicyError


def packaged_policies() -> dict[str, Path]:
    """The files of the packaged policies, by name, in the order of the names."""
    folder = Path(str(files("gossamer") / "configs" / "policies"))
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def packaged_for(model: str) -> Path | None:
    """The packaged policy that is named like a model's directory or its id on the Hugging Face Hub; capitals, signs and
    the Meta of Llama's older names apart."""
    name, packaged = Path(model).name, packaged_policies()
    alike = (path for other, path in packaged.items() if spelled(other) == spelled(name))
    return packaged.get(name) or next(alike, None)


def spelled(name: str) -> str:
    """The letters and digits of a model's name, by which two spellings of it are equal."""
    return re.sub(r"[^a-z0-9]", "", name.lower()).removeprefix("meta")


def find_policy_file(asked: str) -> Path:
    """The policy file at a path, or the packaged one of that name, as `packaged_for` compares names. Raises
    PolicyError."""
    if Path(asked).is_file():
        return Path(asked)
    found = None if "/" in asked else packaged_for(asked)
    if found is None:
        known = ", ".join(packaged_policies())
        raise PolicyError(
            f"The attention policy {asked!r} is neither a file nor a packaged policy; packaged are: {known} "
            "(and dense, which needs no file)."
        )
    return found
