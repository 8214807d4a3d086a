"""The `gossamer` command. Each command imports what it runs only when it runs, so that help comes at once."""

import dataclasses
import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from gossamer import __version__
from gossamer.server.bench_commands import bench
from gossamer.server.config import ConfigError, ServerConfig, default_text, flag_of, kind_of, make_config
from gossamer.server.eval_commands import evaluate
from gossamer.server.exits import fail
from gossamer.server.policy_commands import policy
from gossamer.server.profile_commands import profile

app = typer.Typer(
    name="gossamer",
    help="An OpenAI-compatible server for long-context models whose attention is sparse, head by head.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    app()


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"gossamer {__version__}")
        raise typer.Exit


@app.callback()
def gossamer(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """An OpenAI-compatible server for long-context models whose attention is sparse, head by head."""


def serve(model: str | None, config: Path | None, **flags: object) -> None:
    """Serve MODEL (a Hugging Face directory or id; the packaged demo model when left out) over HTTP."""
    try:
        settings = make_config({"model": model, **flags}, config)
    except ConfigError as error:
        fail(str(error), code=2)
    typer.echo(f"gossamer {__version__} is starting")  # importing torch takes seconds
    from gossamer.server.serve import serve as run

    raise typer.Exit(run(settings))


def _with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with one flag per field of ServerConfig. Values are read by `make_config`, as YAML's are."""

    def run(**given: Any) -> None:
        command(**{name: value for name, value in given.items() if value != []})

    parameters = [
        _parameter(
            "model",
            Annotated[
                str | None, typer.Argument(metavar="MODEL", help="As --model in a --config file.", show_default=False)
            ],
        ),
        _parameter(
            "config",
            Annotated[
                Path | None,
                typer.Option("--config", help="YAML file with these settings; flags win over it.", metavar="FILE"),
            ],
        ),
    ]
    parameters += [_flag(spec) for spec in dataclasses.fields(ServerConfig) if spec.name != "model"]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__doc__ = command.__doc__
    return run


def _parameter(name: str, annotation: object) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _flag(spec: "dataclasses.Field[Any]") -> inspect.Parameter:
    kind, flag = kind_of(spec), flag_of(spec.name)
    shown = default_text(spec)
    about: dict[str, Any] = {
        "help": spec.metadata["help"],
        "rich_help_panel": spec.metadata["group"],
        "show_default": shown or False,
    }
    if kind is bool:
        off = f"/--no-{flag[2:]}" if spec.default else ""
        about["show_default"] = False
        return _parameter(spec.name, Annotated[bool | None, typer.Option(flag + off, **about)])
    about["metavar"] = _metavar(spec, kind)
    held = list[str] | None if kind is tuple else str | None
    return _parameter(spec.name, Annotated[held, typer.Option(flag, **about)])


def _metavar(spec: "dataclasses.Field[Any]", kind: type) -> str:
    if typing.get_origin(spec.type) is typing.Literal:
        return "|".join(typing.get_args(spec.type))
    unit = spec.metadata["unit"]
    if unit is not None:
        return "SIZE" if unit.__name__ == "parse_bytes" else "TOKENS"
    return {int: "N", float: "X", tuple: "TEXT", str: "TEXT"}[kind]


app.command("serve")(_with_flags(serve))
app.command("profile")(profile)
app.command("eval")(evaluate)
app.add_typer(policy)
app.add_typer(bench)
