"""The reference of the command line, made from the commands themselves."""

import inspect
from collections.abc import Iterator
from typing import Any

import typer

from pmclip_deploy.cli.app import COMMANDS, app_of

PROGRAM = "pmclip-deploy"


def page() -> str:
    """Markdown: a section for each command, groups with their commands below them."""
    group: Any = typer.main.get_command(app_of(COMMANDS))
    context = group.make_context(PROGRAM, [], resilient_parsing=True)
    return "\n".join(line for name, command in group.commands.items() for line in _section(context, name, command, 2))


def _section(parent: Any, name: str, command: Any, depth: int) -> Iterator[str]:
    context = command.make_context(name, [], parent=parent, resilient_parsing=True)
    yield from ("", f"{'#' * depth} {context.command_path.removeprefix(PROGRAM).strip()}", "", _prose(command.help or ""), "")
    if subcommands := getattr(command, "commands", None):
        for sub, one in subcommands.items():
            yield from _section(context, sub, one, depth + 1)
        return
    yield from ("```text", " ".join([context.command_path, *command.collect_usage_pieces(context)]), "```", "")
    records = [record for parameter in command.get_params(context) if (record := _record(parameter, context))]
    if records:
        yield from ("| Argument or option | Meaning |", "|---|---|")
        yield from (f"| `{_cell(name)}` | {_cell(_code(text))} |" for name, text in records)


def _record(parameter: Any, context: Any) -> tuple[str, str] | None:
    """A row of the table; None for what is hidden, and for ``--help``, which each command has."""
    if getattr(parameter, "hidden", False) or "--help" in parameter.opts:
        return None
    if parameter.param_type_name == "argument":
        return parameter.make_metavar(context), parameter.help or ""
    return parameter.get_help_record(context)


def _prose(text: str) -> str:
    """Help as Markdown: lines that show a command become blocks of code."""
    blocks = inspect.cleandoc(text.replace("\b", "")).split("\n\n")
    return "\n\n".join(f"```text\n{block}\n```" if block.lstrip().startswith(PROGRAM) else _code(block) for block in blocks)


def _code(text: str) -> str:
    """Options and placeholders as code outside of backticks, so that -- stays two hyphens and <x> no tag."""
    parts = text.split("`")
    parts[::2] = [part.replace("<", "&lt;").replace("[", r"\[").replace("*", r"\*").replace("_", r"\_") for part in parts[::2]]
    return "`".join(parts)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")
