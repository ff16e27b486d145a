"""`pmclip-deploy train`: clip, vqa and questions."""

import importlib.util
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pmclip_deploy.errors import UsageError

app = typer.Typer(no_args_is_help=True, help="Train the dual encoder and its VQA head (needs the extra `train`).")

Data = Annotated[list[Path], typer.Option("--data", help="A dataset's folder; repeat for more. The first one's questions train the head.")]
Output = Annotated[Path, typer.Option("--output", help="Folder for the checkpoint and the training state.")]
Epochs = Annotated[int, typer.Option(min=1)]
BatchSize = Annotated[int, typer.Option(min=2)]
Rate = Annotated[float, typer.Option("--learning-rate", min=0)]
Seed = Annotated[int, typer.Option()]
Threads = Annotated[int, typer.Option(help="CPU threads; 0 takes all cores.", min=0)]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the state in --output.")]
Limit = Annotated[int, typer.Option(help="Train on the first N images only; 0 takes all.", min=0)]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


@app.command()
def clip(
    data: Data,
    output: Output,
    epochs: Epochs = 8,
    batch_size: BatchSize = 48,
    learning_rate: Rate = 5e-4,
    seed: Seed = 1,
    threads: Threads = 0,
    limit: Limit = 0,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Fine-tune image and text towers on captions made from questions and answers."""
    _need_extra()
    from pmclip_deploy.train.clip import train_clip

    _report(
        train_clip(
            data,
            output,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=seed,
            threads=threads,
            resume=resume,
            limit=limit,
        ),
        output,
        as_json,
    )


@app.command()
def vqa(
    data: Data,
    output: Output,
    clip: Annotated[Path, typer.Option("--clip", help="Checkpoint made by `train clip`.")],
    epochs: Epochs = 12,
    batch_size: BatchSize = 48,
    learning_rate: Rate = 3e-4,
    seed: Seed = 1,
    threads: Threads = 0,
    limit: Limit = 0,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Train the VQA head and the image tower with it, then calibrate it on the validation questions."""
    _need_extra()
    from pmclip_deploy.train.vqa import train_vqa

    _report(
        train_vqa(
            data,
            clip,
            output,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=seed,
            threads=threads,
            resume=resume,
            limit=limit,
        ),
        output,
        as_json,
    )


@app.command()
def questions(
    data: Annotated[Path, typer.Option("--data", help="The dataset's folder.")],
    output: Annotated[Path, typer.Option("--output", help="The JSONL file to write.")],
    split: Annotated[str, typer.Option(help="train or val")] = "val",
) -> None:
    """Write the derived closed questions ("is there a fracture?") of a split, for `evaluate`."""
    _need_extra()
    from pmclip_deploy.train.kinds import organs_from_questions
    from pmclip_deploy.train.vqa import derived_as_questions, questions_for_training

    training, validation = questions_for_training([data])
    if split not in ("train", "val"):
        raise UsageError(f"split {split!r} is unknown; choose train or val")
    rows = derived_as_questions(training if split == "train" else validation, organs_from_questions(training))
    with output.open("w", encoding="utf-8") as file:
        for q, organ in rows:
            row = {"image": q.image.name, "question": q.question, "answer": q.answer, "category": q.category, "organ": organ}
            file.write(json.dumps(row) + "\n")
    typer.echo(f"{len(rows)} questions in {output}", err=True)


def _need_extra() -> None:
    if missing := [name for name in ("torch", "open_clip", "timm", "safetensors") if importlib.util.find_spec(name) is None]:
        raise UsageError(f"training needs {missing[0]}, which is not installed; pip install 'pmclip-deploy[train]'")


def _report(meta: dict[str, Any], output: Path, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"checkpoint": str(output), "metrics": meta["metrics"], "provenance": meta["provenance"]}))
    else:
        typer.echo(f"checkpoint in {output}")
        typer.echo(json.dumps(meta["metrics"], indent=1))
