"""`pmclip-deploy train findings`: trains a second network that looks for findings on radiographs, with grouped cross-validation."""

from pathlib import Path
from typing import Annotated

import typer

from pmclip_deploy.cli.options import Json
from pmclip_deploy.cli.output import print_json
from pmclip_deploy.cli.train_options import (
    SCHEMA,
    BatchSize,
    Epochs,
    Name,
    Rate,
    Seed,
    Threads,
    make_folder,
    need_extra_train,
    print_checkpoint,
)


def findings(
    data: Annotated[list[Path], typer.Option("--data", help="Folder of FracAtlas, Kermany or VQA-Med. Repeat for more.")],
    checkpoint: Annotated[Path, typer.Option("--checkpoint", help="Checkpoint of `train vqa`. Training starts from its image tower.")],
    output: Annotated[
        Path, typer.Option("--output", help="Folder to write the checkpoint and the folds to, and 4 GB of views during training.")
    ],
    folds: Annotated[int, typer.Option(min=3, max=20, help="Number of folds of the cross-validation.")] = 5,
    only: Annotated[
        list[str] | None, typer.Option(help='Train only this fold: "0" to "4", or "all" for the final network. Repeat for more.')
    ] = None,
    epochs: Epochs = 7,
    batch_size: BatchSize = 32,
    learning_rate: Rate = 1e-3,
    seed: Seed = 1,
    threads: Threads = 0,
    limit: Annotated[int, typer.Option(help="Use only N films of each part of a dataset. 0 uses all.", min=0)] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the folds and the state in --output.")] = False,
    name: Name = None,
    keep_views: Annotated[bool, typer.Option("--keep-views", help="Keep the views in --output after the last fold.")] = False,
    fold_checkpoints: Annotated[
        bool,
        typer.Option(
            "--fold-checkpoints", help="Also write a checkpoint of each fold, with the groups that were left out of its training."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Train the network that looks for findings on radiographs, and measure by cross-validation on which films it may answer."""
    need_extra_train()
    make_folder(output)
    from pmclip_deploy.train.findings.crossval import train_findings
    from pmclip_deploy.train.loop import Settings

    settings = Settings(epochs, learning_rate, batch_size, seed, threads, limit, resume)
    meta = train_findings(data, checkpoint, output, settings, folds, only or (), keep_views, fold_checkpoints, name)
    if meta["metrics"]:
        print_checkpoint(meta, output, as_json)
    elif as_json:
        print_json({"schema": SCHEMA, "checkpoint": None, **meta})
