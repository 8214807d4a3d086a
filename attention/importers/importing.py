"""`gossamer policy import`: from foreign files to a policy file and what lies beside it."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError
from safetensors.torch import save_file

from gossamer.attention.artefacts import Artefacts
from gossamer.attention.importers.combine import combine
from gossamer.attention.importers.foreign import ForeignFile, ImportRefused, read_foreign
from gossamer.attention.importers.formats import find_format
from gossamer.attention.importers.policy_text import policy_of, text_of
from gossamer.attention.importers.source import Format, Imported, Options, Source, flag
from gossamer.attention.importers.target import SHARED, Target, published_model
from gossamer.attention.packaged import spelled
from gossamer.attention.policy_file import NAME, PolicyError, PolicyFile, SourceFile, load_policy_file
from gossamer.attention.policy_view import printable


@dataclass(frozen=True, slots=True)
class Asked:
    """One foreign file, and its format where that is not to be found out."""

    path: Path
    format: str | None = None


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be imported: one file, or one for prompts and one for generated tokens.

    `model` is what --model says; of a published model its name is enough. `other_model` allows a profile that was
    published for another model. `origins` is what the user says of where each file was published.
    """

    files: tuple[Asked, ...]
    out: Path
    model: str | None = None
    options: Options = Options()
    other_model: bool = False
    origins: tuple[str, ...] = ()
    force: bool = False


def import_policy(order: Order, find_model: Callable[[str], Target]) -> PolicyFile:
    """Write the policy and what lies beside it, and read them again. Raises ImportRefused and what find_model does."""
    assert len(order.origins) <= len(order.files) <= 2
    _check_out(order)
    read = [(read_foreign(asked.path), asked.format) for asked in order.files]
    found = [(file, find_format(file, asked)) for file, asked in read]
    _check_options(order.options, [each for _, each in found])
    target, notes = _target(order, found, find_model)
    origins = (*order.origins, "", "")
    files = [
        SourceFile(name=file.name, format=kind.name, sha256=file.sha256, origin=origin)
        for (file, kind), origin in zip(found, origins, strict=False)
    ]
    try:
        parts = [kind.read(Source(file, target, _only(order.options, kind), order.out.stem)) for file, kind in found]
        imported = parts[0] if len(parts) == 1 else combine(*parts)
        imported = replace(imported, approximations=(*imported.approximations, *notes))
        policy = policy_of(order.out.stem, imported, target, files)
    except ValidationError as error:  # of a number that no policy can say
        fault = error.errors(include_url=False)[0]
        place = ".".join(map(str, fault["loc"]))
        raise ImportRefused(
            f"{found[0][0].name} makes no policy: {place}: {fault['msg']}; take another file."
        ) from error
    return _write(order, policy, imported)


def _check_out(order: Order) -> None:
    out = order.out
    if out.suffix not in (".yaml", ".yml"):
        raise ImportRefused(f"-o is {out}; name a policy file that ends in .yaml.")
    if re.fullmatch(NAME, out.stem) is None:
        raise ImportRefused(
            f"A policy cannot be called {out.stem!r}; name a file of at most 64 letters, digits, '.', '_' and '-'."
        )
    if not out.parent.is_dir():
        raise ImportRefused(f"The folder {out.parent} does not exist; make it, or give another -o.")
    if out.exists() and not order.force:
        raise ImportRefused(f"{out} is there already; give another -o, or --force to write over it.")


def _check_options(options: Options, formats: Sequence[Format]) -> None:
    """An option that means nothing to any of the files is a mistake."""
    for name in sorted(options.given()):
        if not any(name in each.takes for each in formats):
            takes = sorted(set[str]().union(*(each.takes for each in formats)))
            named = " and ".join(dict.fromkeys(each.name for each in formats))
            raise ImportRefused(f"{flag(name)} means nothing for {named}, which takes {', '.join(map(flag, takes))}.")


def _only(options: Options, kind: Format) -> Options:
    """What this format takes of them."""
    return replace(options, **dict.fromkeys(options.given() - kind.takes))


def _target(
    order: Order, found: Sequence[tuple[ForeignFile, Format]], find_model: Callable[[str], Target]
) -> tuple[Target | None, list[str]]:
    """The model, and what is to be said about files that were published for another one."""
    made_for = [published_model(printable(kind.made_for(file))) for file, kind in found]
    target, notes = _given(order, found, find_model), []
    if target is None:
        target = next((each for each in made_for if each is not None), None)
    if target is None:
        return None, []
    known = published_model(target.name)
    for (file, _), model in zip(found, made_for, strict=True):
        if model is None or (known is not None and model.name == known.name):
            continue
        if known is None:
            notes.append(f"{file.name}: published for {model.name}, used for {target.name}, which nobody has measured")
        elif SHARED.get(known.name) == model.name:
            notes.append(f"{file.name}: published for {model.name}, whose profile its authors use for {known.name} too")
        elif order.other_model:
            notes.append(f"{file.name}: published for {model.name}, used for {target.name}, which nobody has measured")
        else:
            raise ImportRefused(
                f"{file.name} was published for {model.name}, and not for {target.name}; give --other-model to use it "
                "all the same."
            )
    return target, notes


def _given(
    order: Order, found: Sequence[tuple[ForeignFile, Format]], find_model: Callable[[str], Target]
) -> Target | None:
    """What --model names: a folder, a published model, or what find_model knows; a checkpoint's config.json is its own
    model."""
    if order.model is not None:
        published, name = published_model(order.model), order.model.rstrip("/").rsplit("/", 1)[-1]
        exact = published is not None and spelled(published.name) == spelled(name)
        return published if exact and not Path(order.model).exists() else find_model(order.model)
    own = next((file.path for file, kind in found if kind.name == "sparse-attention-config"), None)
    return None if own is None else find_model(str(own.resolve().parent))


def _write(order: Order, policy: PolicyFile, imported: Imported) -> PolicyFile:
    """Files beside it first, so that a policy is never without them; then all is read again as a server would."""
    text = text_of(policy)
    try:
        for name, beside in imported.beside.items():
            path = order.out.parent / name
            if path.exists() and not order.force:
                raise ImportRefused(f"{path} is there already; give another -o, or --force to write over it.")
            save_file(dict(beside.tensors), path, metadata=dict(beside.metadata) or None)
            path.chmod(0o644)  # safetensors lets nobody else read it
        order.out.write_text(text, "utf-8")
        written = load_policy_file(order.out)
        written.policy(Artefacts(order.out.parent))
    except OSError as error:
        raise ImportRefused(f"{order.out} cannot be written: {error.strerror or error}.") from error
    except PolicyError as error:
        raise ImportRefused(f"The file makes no policy that can be used: {error}") from error
    return written
