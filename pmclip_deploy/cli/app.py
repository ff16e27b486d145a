"""`pmclip-deploy`: the commands, and how an error leaves the process as one line and an exit code."""

import sys
import traceback
import warnings
from typing import Annotated, Any

import typer

from pmclip_deploy.cli import bench, bundle, classify, doctor, evaluate, export, import_, infer, search, train
from pmclip_deploy.cli.output import print_error
from pmclip_deploy.errors import PmclipError

app = typer.Typer(
    name="pmclip-deploy",
    help="Ask radiology images questions, offline. Research use only; not a medical device.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("infer")(infer.infer)
app.command("classify")(classify.classify)
app.command("evaluate")(evaluate.evaluate)
app.command("bench")(bench.bench)
app.command("doctor")(doctor.doctor)
app.add_typer(bundle.app, name="bundle")
app.add_typer(search.app, name="search")
app.add_typer(train.app, name="train")
app.command("import")(import_.import_)
app.command("export")(export.export)
app.command("parity")(export.parity)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"pmclip-deploy {version('pmclip-deploy')}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="On an error, print where it was raised; works after a command too.")] = False,
) -> None:
    pass


def main() -> None:
    # pydicom's warnings quote element values, and so might name a patient.
    warnings.simplefilter("ignore")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal without Unicode still gets its answer
    debug = "--debug" in sys.argv
    try:
        code = _run([argument for argument in sys.argv[1:] if argument != "--debug"])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        import os

        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        if debug:
            _print_trace(error)
        known = isinstance(error, PmclipError)
        print_error(str(error) if known else f"internal: {type(error).__name__} (run again with --debug, and report what it prints)")
        code = error.exit_code if isinstance(error, PmclipError) else 1
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    try:
        command: Any = typer.main.get_command(app)
        return int(command.main(arguments, prog_name="pmclip-deploy", standalone_mode=False) or 0)
    except typer.Abort:
        return 130
    except Exception as error:
        if hasattr(error, "format_message"):  # click's own errors: an unknown option, a missing argument
            return _usage_error(error)
        raise


def _usage_error(error: Any) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
    else:
        context = getattr(error, "ctx", None)
        print_error(f"{error.format_message()} See {context.command_path if context else 'pmclip-deploy'} --help")
    return 2


def _print_trace(error: BaseException | None) -> None:
    """Frames and types alone: a foreign exception's message may quote an element of the file, and so a patient."""
    while error is not None:
        print(f"{type(error).__name__}, raised at", file=sys.stderr)
        print("".join(traceback.format_tb(error.__traceback__)), end="", file=sys.stderr)
        error = error.__cause__ or error.__context__
