"""`pmclip-deploy`: the commands. An error is printed as one line, and sets the exit code of the process."""

import atexit
import errno
import os
import sys
import traceback
import warnings
from collections.abc import Collection
from contextlib import suppress
from importlib import import_module
from typing import Annotated, Any, TextIO

import typer

from pmclip_deploy import console
from pmclip_deploy.console import print_error
from pmclip_deploy.errors import PmclipError
from pmclip_deploy.process import take_over

COMMANDS = {  # of each command, the module in pmclip_deploy.cli and its function or group
    "infer": "infer.infer",
    "questions": "questions.questions",
    "demo": "demo.demo",
    "classify": "classify.classify",
    "serve": "serve.serve",
    "listen": "listen.listen",
    "queue": "queue.app",
    "ward": "ward.app",
    "evaluate": "evaluate.evaluate",
    "bench": "bench.bench",
    "tune": "tune.tune",
    "doctor": "doctor.doctor",
    "bundle": "bundle.app",
    "search": "search.app",
    "archive": "archive.archive",
    "train": "train.app",
    "import": "import_.import_",
    "export": "export.export",
    "export triton": "triton.export_triton",
    "export triton-check": "triton.triton_check",
    "parity": "export.parity",
}
END_AT_ONCE = ("infer", "classify", "listen")  # a thread of pynetdicom may wait for a peer
QUIET = {"--quiet", "-q"}
ANYWHERE = {"--debug", *QUIET}  # options that also work after a command
FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
READER_LEFT = 128 + 13  # as a shell reports a process that SIGPIPE ended


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"pmclip-deploy {version('pmclip-deploy')}")
        raise typer.Exit()


def app_of(names: Collection[str]) -> typer.Typer:
    """The command line with these commands only. To import and build all of them takes 40 ms."""
    app = typer.Typer(
        name="pmclip-deploy",
        help="Ask radiology images questions, offline. Research use only; not a medical device.",
        no_args_is_help=True,
        add_completion=len(names) > 1,
        context_settings={"help_option_names": ["-h", "--help"]},
        pretty_exceptions_enable=False,
    )
    app.callback()(options)
    for name in names:
        module, _, attribute = COMMANDS[name].partition(".")
        found = getattr(import_module(f"pmclip_deploy.cli.{module}"), attribute)
        if isinstance(found, typer.Typer):
            app.add_typer(found, name=name)
        else:
            app.command(name)(found)
    return app


def options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="If there is an error, print where it was raised. The option also works after a command.")
    ] = False,
    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet", "-q", help="Print results and errors only, no notes and no progress. The option also works after a command."
        ),
    ] = False,
) -> None:
    pass


def main() -> None:
    # pydicom's warnings quote element values, and so might name a patient.
    warnings.simplefilter("ignore")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal without Unicode still gets its answer
    console.quiet = not QUIET.isdisjoint(sys.argv)
    try:
        code = _code_of([argument for argument in sys.argv[1:] if argument not in ANYWHERE], "--debug" in sys.argv)
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        _write_no_more()
        code = READER_LEFT
    finally:
        console.quiet = False
    sys.exit(code)


def _code_of(arguments: list[str], debug: bool) -> int:
    try:
        code = _run(arguments)
        if sys.stdout:  # None where it was closed from the start
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        raise
    except Exception as error:
        if debug:
            _print_trace(error)
        if isinstance(error, PmclipError):
            print_error(str(error))
            return error.exit_code
        if isinstance(error, OSError) and error.errno in FULL:
            _write_no_more(sys.stdout)
            print_error(f"the output cannot be written ({error.strerror}); free some space, or write to another disk")
        else:
            print_error(f"internal: {type(error).__name__}; run the command again with --debug and report what it prints")
        return 1


def _write_no_more(*streams: TextIO) -> None:
    """What is still buffered goes nowhere, so that the interpreter can end without an error of its own."""
    for stream in streams or (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # no file, or None where it was closed from the start
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def program() -> None:
    """``main`` as a process of its own. It exits without interpreter teardown, which would be an eighth of the time of `infer`.

    Functions registered with atexit still run: a session may store what it compiled.
    """
    take_over()
    try:
        main()
    except SystemExit as end:
        named = sys.argv[1] if len(sys.argv) > 1 else ""
        if named in END_AT_ONCE and isinstance(end.code, int):
            atexit._run_exitfuncs()  # as multiprocessing ends its processes
            for stream in filter(None, (sys.stdout, sys.stderr)):
                with suppress(OSError, ValueError):  # nobody reads it any more
                    stream.flush()
            os._exit(end.code)
        raise


def _run(arguments: list[str]) -> int:
    if (two := " ".join(arguments[:2])) in COMMANDS:  # a command of two words, beside one that takes an argument
        arguments = [two, *arguments[2:]]
    named = [name for name in arguments[:1] if name in COMMANDS]
    try:
        command: Any = typer.main.get_command(app_of(named or COMMANDS))
        return int(command.main(arguments, prog_name="pmclip-deploy", standalone_mode=False) or 0)
    except typer.Abort:
        return 130
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # click and rich end the process when they meet one
            raise end.__context__ from None
        raise
    except Exception as error:
        if hasattr(error, "format_message"):  # click's own errors: an unknown option, a missing argument
            return _usage_error(error, " ".join(["pmclip-deploy", *named]))
        raise


def _usage_error(error: Any, command: str) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
    else:
        message, context = error.format_message(), getattr(error, "ctx", None)  # which not all of them have
        message += "" if message.endswith((".", "?")) else "."
        print_error(f"{message} See {context.command_path if context else command} --help")
    return 2


def _print_trace(error: BaseException | None) -> None:
    """Frames and types alone: a foreign exception's message may quote an element of the file, and so a patient."""
    while error is not None:
        print(f"{type(error).__name__}, raised at", file=sys.stderr)
        print("".join(traceback.format_tb(error.__traceback__)), end="", file=sys.stderr)
        error = error.__cause__ or error.__context__
