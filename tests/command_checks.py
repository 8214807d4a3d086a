"""What the tests of commands share: the real command line in this process, and the one sentence of a refusal."""

from click.testing import Result
from typer.testing import CliRunner

from gossamer.server.cli import app


def run(command: tuple[str, ...], *arguments: object, **environment: str) -> Result:
    """`gossamer` with this command and its arguments, on a wide terminal without colours."""
    plain = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    result = CliRunner().invoke(app, [*command, *map(str, arguments)], env=plain | environment)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def complaint(command: tuple[str, ...], code: int, *arguments: object) -> str:
    """The one sentence on standard error with which the command ends; nothing is printed before it."""
    result = run(command, *arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith("gossamer: ") and result.stderr.endswith(".\n") and result.stderr.count("\n") == 1
    return str(result.stderr)
