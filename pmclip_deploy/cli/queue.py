"""`pmclip-deploy queue`: what a node has done, does, and cannot do. It works while `listen` runs, and while it does not."""

import json
import shutil
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pmclip_deploy.atomic import write_errors
from pmclip_deploy.console import counted
from pmclip_deploy.errors import UsageError

if TYPE_CHECKING:
    from pmclip_deploy.node.ledger import Ledger
    from pmclip_deploy.node.settings import Ward

app = typer.Typer(help="See and steer the jobs of `listen`.", no_args_is_help=True)

Config = Annotated[Path, typer.Option("--config", help="The node's configuration, ward.yaml.")]
Id = Annotated[int, typer.Argument(min=1, help="Number of the job, from `queue show`.")]


def _opened(config: Path) -> "tuple[Ward, Ledger]":
    from pmclip_deploy.extras import need_extra

    need_extra("ward", "queue", "yaml", "pydantic")
    from pmclip_deploy.node.ledger import Ledger
    from pmclip_deploy.node.settings import ward_from_file

    ward = ward_from_file(config)
    if not (ward.state / "queue.db").exists():
        raise UsageError(f"{ward.state}: no node has run here yet", "start `pmclip-deploy listen`, or check --config")
    return ward, Ledger(ward.state / "queue.db")


def _no_job(job: int) -> UsageError:
    return UsageError(f"there is nothing to do for job {job}", "look at `pmclip-deploy queue show`")


@app.command()
def show(config: Config, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Print the jobs that are not done, with their ages and reasons. No line names a patient."""
    _, ledger = _opened(config)
    now, counts, rows = time.time(), ledger.counts(), ledger.rows()
    if as_json:
        jobs = [{key: value for key, value in row.items() if key not in ("opened", "changed")} | _ages(row, now) for row in rows]
        print(json.dumps({"schema": "pmclip-deploy/queue/1", "counts": counts, "jobs": jobs}, indent=2))
        return
    for table, states in counts.items():
        print(f"{table}: {', '.join(f'{count:,} {state}' for state, count in states.items()) or 'none'}")
    for row in rows:
        sent = f", {row['destination']}: {row['sent']} {row['refused']}".rstrip() if row["destination"] else ""
        print(
            f"{row['id']:>6}  {row['protocol']} version {row['version']}, {row['state']} {row['reason']}".rstrip()
            + f", {_age(now - row['opened'])} old{sent}"
        )


def _ages(row: Any, now: float) -> dict[str, float]:
    return {"age_s": round(now - row["opened"], 1), "unchanged_s": round(now - row["changed"], 1)}


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


@app.command()
def retry(job: Id, config: Config) -> None:
    """Try a job again now: one that failed, or whose delivery waits, was refused or was given up."""
    _, ledger = _opened(config)
    if not ledger.retry(job):
        raise _no_job(job)
    print(f"job {job} is tried again")


@app.command()
def drop(job: Id, config: Config) -> None:
    """End a job: nothing more is made or sent of it. What was sent stays where it is."""
    _, ledger = _opened(config)
    if not ledger.drop(job):
        raise _no_job(job)
    print(f"job {job} is dropped")


@app.command()
def export(job: Id, folder: Annotated[Path, typer.Argument(help="Folder for the copies.")], config: Config) -> None:
    """Copy the reports of a job. They name the patient."""
    from pmclip_deploy.node.audit import Trail
    from pmclip_deploy.node.receive import Folders

    ward, _ = _opened(config)
    files = sorted(Folders(ward.state).reports.glob(f"{job}.*.dcm"))
    if not files:
        raise UsageError(f"job {job} has no report here", "look at `pmclip-deploy queue show`")
    with write_errors("the audit trail", "check `audit` in ward.yaml"), closing(Trail(ward)) as trail:
        trail.exported(folder, files, person=True)
    with write_errors(f"{folder}:", "give another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            shutil.copyfile(file, folder / file.name)
    print(f"{folder}: {counted(len(files), 'report')}")


@app.command()
def purge(config: Config, older: Annotated[str, typer.Option(help="Age of what is forgotten, such as 7d or 12h.")] = "7d") -> None:
    """Forget jobs that ended long ago. Images and reports are deleted by `disk` in ward.yaml, not by this command."""
    from pmclip_deploy.extras import need_extra

    need_extra("ward", "queue", "yaml", "pydantic")
    from pmclip_deploy.node.settings import seconds

    try:
        age = float(seconds(older))
    except ValueError as error:
        raise UsageError(f"--older {older[:40]!r}: {error}", "give a number and s, m, h or d") from None
    _, ledger = _opened(config)
    print(f"{counted(ledger.purge(age), 'job')} forgotten")
