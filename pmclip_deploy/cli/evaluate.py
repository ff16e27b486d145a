"""`pmclip-deploy evaluate`: measures a bundle or a trained checkpoint on images, questions and answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pmclip_deploy.cli.options import DEVICES, LARGEST_SEED, Bundle, Json
from pmclip_deploy.cli.output import print_json, print_notes
from pmclip_deploy.console import LONG, counted, decimal, one_line, progress, stages
from pmclip_deploy.errors import InputError, UsageError
from pmclip_deploy.extras import need_extra

if TYPE_CHECKING:
    from pmclip_deploy.evaluation.counting import Count
    from pmclip_deploy.evaluation.evaluate import Answerer
    from pmclip_deploy.evaluation.rows import Row

OURS = "the best candidate, abstained or not, equals the answer; case, blanks and a closing full stop are ignored"
OURS_OF_DATASETS = "the best candidate, abstained or not, equals the answer after the VQA challenge's normalisation"

Data = Annotated[Path, typer.Option(help="JSON lines {image, question, answer, category}, or the folder of a dataset.")]
Images = Annotated[Path | None, typer.Option(help="Folder of the images that the JSON lines name.", show_default=False)]
Split = Annotated[
    str | None, typer.Option(help="Split of a dataset: test (the default), val, train or image-disjoint.", show_default=False)
]
SplitSeed = Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the image-disjoint split.")]
Train = Annotated[
    Path | None,
    typer.Option(help="JSON lines for the question-only baseline. Default: train.jsonl beside --data. A dataset has its own."),
]
Checkpoints = Annotated[
    list[Path] | None,
    typer.Option(help="Checkpoint of `train vqa --head mevf|qcr`, instead of a bundle. Repeat for more seeds.", show_default=False),
]
Against = Annotated[Path | None, typer.Option(help="Another bundle or checkpoint. The two are compared row by row.", show_default=False)]
Device = Annotated[str, typer.Option(help=f"Where the model runs: {DEVICES}. A checkpoint takes auto, cpu or cuda.")]
Seed = Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the resampling and of the shuffled images.")]


def evaluate(
    data: Data,
    images: Images = None,
    split: Split = None,
    split_seed: SplitSeed = 1,
    train: Train = None,
    bundle: Bundle = None,
    checkpoint: Checkpoints = None,
    against: Against = None,
    device: Device = "auto",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Measure accuracy, coverage and calibration with 95% intervals, and the same of baselines.

    Accuracy is the exact match of the best candidate. The output also has the counts that other projects use: VQA-Med 2019's with BLEU,
    and MEVF's and QCR's on VQA-RAD and SLAKE. docs/reference/counting.md defines each count.
    """
    if bundle is not None and checkpoint:
        raise UsageError("--bundle and --checkpoint exclude each other", "give one of them, and the other as --against")
    import numpy as np

    from pmclip_deploy.evaluation.evaluate import figures
    from pmclip_deploy.evaluation.statistics import difference, seeds

    of = _read_folder(data, images, split, split_seed, train) if data.is_dir() else _read_lines(data, images, split, train)
    models = [(path, True) for path in checkpoint] if checkpoint else [(bundle, False)]
    asked = [_asked(path, is_checkpoint, of.rows, of.images, device) for path, is_checkpoint in models]
    measured = [figures(of.rows, ask, model, of.known, seed, of.same, of.counts) for ask, model in asked]
    document, right = measured[0]
    document |= {
        "definition": of.definition,
        "training_rows": {"source": of.learned_from, "n": len(of.known)} if of.known else None,
    }
    if len(measured) > 1:
        document["seeds"] = seeds([each for each, _ in measured])
        right = np.mean([of_one for _, of_one in measured], axis=0)
    if against is not None:
        ask, model = _asked(against, (against / "checkpoint.json").is_file(), of.rows, of.images, device)
        document["difference"] = difference(of.rows, right, figures(of.rows, ask, model, of.known, seed, of.same)[1], model, seed)
    if as_json:
        print_json(document)
    else:
        _print_figures(document)


@dataclass(frozen=True)
class _Questions:
    """What is asked, and how its answers are counted."""

    rows: "Sequence[Row]"
    images: Path
    known: "Sequence[Row] | None"  # that may have trained
    learned_from: str
    same: Callable[[str], str]  # an answer as it is compared
    counts: "tuple[Count, ...]"  # of other projects
    definition: str  # of accuracy


def _read_folder(data: Path, images: Path | None, split: str | None, split_seed: int, train: Path | None) -> _Questions:
    if images is not None or train is not None:
        raise UsageError("the folder of a dataset has its own images and training rows", "leave out --images and --train")
    from pmclip_deploy.train.vocabulary import comparable

    rows, known = _rows_of_folder(data, split or "test", split_seed)
    counts = _counts_of_folder(data, rows)
    return _Questions(rows, data, known, f"the training part of {data}", comparable, counts, OURS_OF_DATASETS)


def _read_lines(data: Path, images: Path | None, split: str | None, train: Path | None) -> _Questions:
    from pmclip_deploy.evaluation.counting import VQA_MED_2019
    from pmclip_deploy.evaluation.rows import normalised, rows_from_jsonl

    if not data.exists():
        raise InputError(f"{data}: not found", "check --data")
    if split is not None:
        raise UsageError(f"{data}: JSON lines have no splits", "leave out --split")
    if images is None:
        raise UsageError(f"{data}: JSON lines need --images", "give the folder of their images")
    rows = rows_from_jsonl(data, images)
    beside = data.with_name("train.jsonl")
    if train is None and beside.is_file() and not beside.samefile(data):
        train = beside
    known = rows_from_jsonl(train) if train else None
    return _Questions(rows, images, known, str(train), normalised, (VQA_MED_2019,), OURS)


def _rows_of_folder(folder: Path, split: str, seed: int) -> "tuple[list[Row], list[Row] | None]":
    """(the rows of the split, those that may have trained)"""
    from pmclip_deploy.train.datasets import is_there
    from pmclip_deploy.train.splits import questions_of_split, rows_from_questions

    known, asked = questions_of_split(folder, split, seed)
    images = {q.image for q in asked}
    if missing := sorted(image for image in images if not is_there(image)):
        raise InputError(
            f"{missing[0]}: not found; missing images: {len(missing)} of {len(images)}", "get them from the source of the dataset"
        )
    return rows_from_questions(asked), rows_from_questions(known) if known and split != "train" else None


def _counts_of_folder(folder: Path, rows: "Sequence[Row]") -> "tuple[Count, ...]":
    from pmclip_deploy.evaluation import counting as C
    from pmclip_deploy.train.datasets import layout_of_questions

    if layout_of_questions(folder).name.startswith("VQA-Med 2019"):
        return (C.VQA_MED_2019,)
    return (C.MEVF, C.MEVF_ALL, C.QCR) if any(row.phrase for row in rows) else (C.MEVF, C.QCR)


def _asked(path: Path | None, is_checkpoint: bool, rows: "Sequence[Row]", images: Path, device: str) -> "tuple[Answerer, dict[str, Any]]":
    if is_checkpoint and path is not None:
        need_extra("train", "a checkpoint", "torch", "open_clip", "safetensors")
        from pmclip_deploy.train.heads.answering import checkpoint_answerer

        of_checkpoint: tuple[Answerer, dict[str, Any]] = checkpoint_answerer(path, rows, images, device)
        return of_checkpoint
    from pmclip_deploy.evaluation.evaluate import about_bundle, bundle_answerer
    from pmclip_deploy.opening import load

    predictor = load(path, device, items=len({row.image for row in rows}))
    print_notes(predictor)
    return bundle_answerer(predictor, rows, images, stages if len(rows) >= LONG else progress), about_bundle(predictor)


def _print_figures(document: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if document["by"]["type"]:
        _print_types(console, document)
    table = Table("", "n", "accuracy", "95% interval", "coverage")
    table.add_row("all", str(document["n"]), *_cells(document), f"{document['coverage']:.3f}")
    for what in ("category", "kind"):
        for name, group in document["by"][what].items():
            table.add_row(Text(one_line(f"{what} {name}")), str(group["n"]), *_cells(group), f"{group['coverage']:.3f}")
    for name, baseline in document["baselines"].items():
        table.add_row(f"baseline {name.replace('_', ' ')}", "", *_cells(baseline), "")
    console.print(table)
    _print_counts(console, document)
    answered = document["selective_accuracy"]
    console.print(f"accuracy of the answered questions: {'not measured' if answered is None else f'{answered:.3f}'}")
    console.print(f"expected calibration error: {'not measured' if document['ece'] is None else format(document['ece'], '.3f')}")
    for name, figure in document["binary"].items():
        interval = " ({:.3f} to {:.3f})".format(*figure["ci95"]) if figure["ci95"] else ""
        said = f"AUROC of {name}: {figure['auroc']:.3f}{interval}, {figure['positives']} of {figure['n']} positive"
        console.print(Text(one_line(said)))
    for reason, count in document["abstentions"].items():
        console.print(Text(one_line(f"not answered ({counted(count, 'question')}): {reason}")))
    for line in _training_lines(document):
        console.print(Text(one_line(line)))


def _print_counts(console: Any, document: dict[str, Any]) -> None:
    """Accuracy by our own count and by those of other projects, and the definition of each."""
    from rich.table import Table
    from rich.text import Text

    counts = {"our own": document, **document["counts"]}
    table = Table("counted", "n", "accuracy", "95% interval", "BLEU", "95% interval")
    for name, count in counts.items():
        table.add_row(name, str(count["n"]), *_cells(count), *_bleu_cells(count))
        if count is not document:  # whose own stand above
            for what, baseline in count["baselines"].items():
                table.add_row(f"  {what.replace('_', ' ')}", "", *_cells(baseline), *_bleu_cells(baseline))
    console.print(table)
    for name, count in counts.items():
        console.print(f"{name}: {count['definition']}")
    learned = document["training_rows"]
    if learned is not None:
        console.print(
            Text(one_line(f"question only: the most frequent answer among {counted(learned['n'], 'question')} of {learned['source']}"))
        )


def _training_lines(document: dict[str, Any]) -> list[str]:
    """Which of the data each model was trained on, if the model names it. Models with the same tower share a line."""
    models = [each["model"] for each in document["seeds"]["each"]] if "seeds" in document else [document["model"]]
    models += [document["difference"]["against"]] if "difference" in document else []
    lines, towers = [], dict[tuple[str, ...], list[str]]()
    for model in models:
        name = str(model.get("checkpoint", model.get("bundle")))
        if "images_trained_on" in model:
            lines.append(f"{name}: the head was trained on {model['images_trained_on']} of these {document['images']} images")
        towers.setdefault(tuple(model["tower_trained_on"]), []).append(name)
    return lines + [
        f"{', '.join(names)}: the image tower was trained on {', '.join(data)} (the training split, or everything if there is no "
        "validation split); figures on those images are not figures on unseen images"
        for data, names in towers.items()
        if data
    ]


def _print_types(console: Any, document: dict[str, Any]) -> None:
    """The table of the papers: open, closed and overall in columns."""
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    groups = {**document["by"]["type"], "overall": document}
    table = Table("accuracy (95%)", *(f"{name}, {group['n']}" for name, group in groups.items()), box=SIMPLE)
    several, compared = document.get("seeds"), document.get("difference")

    def row(name: str, figures: Sequence[dict[str, Any] | None]) -> None:
        cells = ["{:.3f} ({:.2f}-{:.2f})".format(f["accuracy"], *f["ci95"]) if f else "not measured" for f in figures]
        table.add_row(name, *cells)

    row(f"first of {several['n']} seeds" if several else "the model", list(groups.values()))
    for name in document["baselines"]:
        row(name.replace("_", " "), [group["baselines"][name] for group in groups.values()])
    if several:
        spreads = {**several["by"]["type"], "overall": several}
        table.add_row("mean, deviation", *(f"{spreads[k]['mean']:.3f}, {spreads[k]['std']:.3f}" for k in groups))
    if compared:
        sides = {**compared["by"]["type"], "overall": compared}
        named = one_line(str(compared["against"].get("checkpoint", compared["against"].get("bundle"))))
        table.add_row("against", *(f"{sides[k]['accuracy']:.3f}" for k in groups))
        table.add_row("difference", *(decimal(sides[k]["difference"], "+.3f") for k in groups))
        table.add_row("95% interval", *("{:+.3f} to {:+.3f}".format(*sides[k]["ci95"]) for k in groups))
        if compared["mcnemar"]:
            table.add_row("McNemar's p", *(f"{sides[k]['mcnemar']['p']:.3g}" for k in groups))
    console.print(table)
    if compared:
        console.print(Text(f"against: {named}"))


def _cells(figure: dict[str, Any] | None) -> tuple[str, str]:
    if figure is None or figure["accuracy"] is None:
        return "not measured", ""
    return f"{figure['accuracy']:.3f}", "{:.3f} to {:.3f}".format(*figure["ci95"])


def _bleu_cells(figure: dict[str, Any] | None) -> tuple[str, str]:
    return _cells({"accuracy": figure["bleu"], "ci95": figure["bleu_ci95"]}) if figure and "bleu" in figure else ("", "")
