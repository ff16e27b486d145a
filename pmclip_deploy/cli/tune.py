"""`pmclip-deploy tune`: measures which backend runs each graph fastest on this machine, and keeps the choice for later commands."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pmclip_deploy.cli.options import Json
from pmclip_deploy.cli.output import console_for_tables, print_json
from pmclip_deploy.console import counted, one_line, print_note

if TYPE_CHECKING:
    from pmclip_deploy.benchmarks.tune import Tuned
    from pmclip_deploy.tuning import Choice, Plan

TUNE_SCHEMA = "pmclip-deploy/tune/1"

BundleFolder = Annotated[
    Path | None, typer.Argument(metavar="[BUNDLE]", help="Bundle folder. Default: the embedded model.", show_default=False)
]
Forget = Annotated[bool, typer.Option("--forget", help="Remove the tuning of the bundle for this machine, and measure nothing.")]


def tune(bundle: BundleFolder = None, forget: Forget = False, as_json: Json = False) -> None:
    """Measure once how each graph of a bundle runs fastest here. Later commands with --device auto use the result."""
    from pmclip_deploy import tuning
    from pmclip_deploy.bundle.files import verify_bundle
    from pmclip_deploy.models import DEFAULT_BUNDLE

    path = bundle or DEFAULT_BUNDLE
    verify_bundle(path)
    if forget:
        removed = [str(file) for file in tuning.forget(path)]
        if as_json:
            print_json({"schema": TUNE_SCHEMA, "bundle": str(path), "removed": removed})
        else:
            print(one_line(f"removed {', '.join(removed)}" if removed else f"{path}: has no tuning for this machine"))
        return

    from pmclip_deploy.benchmarks.tune import compile_graphs, measure

    found = measure(path, note=print_note)
    file = tuning.save(path, found.plans)
    compile_graphs(path)
    one, many = (tuning.plan_for(found.plans, items) for items in (1, None))
    if as_json:
        print_json(
            {
                "schema": TUNE_SCHEMA,
                "bundle": str(path),
                "file": str(file),
                "graphs": [_document(row) for row in found.rows],
                "one": _plan(one),
                "many": _plan(many),
                "default": _plan(found.plans[0]),
                "dropped": found.dropped,
            }
        )
    else:
        _print(found, one, many)
        print(one_line(f"wrote {file}; `pmclip-deploy tune --forget` removes it"))


def _document(row: Any) -> dict[str, Any]:
    choice = {"device": "auto", "between": None, "threads": None, "batch": None} if row.choice is None else row.choice._asdict()
    return {"graph": row.graph, **choice, "ms": row.ms, "ratio": row.ratio, "many_ms": row.many_ms, "many_ratio": row.many_ratio,
            "dropped": row.dropped}  # fmt: skip


def _plan(plan: "Plan") -> dict[str, Any]:
    graphs = {name: choice._asdict() for name, choice in plan.graphs.items()}
    return {"graphs": graphs, **{name: ms for name, ms in plan._asdict().items() if name != "graphs"}}


def _print(found: "Tuned", one: "Plan", many: "Plan") -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("Graph", "Runs on", "One", "To the default", "Of many, each", "To the default", "Chosen")
    for row in found.rows:
        chosen = [name for name, plan in (("one", one), ("many", many)) if plan.graphs.get(row.graph) == row.choice]
        over_many = ["", ""] if row.many_ms is None else [f"{row.many_ms:.2f} ms", f"{row.many_ratio:.2f}"]
        figures = ["", f"dropped: {one_line(row.dropped)}"] if row.dropped else [f"{row.ms:.2f} ms", f"{row.ratio:.2f}"]
        table.add_row(row.graph, _said(row.choice), *map(Text, [*figures, *over_many]), "for " + " and ".join(chosen) if chosen else "")
    console = console_for_tables()
    console.print(table)
    for line in found.dropped:
        console.print(Text(one_line(f"dropped: {line}")))
    for name, plan in (("one picture", one), ("many pictures", many)):
        changed = ", ".join(f"{graph} {_said(choice)}" for graph, choice in plan.graphs.items()) or "as without a tuning"
        default = found.plans[0]
        times = [
            f"{what} {ms:.{digits}f} ms (default {usual:.{digits}f})"
            for what, ms, usual, digits in zip(
                ("new process", "graphs of a further picture", "of one of many"), plan[1:], default[1:], (0, 1, 1), strict=True
            )
        ]
        console.print(Text(f"{name}: {changed}; {', '.join(times)}"))


def _said(choice: "Choice | None") -> str:
    if choice is None:
        return "default"
    threads = "" if choice.threads is None else f", {counted(choice.threads, 'thread')}"
    return f"{choice.device}, {choice.between}{threads}" + ("" if choice.batch is None else f", batches of {choice.batch}")
