"""Options that several commands share, and the checks that belong to them."""

from collections.abc import Collection
from math import isfinite
from pathlib import Path
from typing import Annotated

import typer

from pmclip_deploy.errors import UsageError
from pmclip_deploy.extras import need_extra
from pmclip_deploy.sessions import devices

LARGEST_SEED = 2**32 - 1
*_others, _last = devices()
DEVICES = f"{', '.join(_others)} or {_last}"


def finite(value: float | None) -> float | None:
    """NaN is in every range that typer checks."""
    if value is not None and not isfinite(value):
        raise typer.BadParameter(f"{value} is no number.")
    return value


Bundle = Annotated[Path | None, typer.Option(help="Bundle folder. Default: the embedded model.", show_default=False)]
Device = Annotated[str, typer.Option(help=f"Where the model runs: {DEVICES}.")]
Frame = Annotated[int | None, typer.Option(min=0, help="Frame of a multi-frame file, counted from 0. Default: the middle frame.")]
Window = Annotated[
    tuple[float, float] | None,
    typer.Option(metavar="CENTER WIDTH", help="Window in modality units, which are HU for CT. Default: the window of the file."),
]
Images = Annotated[Path | None, typer.Option(help="Folder of the images that the lines of --data name.", show_default=False)]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        metavar="FILE",
        help="Write a .jsonl file (JSON lines) or a .csv file, row by row, and print no tables. An existing file is replaced.",
        show_default=False,
    ),
]
Engine = Annotated[str, typer.Option(help="local: this machine. ray: a Ray cluster.")]
RayAddress = Annotated[
    str | None, typer.Option(help="ray: HOST:PORT of a running cluster. Default: one of this process, on loopback.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def check_choice(option: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise UsageError(f"{option} {value[:60]!r} is unknown", f"choose one of {', '.join(known)}")


def check_engine(engine: str, ray_address: str | None) -> None:
    check_choice("--engine", engine, ("local", "ray"))
    if engine == "ray":
        need_extra("ray", "--engine ray", "ray")
    elif ray_address is not None:
        raise UsageError("--ray-address is for --engine ray", "leave it out")


def check_data_and_images(data: Path | None, images: Path | None) -> None:
    if (data is None) != (images is None):
        raise UsageError("--data and --images go together", "give the file of questions and the folder of its images")
