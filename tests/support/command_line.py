"""The command line, called from a test."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from supersonic_moe.cli.app import app

QUICK = ("--device", "cpu", "--min-ms", "0", "--warm-ms", "0")


def run(*args: str, columns: int = 120) -> Result:
    """Without colours, on a terminal of that width."""
    return CliRunner(env={"COLUMNS": str(columns), "NO_COLOR": "1"}).invoke(app, list(args))


def outcome(*args: str) -> tuple[int, str]:
    """Exit code and output of ``run``, which travel between processes."""
    result = run(*args)
    return result.exit_code, result.output


def words(result: Result) -> str:
    """What was printed on one line, without the frames of messages."""
    return " ".join(result.output.replace("│", " ").split())
