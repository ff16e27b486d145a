"""`pmclip-deploy search index | query | delete | show | export`: embeds images or captions into one file, and finds the nearest ones."""

import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pmclip_deploy.archive import ABOUT
from pmclip_deploy.cli.options import Bundle, Device, Engine, Frame, Json, RayAddress, Window, check_choice, check_engine
from pmclip_deploy.cli.output import RESEARCH_ONLY, console_for_tables, print_json, print_notes
from pmclip_deploy.cli.pictures import exists, looks_like_a_path
from pmclip_deploy.console import LONG, counted, decimal, one_line, print_error, print_note, progress, stages
from pmclip_deploy.errors import InputError, UsageError
from pmclip_deploy.extras import need_extra
from pmclip_deploy.files import PNG_AND_JPEG
from pmclip_deploy.spec import DELETION_SCHEMA, INDEX_SCHEMA, INDEXING_SCHEMA, SEARCH_SCHEMA

if TYPE_CHECKING:
    from pmclip_deploy.answer import Match
    from pmclip_deploy.predictor import Predictor
    from pmclip_deploy.search.indexing import Report, Source

app = typer.Typer(help="Find similar images and captions.", no_args_is_help=True)

CAPTIONS = (".txt", ".jsonl")

IndexFile = Annotated[Path, typer.Argument(metavar="INDEX", help="Index file, made by `search index`.", show_default=False)]


@app.command()
def index(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER|CAPTIONS|ARCHIVE",
            help="Folder of images, .txt or .jsonl file of captions, or what `archive embed` wrote: its folder, or one file of it.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option(metavar="INDEX", help="Index file. If it exists, new rows are added.", show_default=False)],
    bundle: Bundle = None,
    device: Device = "auto",
    ids: Annotated[
        str, typer.Option(metavar="path|uid", help="Id of an image: its path, or its SOP Instance UID, salted and hashed.")
    ] = "path",
    salt_file: Annotated[
        Path | None, typer.Option(help="For --ids uid: file with a salt of 16 bytes or more. Keep the file.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> int:
    """Embed a folder of images, or captions. An interrupted run continues from where it stopped. A later run adds new files.

    pmclip-deploy search index archive/ --output archive.index
    """
    salt = salt_of(ids, salt_file)
    if not source.exists():
        raise InputError(f"{source}: no such file or folder", "check the path")
    archive = source if source.is_dir() else source.parent if source.suffix == ".parquet" else None
    of_archive = archive is not None and (archive / ABOUT).is_file()
    if not source.is_dir() and not of_archive and source.suffix.lower() not in CAPTIONS:
        raise UsageError(f"{source}: is neither a folder nor a .txt or .jsonl file", "give a folder or such a file")
    if salt is not None and not source.is_dir() and not of_archive:
        raise UsageError(f"{source}: captions have no UID", "leave out --ids uid")
    if output.is_dir():
        raise UsageError(f"{output}: is a folder", "name a file")

    if of_archive:
        need_extra("archive", "an index of an archive", "pyarrow")
        from pmclip_deploy.archive.indexing import index_from_archive

        if salt is not None:
            raise UsageError("an archive has its ids already", "leave out --ids and --salt-file")
        _print_report(output, index_from_archive(output, source), False, as_json)
        return 0

    from pmclip_deploy.imaging.dicom_file import import_pydicom_lean
    from pmclip_deploy.search.indexing import build_index, captions_of_file, images_of_folder

    import_pydicom_lean()
    predictor = _predictor(bundle, device)
    embedded: Source[Any] = images_of_folder(predictor, source, salt) if source.is_dir() else captions_of_file(predictor, source)
    try:
        report = build_index(output, embedded, lambda items: (stages if len(items) >= LONG else progress)(items, "Embedding"))
    except KeyboardInterrupt:
        print_note(f"{output}: stopped. Run the same command to continue.")
        raise
    for each in report.unreadable:
        print_error(f"{each['message']}; {each['hint']}")
    if not report.embedded and not report.known and not report.broken:
        if not source.is_dir():
            raise InputError(f"{source}: holds no caption", "write one caption per line")
        raise InputError(f"{source}: holds no picture ({counted(len(embedded.items), 'file')})", "give DICOM, PNG or JPEG files")
    _print_report(output, report, salt is not None, as_json)
    return InputError.exit_code if report.broken else 0


def _print_report(output: Path, report: "Report", of_dicom: bool, as_json: bool) -> None:
    if as_json:
        print_json({"schema": INDEXING_SCHEMA, "index": str(output), **asdict(report)})
    elif report.embedded or report.known:
        print(one_line(f"{output}: {_said(report, of_dicom)}"))


def _said(report: "Report", of_dicom: bool) -> str:
    """What became of the items, without counts of 0 behind the first."""
    picture = "DICOM picture" if of_dicom else "picture"
    parts = [
        f"{report.embedded:,} embedded",
        *([f"{report.known:,} skipped because the index has {'its id' if report.known == 1 else 'their ids'}"] if report.known else []),
        *([f"{counted(report.other, f'file is no {picture}', f'files are no {picture}s')}"] if report.other else []),
        *([f"{report.broken:,} could not be read"] if report.broken else []),
    ]
    return ", ".join(parts)


@app.command()
def query(
    indexes: Annotated[
        list[Path], typer.Argument(metavar="INDEX...", help="Index files. Several are searched as one.", show_default=False)
    ],
    wanted: Annotated[
        str, typer.Argument(metavar="TEXT|IMAGE", help="Text, or an image file. An existing file is an image.", show_default=False)
    ],
    text: Annotated[bool, typer.Option("--text", help="Take TEXT as text, even if it looks like a path.")] = False,
    k: Annotated[int, typer.Option("--k", min=1, help="Number of matches.")] = 10,
    engine: Engine = "local",
    ray_address: RayAddress = None,
    bundle: Bundle = None,
    device: Device = "auto",
    frame: Frame = None,
    window: Window = None,
    as_json: Json = False,
) -> None:
    """Find the images or captions nearest to an image or a text.

    pmclip-deploy search query archive.index scan.dcm
    """
    words = [*map(str, indexes[1:]), wanted]
    if not all(map(exists, words[:-1])):
        raise UsageError(f"{len(words)} texts or images given", f'give one image, or one text in double quotes: "{" ".join(words)[:200]}"')
    check_engine(engine, ray_address)
    is_image = not text and exists(wanted)
    if is_image and Path(wanted).is_dir():
        raise InputError(f"{wanted}: is a folder, not an image", "give one image of it, or add --text if this is a text")
    if not text and not is_image and looks_like_a_path(wanted):
        raise InputError(f"{wanted}: no such file", "check the path, or add --text if this is a text")
    if not is_image and (frame is not None or window is not None):
        raise UsageError("--frame and --window are for an image", "leave them out")

    from pmclip_deploy.search.shards import Shards, shards_on_ray

    predictor = _predictor(bundle, device, single_use=True)
    if is_image and not wanted.lower().endswith(PNG_AND_JPEG):
        from pmclip_deploy.imaging.dicom_file import import_pydicom_lean

        import_pydicom_lean()
    start = time.perf_counter()
    with shards_on_ray(indexes, ray_address) if engine == "ray" else nullcontext(Shards(indexes)) as opened:
        opened.refuse_other_bundle(predictor.model.bundle, predictor.model.sha256)  # before all of it is read
        documents = opened.to_json()
        verified = time.perf_counter()
        matches = predictor.search(opened, **{"image" if is_image else "text": wanted}, k=k, frame=frame, window=window)
        done = time.perf_counter()
    steps = {"index": verified - start, "search": done - verified, "total": done - start}
    timings = {name: round(1e3 * seconds, 2) for name, seconds in steps.items()}
    if as_json:
        document = {
            "schema": SEARCH_SCHEMA,
            "query": {"image" if is_image else "text": wanted},
            "matches": [match.to_json() for match in matches],
            "index": documents[0] if len(documents) == 1 else documents,
            "model": asdict(predictor.model),
            "timings_ms": timings,
        }
        print_json(document)
    else:
        _print_matches(matches)
        print("time:  " + ", ".join(f"{name} {ms:.0f} ms" for name, ms in timings.items()))
        print(RESEARCH_ONLY)


@app.command()
def delete(
    index: IndexFile,
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Ids, as `search query` prints them.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Delete rows by id. If any id is unknown, nothing is deleted."""
    from pmclip_deploy.search.indexing import delete_rows

    delete_rows(index, ids)
    if as_json:
        print_json({"schema": DELETION_SCHEMA, "index": str(index), "deleted": len(set(ids))})
    else:
        print(f"{one_line(str(index))}: {counted(len(set(ids)), 'row')} deleted")


@app.command()
def show(index: IndexFile, as_json: Json = False) -> None:
    """Verify an index, and print what it holds."""
    from pmclip_deploy.search.index import index_from_file

    opened = index_from_file(index)
    if as_json:
        print_json({"schema": INDEX_SCHEMA, **opened.to_json()})
        return
    about = opened.about
    print(f"{one_line(str(index))}: {counted(len(opened), about.embedded)}, {opened.dim} numbers each, {opened.bytes:,} bytes, verified")
    print(f"bundle: {one_line(about.bundle)}, sha256 {about.bundle_sha256}")
    print(f"ids:    {about.ids}")
    print(f"checksum: {opened.checksum}")


@app.command()
def export(
    index: IndexFile,
    table: Annotated[str, typer.Option(metavar="NAME", help="Table of PostgreSQL. It holds rows of one bundle.")] = "pmclip_embeddings",
) -> None:
    """Print an index as SQL for PostgreSQL with pgvector. Rows of an earlier run are updated.

    pmclip-deploy search export archive.index | psql -X service=pacs
    """
    from pmclip_deploy.search.index import index_from_file
    from pmclip_deploy.search.postgres import sql_from_index

    if sys.stdout.isatty():
        raise UsageError("the SQL is long, and not for a terminal", "pipe it to `psql -X`, or write it to a file")
    for part in sql_from_index(index_from_file(index), table):
        sys.stdout.buffer.write(part.encode())


def salt_of(ids: str, file: Path | None) -> bytes | None:
    check_choice("ids", ids, ("path", "uid"))
    if (ids == "uid") != (file is not None):
        raise UsageError(
            "--ids uid and --salt-file FILE go together", "make a salt with `head -c 32 /dev/urandom > FILE`, and keep the file"
        )
    try:
        return None if file is None else file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})", "check --salt-file") from None


def _predictor(bundle: Path | None, device: str, single_use: bool = False) -> "Predictor":
    from pmclip_deploy.opening import load

    predictor = load(bundle, device, single_use=single_use)
    print_notes(predictor)
    return predictor


def _print_matches(matches: "list[Match]") -> None:
    from rich.table import Column, Table
    from rich.text import Text

    table = Table("Rank", "Score", Column("Id", overflow="fold"))
    for rank, match in enumerate(matches, 1):
        table.add_row(str(rank), decimal(match.score, ".3f"), Text(one_line(match.id)))
    console = console_for_tables()
    console.print(table)
