"""A run: list what there is, compute what has no rows yet, and leave whole files however it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pmclip_deploy.archive.engines import Size, local
from pmclip_deploy.archive.listing import items_of
from pmclip_deploy.archive.output import Output
from pmclip_deploy.archive.tables import About, schema_of
from pmclip_deploy.archive.worker import Done, Job
from pmclip_deploy.atomic import write_errors
from pmclip_deploy.bundle.manifest import Manifest
from pmclip_deploy.errors import BundleError, InputError
from pmclip_deploy.search.index import locked

Engine = Callable[[Job, Sequence[Path], Size], Iterator[Done]]


@dataclass(frozen=True)
class Report:
    """Images."""

    listed: int = 0
    known: int = 0  # have rows from an earlier run
    computed: int = 0
    failed: int = 0  # of these: their row says why


def build_archive(
    source: str,
    folder: Path,
    about: About,
    manifest: Manifest,
    size: Size,
    *,
    bundle: Path | None = None,
    device: str = "auto",
    threads: int | None = None,
    salt: bytes | None = None,
    engine: Engine = local,
    progress: Callable[[int, int], None] = lambda done, count: None,
) -> Report:
    """Writes the rows of every image of ``source`` that has none yet to ``folder``. ``progress`` is told (images done, images to do).

    Raises InputError where there is no source, UsageError where the folder holds something else, and BundleError where it cannot be
    written. An image that cannot be read is a row.
    """
    items = items_of(source)
    with write_errors(f"{folder}:", "give another --out", BundleError):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "_archive"):
        output = Output(folder, about, schema_of(about, manifest.embed_dim))
        files, new, listed = output.list(items)
        if not listed:
            raise InputError(f"{source}: holds no file", "check the path")
        job = Job(about, None if bundle is None else str(bundle.absolute()), device, threads, salt, str(output.batches.absolute()))
        computed = failed = 0
        progress(0, new)
        for done in engine(job, files, size) if files else ():
            output.add(done.file)
            computed, failed = computed + done.images, failed + done.failed
            progress(computed, new)
        output.close()
    return Report(listed, listed - new, computed, failed)
