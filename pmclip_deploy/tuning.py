"""What `tune` chose for a bundle on this machine: of each graph the device, the precision between operators, threads and batch.

A tuning is a small JSON file beside the bundle, never in it, or in this user's cache. Each processor has a file of its own, so that
machines can share a bundle. A tuning of another processor, of other versions or of another bundle is not used. Standard library only.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from pmclip_deploy.atomic import write_errors, written
from pmclip_deploy.bundle.names import MANIFEST
from pmclip_deploy.models import DEFAULT_BUNDLE
from pmclip_deploy.sessions import F32, backend_for, cache_path, devices
from pmclip_deploy.threads import affinity, processor

SCHEMA = "pmclip-deploy/tuning/2"
LARGEST = 64 << 10  # bytes of a tuning
MOST = 64  # inputs of a batch
WORTH = 0.95  # of the default's time, or less: what gains less may have gained it by chance
AGAIN = "run `pmclip-deploy tune` again"


class Choice(NamedTuple):
    """How one graph runs. ``device`` is of ``sessions.devices()``; a tuning never names "auto"."""

    device: str
    between: str = F32
    threads: int | None = None
    batch: int | None = None  # of a tower: how many inputs it computes at a time where there are many; None: as without a tuning


class Plan(NamedTuple):
    """How a bundle runs. A graph without a choice runs as without a tuning."""

    graphs: Mapping[str, Choice]
    first_ms: float  # a new process, to its first answer
    next_ms: float  # each further picture: its graphs alone
    batch_ms: float  # the same of many pictures, with the towers' batches


def plan_for(plans: Sequence[Plan], items: int | None) -> Plan:
    """The fastest for so many pictures, with the time to open it. The first plan is the default, and stays where another one's first answer
    gains too little.

    None is for more than can be counted, where opening is no matter. They may come one by one or in batches: the geometric mean of both
    times is the least."""

    def time(plan: Plan) -> float:
        first = plan.first_ms if plan is plans[0] else plan.first_ms / WORTH
        return plan.next_ms * plan.batch_ms if items is None else first + (max(items, 1) - 1) * plan.next_ms

    return min(plans, key=time)


# --- its file -------------------------------------------------------------------------------------------------------------------


def tuning_file(bundle: Path) -> Path | None:
    """This machine's tuning of a bundle; None if there is none. The user's own comes before the one beside the bundle.

    Where nobody ever tuned, two folders are looked for and nothing is read.
    """
    user = cache_path("tuning")
    folders = [_own(bundle) if user and user.is_dir() else None, _beside(bundle)]
    return next((file for folder in folders if folder and folder.is_dir() and (file := folder / _name()).is_file()), None)


def save(bundle: Path, plans: Sequence[Plan]) -> Path:
    """Writes this machine's tuning: beside the bundle, or in the user's cache if nothing can be written there or the bundle is the
    embedded one. An older tuning in the other place goes. Raises UsageError if neither place can be written to."""
    if beside := _beside(bundle):
        with suppress(OSError):
            file = _written(beside, _content(bundle, plans))
            _remove(_own(bundle))
            return file
    return save_own(bundle, plans)


def save_own(bundle: Path, plans: Sequence[Plan]) -> Path:
    """``save`` in the user's cache."""
    with write_errors("the tuning", "set XDG_CACHE_HOME to a folder that can be written to"):
        own = _own(bundle)
        if own is None:
            raise OSError("no home")
        return _written(own, _content(bundle, plans))


def forget(bundle: Path) -> list[Path]:
    """Removes this machine's tunings of a bundle. -> those that were there. Raises UsageError if one cannot be removed."""
    with write_errors("the tuning", "check the permissions of its folder"):
        return [file for folder in (_own(bundle), _beside(bundle)) if (file := _remove(folder))]


def choices_of(bundle: Path, items: int | None, notes: list[str]) -> dict[str, Choice]:
    """By graph, what this machine's tuning chose for so many pictures. Empty without a tuning that fits; where a user can mend that, a line
    in ``notes`` says how."""
    try:
        file = tuning_file(bundle)
    except OSError:  # a home that cannot be looked into
        file = None
    if file is None:
        return {}
    try:
        document, plans = _tuning(file)
        if document["processor"] != processor():
            return {}  # copied from another machine
        if document["bundle_sha256"] != _sha256(bundle):
            raise ValueError("it was made for other content of the bundle")
        chosen = plan_for(plans, items).graphs
        for backend in {backend_for(choice.device) for choice in chosen.values()}:
            if (here := backend.version()) != (there := document["versions"][backend.name]):
                raise ValueError(f"it was made with {backend.name} {there}, and here is {here or 'none'}")
            if unknown := {c.between for c in chosen.values() if backend_for(c.device) is backend} - {*backend.between()}:
                raise ValueError(f"{backend.name} has no {unknown.pop()} here")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        said = error.strerror if isinstance(error, OSError) else str(error) if isinstance(error, ValueError) else "tune did not write it so"
        notes.append(f"{file} is not used ({' '.join(str(said).split())[:150]}); run `pmclip-deploy tune` again, or remove the file")
        return {}
    return dict(chosen)


def _content(bundle: Path, plans: Sequence[Plan]) -> str:
    used = {choice.device for plan in plans for choice in plan.graphs.values()}
    document = {
        "schema": SCHEMA,
        "processor": processor(),
        "versions": {backend.name: backend.version() for backend in map(backend_for, sorted(used))},
        "bundle_sha256": _sha256(bundle),
        "plans": [{**plan._asdict(), "graphs": {name: choice._asdict() for name, choice in plan.graphs.items()}} for plan in plans],
    }
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def _tuning(file: Path) -> tuple[dict[str, Any], list[Plan]]:
    """Raises one of the errors that ``choices_of`` expects where the file is not as ``save`` writes it."""
    with file.open("rb") as opened:
        content = opened.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"it has more than {LARGEST} bytes")
    document = json.loads(content)
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ValueError(f"its schema is not {SCHEMA}")
    rows = [({name: _choice(**of) for name, of in row["graphs"].items()}, row) for row in document["plans"]]
    plans = [Plan(graphs, row["first_ms"], row["next_ms"], row["batch_ms"]) for graphs, row in rows]
    if not plans or plans[0].graphs or not all(isfinite(ms) and ms > 0 for plan in plans for ms in plan[1:]):
        raise ValueError("its plans are not as tune writes them")
    return document, plans


def _choice(device: str, between: str, threads: int | None, batch: int | None) -> Choice:
    if device == "auto" or device not in devices() or not isinstance(between, str):
        raise ValueError(f"it names the device {str(device)[:20]!r}")
    if threads is not None and (type(threads) is not int or not 1 <= threads <= len(affinity())):
        raise ValueError(f"it names {str(threads)[:20]} threads")
    if batch is not None and (type(batch) is not int or not 2 <= batch <= MOST):
        raise ValueError(f"it names batches of {str(batch)[:20]}")
    return Choice(device, between, threads, batch)


def _own(bundle: Path) -> Path | None:
    return cache_path("tuning", _sha256(bundle)[:16])


def _beside(bundle: Path) -> Path | None:
    """None beside the embedded bundle, which is in the package."""
    if bundle == DEFAULT_BUNDLE or bundle.samefile(DEFAULT_BUNDLE):
        return None
    whole = Path(os.path.realpath(bundle))
    return whole.with_name(f"{whole.name}.tuning")


def _name() -> str:
    return f"{hashlib.sha256(processor().encode()).hexdigest()[:16]}.json"


def _sha256(bundle: Path) -> str:
    """Of the manifest, which has the hashes of all other files."""
    return hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest()


def _written(folder: Path, content: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with written(folder / _name()) as new:
        new.write_text(content)
    return folder / _name()


def _remove(folder: Path | None) -> Path | None:
    """The tuning that was removed, and its folder if nothing else is in it. Raises OSError."""
    if folder is None or not (folder / _name()).is_file():
        return None
    (folder / _name()).unlink()
    with suppress(OSError):  # other processors' tunings are there
        folder.rmdir()
    return folder / _name()
