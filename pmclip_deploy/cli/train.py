"""`pmclip-deploy train`: clip, vqa, autoencoder, maml, questions, finding, findings and report."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pmclip_deploy.atomic import write, write_errors
from pmclip_deploy.bundle.names import HEADS
from pmclip_deploy.cli.options import LARGEST_SEED, Json, check_choice, finite
from pmclip_deploy.cli.report import report
from pmclip_deploy.cli.train_finding import finding
from pmclip_deploy.cli.train_findings import findings
from pmclip_deploy.cli.train_options import (
    EPOCHS,
    RATE,
    SCHEMA,
    BatchSize,
    Data,
    Device,
    Epochs,
    Limit,
    Name,
    Output,
    Precision,
    PrecisionOfHead,
    PrecisionOfTowers,
    Rate,
    Resume,
    Seed,
    Threads,
    make_folder,
    make_folder_of,
    need_extra_train,
    print_checkpoint,
)
from pmclip_deploy.console import counted, one_line
from pmclip_deploy.errors import UsageError

app = typer.Typer(
    no_args_is_help=True,
    help="Train encoders, heads and findings, or teach a bundle a finding. Most of these commands need the extra `train`.",
)

Source = Annotated[
    Path | None,
    typer.Option("--from", help="Checkpoint of `import`, to fine-tune on captions. Default: train pmclip-lite on questions and answers."),
]
RecipeName = Annotated[str | None, typer.Option(help="With --from: recipe paper (PubMedCLIP's, the default) or modern.")]
EpochsOfRecipe = Annotated[int | None, typer.Option(min=1, help=f"{EPOCHS} Default: 8, or the recipe's with --from.")]
BatchOfAll = Annotated[
    int | None, typer.Option(min=2, help="Rows in a batch, of all processes together. Default: 48, or the recipe's with --from.")
]
RateOfRecipe = Annotated[float | None, typer.Option(min=0, callback=finite, help=f"{RATE} Default: 5e-4, or the recipe's with --from.")]
MicroBatch = Annotated[
    int | None, typer.Option(min=0, help="With --from: encode N pairs at a time, which saves memory. 0 encodes the whole batch at once.")
]
LockImage = Annotated[bool, typer.Option("--lock-image", help="With --from: do not train the image tower.")]
LockText = Annotated[bool, typer.Option("--lock-text", help="With --from: do not train the text tower.")]
Licences = Annotated[
    list[str] | None,
    typer.Option(help='With --from: use only the rows of ROCO and ROCOv2 with this licence, such as "CC BY". Repeat for more.'),
]
SkipShare = Annotated[
    float | None, typer.Option(min=0, max=1, callback=finite, help="With --from: largest share of unreadable images. Default: 0.01.")
]


@app.command()
def clip(
    data: Data,
    output: Output,
    name: Name = None,
    source: Source = None,
    recipe: RecipeName = None,
    epochs: EpochsOfRecipe = None,
    batch_size: BatchOfAll = None,
    learning_rate: RateOfRecipe = None,
    micro_batch: MicroBatch = None,
    lock_image: LockImage = False,
    lock_text: LockText = False,
    licence: Licences = None,
    skip_share: SkipShare = None,
    seed: Seed = 1,
    threads: Threads = 0,
    device: Device = "auto",
    precision: PrecisionOfTowers = None,
    limit: Limit = 0,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Train an image and a text tower: fine-tune a CLIP on captions (--from), or train pmclip-lite on questions and answers."""
    given = _given(recipe=recipe, micro_batch=micro_batch, lock_image=lock_image or None, lock_text=lock_text or None,
                   licence=licence or None, skip_share=skip_share)  # fmt: skip
    if given and source is None:
        raise UsageError(f"--{next(iter(given)).replace('_', '-')} needs --from", "give --from CHECKPOINT, or leave this option out")
    need_extra_train()
    make_folder(output)
    from pmclip_deploy.train.loop import Settings

    run = _given(epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, seed=seed, threads=threads, limit=limit,
                 resume=resume, device=device, precision=precision)  # fmt: skip
    if source is None:
        from pmclip_deploy.train.clip.questions import train_clip

        meta = train_clip(data, output, Settings(**{"epochs": 8, "learning_rate": 5e-4, **run}), name=name)
    else:
        from pmclip_deploy.train.clip.pairs import train_clip_on_pairs
        from pmclip_deploy.train.clip.recipes import recipe_named
        from pmclip_deploy.train.datasets.schema import BROKEN_SHARE

        licences, share = given.pop("licence", ()), given.pop("skip_share", BROKEN_SHARE)
        of = recipe_named(given.pop("recipe", "paper"), **given, **run)
        meta = train_clip_on_pairs(data, source, output, of, licences, share, name)
    print_checkpoint(meta, output, as_json)


Clip = Annotated[Path, typer.Option("--clip", help="Checkpoint of `train clip` or `import`.")]
HeadName = Annotated[str, typer.Option(help=f"{', '.join(HEADS)}. mevf and qcr train the image tower only with --fine-tune.")]
Split = Annotated[str | None, typer.Option(help="mevf, qcr: split official (the default) or image-disjoint.", show_default=False)]
SplitSeed = Annotated[
    int | None, typer.Option(min=0, max=LARGEST_SEED, help="mevf, qcr: seed of the image-disjoint split. Default: 1.", show_default=False)
]
Features = Annotated[
    str | None,
    typer.Option(
        help="mevf, qcr: image features, several of clip, ae and maml, or none. Default: clip, and ae with --autoencoder.",
        show_default=False,
    ),
]
Glove = Annotated[Path | None, typer.Option(help="mevf, qcr: text file of GloVe's word vectors. Required.", show_default=False)]
AutoEncoderFile = Annotated[
    Path | None, typer.Option(help="mevf, qcr: weights of MEVF's auto-encoder, or of `train autoencoder`.", show_default=False)
]
MamlFile = Annotated[Path | None, typer.Option(help="mevf, qcr: weights of MEVF's MAML network, or of `train maml`.", show_default=False)]
FreezeAutoencoder = Annotated[
    bool, typer.Option("--freeze-autoencoder", help="mevf, qcr: do not train the auto-encoder. Training is faster.")
]
Attention = Annotated[str | None, typer.Option(help="mevf: attention ban (the default) or san.", show_default=False)]
Recurrent = Annotated[
    str | None,
    typer.Option(help="mevf, qcr: network that reads the question, lstm or gru. Default: mevf lstm, qcr gru.", show_default=False),
]
FineTune = Annotated[bool, typer.Option("--fine-tune", help="mevf, qcr: train the image tower with the head.")]
RateOfTower = Annotated[
    float | None,
    typer.Option(
        "--tower-learning-rate", min=0, help="With --fine-tune: the tower's learning rate. Default: --learning-rate.", show_default=False
    ),
]
Depth = Annotated[
    int | None, typer.Option(min=1, help="mevf, qcr: number of glimpses or stacks. Default: mevf 2, qcr 10.", show_default=False)
]
Hidden = Annotated[int | None, typer.Option(min=1, help="mevf, qcr: width of the hidden states. Default: 1024.", show_default=False)]
TypeEpochs = Annotated[
    int | None,
    typer.Option(min=1, help="qcr: number of epochs of the question classifier, which is trained first. Default: 200.", show_default=False),
]
EpochsOfHead = Annotated[int | None, typer.Option(min=1, help=f"{EPOCHS} Default: lite 16, mevf 20, qcr 200.", show_default=False)]
RoundedEpochs = Annotated[
    int | None, typer.Option(help="lite: number of last epochs that round like the INT8 graph. Default: 4.", min=0, show_default=False)
]
Films = Annotated[
    list[Path] | None,
    typer.Option("--films", help="lite: folder of FracAtlas or Kermany, whose films train the radiograph test. Repeat for more."),
]
Photographs = Annotated[Path | None, typer.Option(help="lite: folder of photographs. The model learns to refuse them.", show_default=False)]
BatchOfHead = Annotated[
    int | None,
    typer.Option(min=2, help="Rows in a batch, of all processes together. Default: lite 48, mevf 32, qcr 16.", show_default=False),
]
RateOfHead = Annotated[
    float | None,
    typer.Option("--learning-rate", min=0, callback=finite, help=f"{RATE} Default: lite 3e-4, mevf 2e-3, qcr 1e-3.", show_default=False),
]


@app.command()
def vqa(
    data: Data,
    output: Output,
    clip: Clip,
    name: Name = None,
    head: HeadName = "lite",
    split: Split = None,
    split_seed: SplitSeed = None,
    features: Features = None,
    glove: Glove = None,
    autoencoder: AutoEncoderFile = None,
    maml: MamlFile = None,
    freeze_autoencoder: FreezeAutoencoder = False,
    attention: Attention = None,
    recurrent: Recurrent = None,
    fine_tune: FineTune = False,
    tower_learning_rate: RateOfTower = None,
    depth: Depth = None,
    hidden: Hidden = None,
    type_epochs: TypeEpochs = None,
    epochs: EpochsOfHead = None,
    rounded_epochs: RoundedEpochs = None,
    films: Films = None,
    photographs: Photographs = None,
    batch_size: BatchOfHead = None,
    learning_rate: RateOfHead = None,
    seed: Seed = 1,
    threads: Threads = 0,
    device: Device = "auto",
    precision: PrecisionOfHead = None,
    limit: Limit = 0,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Train a VQA head on questions: that of pmclip-lite together with its image tower, or that of MEVF or QCR on any tower."""
    of_heads = _given(split=split, split_seed=split_seed, features=features, glove=glove, autoencoder=autoencoder, maml=maml,
                      freeze_autoencoder=freeze_autoencoder or None, attention=attention, depth=depth, hidden=hidden,
                      type_epochs=type_epochs, recurrent=recurrent, fine_tune=fine_tune or None,
                      tower_learning_rate=tower_learning_rate)  # fmt: skip
    of_lite = _given(rounded_epochs=rounded_epochs, films=films or None, photographs=photographs)
    _check_head(head, of_heads if head == "lite" else of_lite, glove, data)
    need_extra_train()
    make_folder(output)
    run = _given(epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, seed=seed, threads=threads, limit=limit,
                 resume=resume, device=device, precision=precision)  # fmt: skip
    if head == "lite":
        from pmclip_deploy.train.lite.train import train_vqa
        from pmclip_deploy.train.loop import Settings

        settings, rounded = Settings(**{"epochs": 16, "learning_rate": 3e-4, **run}), 4 if rounded_epochs is None else rounded_epochs
        meta = train_vqa(data, clip, output, settings, rounded, films or (), photographs, name)
    else:
        from pmclip_deploy.train.heads.plan import Plan, settings_of_head
        from pmclip_deploy.train.heads.training import train_head

        of = of_heads.pop("features", "clip,ae" if autoencoder else "clip")
        wanted = () if of == "none" else tuple(feature.strip() for feature in of.split(","))
        meta = train_head(data[0], clip, output, Plan(head, features=wanted, **of_heads), settings_of_head(head, **run), name)
    print_checkpoint(meta, output, as_json)


def _check_head(head: str, foreign: dict[str, Any], glove: Path | None, data: list[Path]) -> None:
    """``foreign`` are the options of other heads."""
    check_choice("head", head, HEADS)
    if foreign:
        raise UsageError(f"--{next(iter(foreign)).replace('_', '-')} is not for --head {head}", "leave it out")
    if head != "lite" and glove is None:
        raise UsageError(f"--head {head} needs --glove", "give the text file of GloVe's word vectors")
    if head != "lite" and len(data) > 1:
        raise UsageError(f"--head {head} takes one --data alone", "give one dataset")


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


@app.command()
def autoencoder(
    data: Annotated[list[Path], typer.Option("--data", help="Folder of images. Repeat for more.")],
    output: Annotated[Path, typer.Option("--output", help="Safetensors file to write. A folder beside it holds the training state.")],
    epochs: Epochs = 20,
    batch_size: BatchSize = 32,
    learning_rate: Rate = 1e-3,
    seed: Seed = 1,
    threads: Threads = 0,
    device: Device = "auto",
    precision: Precision = None,
    limit: Limit = 0,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Train MEVF's denoising auto-encoder on images. `train vqa --autoencoder` starts from its weights."""
    need_extra_train()
    make_folder_of(output)
    from pmclip_deploy.train.autoencoder import train_autoencoder
    from pmclip_deploy.train.loop import Settings

    settings = Settings(epochs, learning_rate, batch_size, seed, threads, limit, resume, device, precision)
    print_checkpoint(train_autoencoder(data, output, settings), output, as_json)


@app.command()
def maml(
    data: Annotated[Path, typer.Option("--data", help="Folder with one folder of images per class, or a JSONL file with image and label.")],
    output: Annotated[Path, typer.Option("--output", help="Safetensors file to write. A folder beside it holds the training state.")],
    epochs: Epochs = 20,
    tasks: Annotated[int, typer.Option(help="Number of tasks drawn per epoch.", min=1)] = 500,
    batch_size: Annotated[int, typer.Option(help="Tasks in a batch.", min=1)] = 5,
    learning_rate: Rate = 1e-3,
    seed: Seed = 1,
    threads: Threads = 0,
    device: Device = "auto",
    precision: Precision = None,
    limit: Annotated[int, typer.Option(help="Train on the first N images of each class only. 0 uses all.", min=0)] = 0,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Train MEVF's MAML network on classes of images. `train vqa --maml` starts from its weights."""
    need_extra_train()
    make_folder_of(output)
    from pmclip_deploy.train.loop import Settings
    from pmclip_deploy.train.maml import train_maml

    settings = Settings(epochs, learning_rate, batch_size, seed, threads, limit, resume, device, precision)
    print_checkpoint(train_maml(data, output, settings, tasks), output, as_json)


@app.command()
def questions(
    data: Annotated[Path, typer.Option("--data", help="Folder of the dataset.")],
    output: Annotated[Path, typer.Option("--output", help="JSONL file to write.")],
    split: Annotated[str, typer.Option(help="train or val.")] = "val",
    as_json: Json = False,
) -> None:
    """Write closed questions such as "is there a fracture?", derived from the answers of a split, for `evaluate`."""
    need_extra_train()
    from pmclip_deploy.train.kinds import organs_from_questions
    from pmclip_deploy.train.lite.validation import derived_as_questions
    from pmclip_deploy.train.questions import questions_for_training

    training, validation = questions_for_training([data])
    check_choice("split", split, ("train", "val"))
    rows = derived_as_questions(training if split == "train" else validation, organs_from_questions(training))
    lines = [
        json.dumps({"image": q.image.name, "question": q.question, "answer": q.answer, "category": q.category, "organ": organ})
        for q, organ in rows
    ]
    with write_errors(f"{output}:", "give another --output"):
        write(output, "\n".join(lines) + "\n")
    done = {"schema": SCHEMA, "questions": len(rows), "output": str(output)}
    typer.echo(json.dumps(done) if as_json else one_line(f"{counted(len(rows), 'question')} in {output}"))


app.command()(finding)
app.command()(findings)
app.command()(report)
