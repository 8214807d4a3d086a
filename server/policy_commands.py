"""`gossamer policy`: look at a policy file, check it against a model, compare two, import one. No weights are read."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gossamer.server.config import ServerConfig, parse_tokens
from gossamer.server.exits import fail

if TYPE_CHECKING:
    from gossamer.attention.importers.target import Target
    from gossamer.attention.policy_diff import Change, PolicyDifference
    from gossamer.attention.policy_view import LoadedPolicy

LONGEST = 2**30  # tokens; as far as a policy file can name them

policy = typer.Typer(
    name="policy",
    help="Look at a policy file, check it against a model, compare two, import others' profiles.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

PolicyArgument = Annotated[
    str, typer.Argument(metavar="FILE", help="A policy file, or the name of a packaged policy.", show_default=False)
]


@policy.command()
def show(
    file: PolicyArgument,
    point: Annotated[
        str | None,
        typer.Option("--point", metavar="NAME", help="The operating point; the first one when left out."),
    ] = None,
    length: Annotated[
        str, typer.Option("--length", metavar="TOKENS", help="Where densities are computed, such as 8192 or 32k.")
    ] = "32768",
    png: Annotated[
        Path | None,
        typer.Option("--png", metavar="FILE", help="Write the same as a picture too; needs gossamer\\[plots]."),
    ] = None,
) -> None:
    """Draw what each head reads at an operating point: layers down, KV heads across, prefill and decode."""
    tokens = _tokens(length)
    if png is not None:
        _require_matplotlib()
    loaded = _load(file, code=1)
    names = loaded.policy.names
    if point is not None and point not in names:
        fail(f"The policy {loaded.file.name!r} has no operating point {point!r}; it has: {', '.join(names)}.", code=2)
    from rich.console import Console

    from gossamer.attention.policy_view import view_point
    from gossamer.server.policy_text import print_point

    view = view_point(loaded.file, point or names[0], tokens)
    if png is not None:
        from gossamer.attention.policy_plot import draw_point

        try:
            draw_point(view, png)
        except OSError as error:
            fail(f"The picture cannot be written to {png} ({error.strerror or error}); give another --png.", code=1)
    print_point(view, Console())


@policy.command()
def check(
    file: PolicyArgument,
    model: Annotated[
        str, typer.Option("--model", metavar="MODEL", help="A Hugging Face directory or id, or gossamer-demo.")
    ],
) -> None:
    """Load a policy with all that it names, and check it against a model's config.json: exit 0 when it fits, else 1."""
    loaded = _load(file, code=1)
    import dataclasses

    from gossamer.attention.policy_file import PolicyError, check_model
    from gossamer.server.engine.declared import declared_shape
    from gossamer.server.engine.families import StartupError
    from gossamer.server.engine.model import load_config

    try:
        shape = declared_shape(load_config(ServerConfig(model=model).model_path, None))
        check_model(loaded.file, **dataclasses.asdict(shape))
    except (PolicyError, StartupError) as error:
        fail(str(error), code=1)
    typer.echo(
        f"fits: {loaded.file.name} on {model} ({shape.model_type}: {shape.layers} layers of {shape.kv_heads} KV heads, "
        f"{shape.query_heads} query heads of {shape.head_dim})"
    )
    for name in loaded.policy.names:
        typer.echo(f"  {name}: {_heads_in_words(loaded, name)}")


@policy.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A policy file, or the name of a packaged policy.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The one to compare it with.")],
) -> None:
    """Say which heads two policies treat differently: exit 0 when none, 1 when some, 2 when one cannot be read."""
    before, after = _load(a, code=2), _load(b, code=2)
    from gossamer.attention.policy_diff import difference

    found = difference(before, after)
    if not found:
        typer.echo(f"no difference at {', '.join(before.policy.names)}")
        return
    _print_difference(found, a, b)
    raise typer.Exit(1)


@policy.command(name="import")
def import_(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A published profile, or its folder.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="OUT", help="The policy file to write, NAME.yaml.")],
    kind: Annotated[
        str | None, typer.Option("--format", metavar="F", help="What FILE is, when its contents should not decide.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="A Hugging Face directory or id, or a published model's name."),
    ] = None,
    decode: Annotated[
        Path | None,
        typer.Option("--decode", metavar="FILE", help="What generated tokens read, and who streams, from this file."),
    ] = None,
    decode_kind: Annotated[str | None, typer.Option("--decode-format", metavar="F", help="What that file is.")] = None,
    streaming_share: Annotated[
        float | None, typer.Option(metavar="SHARE", help="DuoAttention, LServe: of the heads; 0.5 when left out.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", help="DuoAttention, LServe: chooses among equal weights; 0 when left out."),
    ] = None,
    sink: Annotated[int | None, typer.Option(metavar="TOKENS", help="First tokens of streaming heads.")] = None,
    recent: Annotated[int | None, typer.Option(metavar="TOKENS", help="Last tokens of streaming heads.")] = None,
    prompt_recent: Annotated[
        int | None, typer.Option(metavar="TOKENS", help="The same in prompts; as many, or LServe's 8192.")
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(metavar="window|all", help="Whether streaming heads give memory back, in prompts too."),
    ] = None,
    budget: Annotated[
        int | None, typer.Option(metavar="TOKENS", help="DoubleSparse, gates, LServe: tokens to read.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(metavar="WEIGHT", help="Gates: the least weight of a page, in place of a budget.")
    ] = None,
    channels: Annotated[int | None, typer.Option(metavar="N", help="DoubleSparse: 16 when left out.")] = None,
    dense_layers: Annotated[
        int | None, typer.Option(metavar="N", help="DoubleSparse: dense first layers; 2 when left out.")
    ] = None,
    stride: Annotated[int | None, typer.Option(metavar="N", help="XAttention: which of its lists.")] = None,
    length: Annotated[
        str | None, typer.Option(metavar="TOKENS", help="sparse_attention_config: where thresholds are taken.")
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(metavar="SHARE", help="sparse_attention_config: the target, if not the file's.")
    ] = None,
    above: Annotated[
        str | None, typer.Option(metavar="TOKENS", help="Queries before this position stay dense.")
    ] = None,
    origin: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Who published each file, for the provenance: a repository and commit."),
    ] = None,
    other_model: Annotated[
        bool, typer.Option("--other-model", help="Use a profile that was published for another model.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Write over what is there.")] = False,
) -> None:
    """Turn a published profile into a policy file, whose default point stays dense: the profile is `imported`."""
    from gossamer.attention.importers.foreign import ImportRefused
    from gossamer.attention.importers.importing import Asked, Order, import_policy
    from gossamer.attention.importers.source import Options
    from gossamer.server.engine.families import StartupError
    from gossamer.server.import_text import import_text

    if decode_kind is not None and decode is None:
        fail("--decode-format says what --decode is; give --decode too, or leave it out.", code=2)
    asked = (Asked(file, kind), *(() if decode is None else (Asked(decode, decode_kind),)))
    if len(origin or ()) > len(asked):
        fail("--origin is given more often than there are files; give it once for each.", code=2)
    try:
        options = Options(
            streaming_share=streaming_share,
            seed=seed,
            sink=sink,
            recent=recent,
            prompt_recent=prompt_recent,
            budget=budget,
            threshold=threshold,
            channels=channels,
            stride=stride,
            above=None if above is None else _tokens(above, "--above", least=0),
            dense_layers=dense_layers,
            length=None if length is None else _tokens(length),
            sparsity=sparsity,
            keep=keep,
        )
        written = import_policy(
            Order(asked, out, model, options, other_model, tuple(origin or ()), force), _declared_target
        )
    except (ImportRefused, StartupError) as error:
        fail(str(error), code=1)
    typer.echo(import_text(written, out))


def _declared_target(model: str) -> "Target":
    """What a model's config.json says of it."""
    from gossamer.attention.importers.target import Target
    from gossamer.server.engine.declared import declared_rotary, declared_shape, full_layers
    from gossamer.server.engine.model import load_config

    config = load_config(ServerConfig(model=model).model_path, None)
    shape = declared_shape(config)
    name = Path(model).resolve().name if Path(model).exists() else model.rstrip("/").rsplit("/", 1)[-1]
    return Target(
        name,
        shape.model_type,
        shape.layers,
        shape.kv_heads,
        shape.query_heads,
        shape.head_dim,
        full_layers(config),
        declared_rotary(config),
    )


def _print_difference(found: "PolicyDifference", a: str, b: str) -> None:
    typer.echo(f"{a} -> {b}")
    _print_changes(found.general, "")
    for name, changed in found.points.items():
        typer.echo(f"operating point {name}")
        for heads in changed:
            typer.echo(f"  layers {heads.layers}; KV heads {heads.heads}")
            _print_changes(heads.changes, "    ")
    for which, only in ((a, found.only_before), (b, found.only_after)):
        for name in only:
            typer.echo(f"operating point {name} is in {which} only")


def _print_changes(changes: "tuple[Change, ...]", indent: str) -> None:
    for change in changes:
        typer.echo(f"{indent}{change.part}: {change.before} -> {change.after}")


def _heads_in_words(loaded: "LoadedPolicy", point: str) -> str:
    """Heads per backend and phase, and how many stream."""
    entries = [entry for layer in loaded.file.entries(point) for entry, _ in layer]
    parts = []
    for phase in ("prefill", "decode"):
        counts = Counter(getattr(entry, phase).backend for entry in entries)
        parts.append(f"{phase} {', '.join(f'{count} {name}' for name, count in counts.most_common())}")
    streaming = sum(entry.keep != "all" for entry in entries)
    return "; ".join([*parts, f"{streaming or 'none'} of {len(entries)} heads stream{'s' if streaming == 1 else ''}"])


def _load(asked: str, *, code: int) -> "LoadedPolicy":
    from gossamer.attention.policy_file import PolicyError
    from gossamer.attention.policy_view import load_policy

    try:
        return load_policy(asked)
    except PolicyError as error:
        fail(str(error), code=code)


def _tokens(text: str, flag: str = "--length", least: int = 1) -> int:
    try:
        tokens = parse_tokens(text)
    except ValueError as error:
        fail(f"{flag} is {text!r}: {error}.", code=2)
    if not least <= tokens <= LONGEST:
        fail(f"{flag} is {text!r}: give a number of tokens from {least} to {LONGEST}.", code=2)
    return tokens


def _require_matplotlib() -> None:
    """Before anything is read: what is asked for cannot be done without it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        fail("--png needs matplotlib, which is not installed; install it with: pip install 'gossamer[plots]'.", code=1)
