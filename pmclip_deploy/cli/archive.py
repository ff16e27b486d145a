"""`pmclip-deploy archive`: a whole archive to Parquet files."""

import time
from contextlib import redirect_stdout
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from pmclip_deploy.archive import ASK, COMMANDS
from pmclip_deploy.cli.options import Bundle, Device, Json, check_choice
from pmclip_deploy.cli.output import RESEARCH_ONLY, print_json, print_notes
from pmclip_deploy.cli.search import salt_of
from pmclip_deploy.console import counted, one_line, print_note
from pmclip_deploy.errors import UsageError
from pmclip_deploy.extras import need_extra
from pmclip_deploy.spec import ARCHIVING_SCHEMA
from pmclip_deploy.threads import cpu_threads

ENGINES = ("local", "ray")
EVERY_S = 10.0  # between two lines of progress

Source = Annotated[
    str, typer.Argument(metavar="FOLDER|LIST|DICOMDIR|URL", help="Folder, list of paths (.txt), DICOMDIR, or a DICOMweb service.")
]
Out = Annotated[Path, typer.Option(help="Folder of the Parquet files. An interrupted run continues from where it stopped.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes, each with the model. Default: one for each core.", show_default=False)]
Batch = Annotated[int, typer.Option(min=1, max=65536, help="Images that are written at a time. A kill costs one batch of each worker.")]
Engine = Annotated[str, typer.Option(help="local: processes of this machine. ray: a Ray cluster.")]
RayAddress = Annotated[
    str | None, typer.Option(help="ray: HOST:PORT of a running cluster. Default: one of this process, on loopback.", show_default=False)
]
NumCpus = Annotated[float, typer.Option(min=0, help="ray: CPUs that each worker takes.")]
NumGpus = Annotated[float, typer.Option(min=0, help="ray: GPUs that each worker takes.")]
Ids = Annotated[str, typer.Option(metavar="path|uid", help="Id of an image: its path, or its SOP Instance UID, salted and hashed.")]
SaltFile = Annotated[
    Path | None, typer.Option(help="For --ids uid: file with a salt of 16 bytes or more. Keep the file.", show_default=False)
]
Questions = Annotated[list[str] | None, typer.Option("--question", "-Q", help="A question to ask about each image. Repeat it for more.")]




def archive(
    what: Annotated[str, typer.Argument(metavar="embed|ask|findings", help="What to write about each image.", show_default=False)],
    source: Source,
    out: Out,
    question: Questions = None,
    engine: Engine = "local",
    workers: Workers = None,
    batch: Batch = 64,
    ray_address: RayAddress = None,
    num_cpus: NumCpus = 1,
    num_gpus: NumGpus = 0,
    ids: Ids = "path",
    salt_file: SaltFile = None,
    bundle: Bundle = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Embed every image of an archive, ask about it, or look for findings in it. The rows are in Parquet files.

    pmclip-deploy archive ask /nas/ct --out answers -Q "what imaging modality is this?"
    """
    check_choice("archive", what, COMMANDS)
    check_choice("--engine", engine, ENGINES)
    if (what == ASK) != bool(question):
        raise UsageError("`archive ask` and --question go together", 'ask something, for example -Q "is there a fracture?"')
    if engine == "local" and (ray_address is not None or (num_cpus, num_gpus) != (1, 0)):
        raise UsageError("--ray-address, --num-cpus and --num-gpus are for --engine ray", "leave them out")
    need_extra("archive", "`archive`", "pyarrow")
    if engine == "ray":
        need_extra("ray", "--engine ray", "ray")
    salt = salt_of(ids, salt_file)
    if source.startswith(("http://", "https://")) and salt is None:
        raise UsageError("a DICOMweb address holds UIDs, which name a patient's images", "give --ids uid and --salt-file")

    from pmclip_deploy.archive.engines import Size, local, on_ray
    from pmclip_deploy.archive.run import build_archive
    from pmclip_deploy.archive.tables import About
    from pmclip_deploy.ids import salt_check
    from pmclip_deploy.opening import load

    predictor = load(bundle, device)
    print_notes(predictor)
    model = predictor.model
    about = About(
        what, model.bundle, model.version, model.precision, model.sha256, ids, salt_check(salt), tuple(question or ())
    )
    if what == ASK:
        import numpy as np

        predictor.ask_many(np.zeros((8, 8), np.uint8), about.questions)  # raises what would be raised of every image
    count = workers or cpu_threads()
    threads = max(1, cpu_threads() // count) if engine == "local" else max(1, int(num_cpus))
    on = local if engine == "local" else partial(on_ray, address=ray_address, cpus=num_cpus, gpus=num_gpus)
    manifest = predictor.manifest
    del predictor  # the workers have their own
    try:
        with redirect_stdout(None):  # where Ray prints what it hears of nodes that are lost
            report = build_archive(
                source, out, about, manifest, Size(count, batch), bundle=bundle, device=device, threads=threads, salt=salt, engine=on,
                progress=Progress(),
            )  # fmt: skip
    except KeyboardInterrupt:
        print_note(f"{out}: stopped. Run the same command to continue.")
        raise
    if as_json:
        print_json({"schema": ARCHIVING_SCHEMA, "out": str(out), **asdict(report)})
        return
    known = [f"{report.known:,} skipped because they have rows"] if report.known else []
    failed = [f"{report.failed:,} could not be read (their rows say why)"] if report.failed else []
    print(one_line(f"{out}: {', '.join([counted(report.computed, 'image'), *known, *failed])}"))
    print(RESEARCH_ONLY)


class Progress:
    """A line now and then: how many, how fast, and how long it will take."""

    def __init__(self) -> None:
        self._begun = self._said = time.monotonic()

    def __call__(self, done: int, count: int) -> None:
        now = time.monotonic()
        if not done:
            print_note(f"{counted(count, 'image')} to do")
            self._begun = now
        elif now - self._said >= EVERY_S and done < count:
            self._said, rate = now, done / (now - self._begun)
            print_note(f"{done:,} of {count:,} images, {rate:.1f} a second, {_duration((count - done) / rate)} left")


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
