"""Implements the command `nvlm-trt`. Prints an error in one line and exits with 2; --debug shows the traceback."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import signal
import sys
from typing import Annotated, Any

import typer

from nvlm_trt import standard_streams, terminal
from nvlm_trt.commands.ask import ask
from nvlm_trt.commands.bench import bench
from nvlm_trt.commands.build import build
from nvlm_trt.commands.deploy import deploy
from nvlm_trt.commands.doctor import doctor
from nvlm_trt.commands.evaluate import evaluate
from nvlm_trt.commands.gateway import gateway
from nvlm_trt.commands.init_checkpoint import init_checkpoint
from nvlm_trt.commands.inspect_checkpoint import inspect
from nvlm_trt.commands.plan import plan
from nvlm_trt.commands.serve import serve
from nvlm_trt.commands.tiles import tiles
from nvlm_trt.commands.tinydocs import tinydocs
from nvlm_trt.commands.verify import verify
from nvlm_trt.errors import NvlmError
from nvlm_trt.standard_streams import OutputError
from nvlm_trt.termination import signal_behind, tidy_on_termination

_SIGPIPE_STATUS = 141  # as of a program that SIGPIPE ends
# typer uses click or its own copy of click
_ClickException: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

app = typer.Typer(
    name="nvlm-trt",
    help="Build, verify, serve and ask NVLM-1.0 engines (NVLM-D, NVLM-X, NVLM-H).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"nvlm-trt {importlib.metadata.version('nvlm-trt')}")
        raise typer.Exit


@app.callback()
def main_options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if debug:
        os.environ["NVLM_TRT_DEBUG"] = "1"


app.command("init-checkpoint")(init_checkpoint)
app.command()(inspect)
app.command()(build)
app.command()(plan)
app.command()(verify)
app.command()(serve)
app.command()(ask)
app.command()(deploy)
app.command()(doctor)
app.command()(gateway)
app.command()(tiles)
app.command("eval")(evaluate)
app.command()(tinydocs)
app.add_typer(bench, name="bench")


def main() -> None:
    """Run a command and print its error in one line."""
    standard_streams.prepare()
    try:
        status = _run()
        sys.stdout.flush()
    except OutputError as error:
        if error.is_pipe:
            status = _SIGPIPE_STATUS
        else:
            _print_error(str(error))
            status = 2
    sys.exit(status)


def _run() -> int:
    try:
        with tidy_on_termination():
            return int(app(standalone_mode=False) or 0)
    except _ClickException as error:
        _show_usage_error(error)
        return error.exit_code
    except typer.Abort:
        _print_error("aborted")
        return 1
    except OutputError:
        raise
    except Exception as error:
        if _debugging():
            raise
        signalled = signal_behind(error)
        return _report(error) if signalled is None else _status_of(signalled)


def _report(error: Exception) -> int:
    """Print an error in one line. Return the exit status."""
    if isinstance(error, NvlmError):
        _print_error(str(error))
        return 2
    if isinstance(error, MemoryError):
        _print_error(f"out of memory ({error}); `nvlm-trt plan` shows what an engine needs, smaller limits need less")
        return 2
    detail = " ".join(str(error).split()) or "no message"
    _print_error(f"internal: {type(error).__name__}: {detail}; `nvlm-trt --debug ...` shows the traceback")
    return 1


def _status_of(signalled: KeyboardInterrupt | SystemExit) -> int:
    """Return the exit status of a command that a signal has ended."""
    code = signalled.code if isinstance(signalled, SystemExit) else 128 + signal.SIGINT
    return code if isinstance(code, int) else 1


def _show_usage_error(error: Any) -> None:
    """Print a wrong option in one line; without any argument, the help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "nvlm-trt"
    message = " ".join(error.format_message().split()).rstrip(".")
    _print_error(f"{message[:1].lower()}{message[1:]}; see `{command} --help`")


def _print_error(message: str) -> None:
    with contextlib.suppress(OSError):  # standard error cannot be written either
        terminal.error(message)


def _debugging() -> bool:
    return os.environ.get("NVLM_TRT_DEBUG") == "1"


if __name__ == "__main__":
    main()
