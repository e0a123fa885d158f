"""The command `medphi`: its verbs, and the one place where errors become lines and exit codes.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped from the keyboard. An error is one line on
the error stream, followed by a list where several things are wrong; a traceback is shown only with
`--debug`.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import mlx_medphi
from mlx_medphi.blas import load_blas
from mlx_medphi.cli import (
    adapter,
    check,
    data,
    demo,
    export,
    fuse,
    generate,
    swift_kit,
    train,
    verify,
)
from mlx_medphi.cli.show import fail
from mlx_medphi.errors import MedPhiError

__all__ = ["main", "run"]

INTERRUPTED = 130
STOPPED = "stopped from the keyboard"
# Some versions of typer bring their own copy of click; the base classes tell which is in use.
_ClickUsageError: Any = typer.BadParameter.__base__
_ClickError: Any = _ClickUsageError.__base__


class _Stopped(MedPhiError):
    exit_code = INTERRUPTED


class _Verbs(TyperGroup):
    """The verbs; Ctrl-C in one of them is an error like the others."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise _Stopped(STOPPED) from None


app = typer.Typer(
    name="medphi",
    cls=_Verbs,
    no_args_is_help=True,
    # Plain help: it starts at once, wraps no example and reads well in a pipe.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command(epilog=demo.EXAMPLES)(demo.demo)
app.add_typer(data.app)
app.command(epilog=train.EXAMPLES)(train.train)
app.command(epilog=generate.EXAMPLES)(generate.generate)
app.command(epilog=fuse.EXAMPLES)(fuse.fuse)
app.add_typer(adapter.app)
app.command(epilog=export.EXAMPLES)(export.export)
app.command(epilog=verify.EXAMPLES)(verify.verify)
app.command(epilog=swift_kit.EXAMPLES)(swift_kit.swift_kit)
app.command(epilog=check.EXAMPLES)(check.check)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"medphi {mlx_medphi.__version__}")
        raise typer.Exit()


@app.callback()
def medphi(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Teach Phi-3 to write medical notes from conversations, and keep or fuse what it learned.

    Not a medical device: a note written by a model must be read and corrected by a clinician.
    """
    # Before any verb imports MLX, which looks for these symbols once.
    load_blas()


def main(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; `--debug` in front lets errors through."""
    debug = "--debug" in arguments[:1]
    _replace_closed_streams()
    try:
        code = app(args=list(arguments), prog_name="medphi", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of a pipe has seen enough; nothing more must be written at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as exc:
        if debug and not isinstance(exc, _ClickError):
            raise
        return _explain(exc)
    return code if isinstance(code, int) else 0


def run() -> None:
    """The console script."""
    try:
        code = main(sys.argv[1:])
    except KeyboardInterrupt:
        code = fail(STOPPED, INTERRUPTED)
    sys.exit(code)


def _replace_closed_streams() -> None:
    """What the caller closed is None here; what is written to it goes nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))


def _explain(exc: Exception) -> int:
    if isinstance(exc, MedPhiError):
        return fail(str(exc), exc.exit_code)
    if isinstance(exc, _ClickUsageError):
        return _explain_usage(exc)
    if isinstance(exc, _ClickError):
        return fail(_one_line(exc.format_message()), exc.exit_code)
    if isinstance(exc, OSError) and exc.strerror:
        where = f"{exc.filename}: " if exc.filename else ""
        return fail(f"{where}{exc.strerror}. What was there before is unchanged.", 1)
    return fail(f"internal error: {_what(exc)}; run `medphi --debug …` for the traceback", 1)


def _what(exc: Exception) -> str:
    """The kind of an unexpected error and where it rose, without words that may quote a row."""
    frame = traceback.extract_tb(exc.__traceback__)[-1:]
    place = f" in {Path(frame[0].filename).name}:{frame[0].lineno}" if frame else ""
    # MLX speaks of shapes and memory in these; a KeyError would repeat what it was given.
    words = f" ({_one_line(str(exc))})" if type(exc) is RuntimeError else ""
    return f"{type(exc).__name__}{place}{words}"


def _explain_usage(exc: Any) -> int:
    if type(exc).__name__ == "NoArgsIsHelpError":
        print(exc.format_message(), file=sys.stderr)
        return 2
    path = exc.ctx.command_path if exc.ctx else "medphi"
    return fail(f"{_one_line(exc.format_message()).rstrip('.')}. See `{path} --help`.", 2)


def _one_line(text: str) -> str:
    return " ".join(text.split())
