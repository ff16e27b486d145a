"""`pmclip-deploy train findings`: a second network that looks for findings on radiographs, measured by grouped cross-validation."""

from pathlib import Path
from typing import Annotated

import typer

from pmclip_deploy.cli.evaluate import LARGEST_SEED
from pmclip_deploy.cli.output import print_json
from pmclip_deploy.cli.train_options import SCHEMA, Name, make_folder, need_extra, print_checkpoint


def findings(
    data: Annotated[list[Path], typer.Option("--data", help="FracAtlas's, Kermany's or VQA-Med's folder; repeat for more.")],
    checkpoint: Annotated[Path, typer.Option("--checkpoint", help="Made by `train vqa`; its image tower is what is begun with.")],
    output: Annotated[Path, typer.Option("--output", help="Folder for the checkpoint, the folds and, while they train, 4 GB of views.")],
    folds: Annotated[int, typer.Option(min=3, max=20, help="Parts of the cross-validation.")] = 5,
    only: Annotated[
        list[str] | None, typer.Option(help='Train this fold alone ("0" to "4", or "all" for the network that is kept); repeatable.')
    ] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 7,
    batch_size: Annotated[int, typer.Option(min=2)] = 32,
    learning_rate: Annotated[float, typer.Option("--learning-rate", min=0)] = 1e-3,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED)] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 takes all cores.", min=0)] = 0,
    limit: Annotated[int, typer.Option(help="Take N films of each dataset's parts only; 0 takes all.", min=0)] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the folds and the state in --output.")] = False,
    name: Name = None,
    keep_views: Annotated[bool, typer.Option("--keep-views", help="Leave the views in --output when all folds are done.")] = False,
    fold_checkpoints: Annotated[
        bool, typer.Option("--fold-checkpoints", help="Write a checkpoint of each fold too, with the groups it has not seen.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Train the network that looks for findings on radiographs, and measure by cross-validation where it may answer."""
    need_extra()
    make_folder(output)
    from pmclip_deploy.train.findings.crossval import train_findings
    from pmclip_deploy.train.loop import Settings

    settings = Settings(epochs, learning_rate, batch_size, seed, threads, limit, resume)
    meta = train_findings(data, checkpoint, output, settings, folds, only or (), keep_views, fold_checkpoints, name)
    if meta["metrics"]:
        print_checkpoint(meta, output, as_json)
    elif as_json:
        print_json({"schema": SCHEMA, "checkpoint": None, **meta})
