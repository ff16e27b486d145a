"""The paper's table on SLAKE: MEVF and QCR over several image towers, trained and tested on the official English split.

    python -m pmclip_deploy.benchmarks.slake_heads --data slake --glove glove.6B.300d.txt --autoencoder pretrained_ae.pth \\
        --output runs/slake [--reduced]

Every head is trained as `pmclip-deploy train vqa` trains it and measured as `evaluate` measures it. The towers:

- none: the head sees the question alone;
- random: pmclip-lite's layers, untrained;
- imagenet: the same with EfficientNet-Lite0's ImageNet weights under an untrained projection;
- pmclip-lite: the checkpoint in the repository, which has learned nothing of SLAKE;
- pmclip-lite, fine-tuned: the same, trained with the head.

The full size is for a GPU. --reduced trains small heads on 100 images, in 16 minutes of processor time: its rows say nothing about the
paper's. --head and --tower measure some rows. A row that stands in --output is not trained again.
The paper's row is Eslami et al. 2023, QCR with PubMedCLIP's ViT-B/32. It is theirs, not measured here, and by their own count.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pmclip_deploy.atomic import write
from pmclip_deploy.benchmarks.peers import LITE
from pmclip_deploy.errors import PmclipError
from pmclip_deploy.evaluation.counting import QCR
from pmclip_deploy.evaluation.evaluate import figures
from pmclip_deploy.models import DEFAULT_CHECKPOINT
from pmclip_deploy.train.backbones import BACKBONES
from pmclip_deploy.train.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from pmclip_deploy.train.heads.answering import checkpoint_answerer
from pmclip_deploy.train.heads.mevf import HIDDEN
from pmclip_deploy.train.heads.plan import Plan, settings_of_head
from pmclip_deploy.train.heads.training import train_head
from pmclip_deploy.train.splits import questions_of_split, rows_from_questions
from pmclip_deploy.train.vocabulary import comparable

PAPER = {"head": "qcr", "tower": "PubMedCLIP ViT-B/32 (the paper's)", "open": 0.784, "closed": 0.825, "overall": 0.801}
HEADS = ("mevf", "qcr")
NONE, RANDOM, IMAGENET, TUNED = "none", "random", "imagenet", f"{LITE}, fine-tuned"
TOWERS = (NONE, RANDOM, IMAGENET, LITE, TUNED)
BASELINES = ("majority", "question_only")  # whose answers no model changes


@dataclass(frozen=True)
class Size:
    """What a row costs. Where it is None, it is the head's own in PubMedCLIP's code."""

    name: str
    hidden: int = HIDDEN
    depth: int | None = None
    epochs: int | None = None
    tuned_epochs: int | None = None  # of a head that is trained with its tower
    type_epochs: int = 200
    batch_size: int | None = None
    images: int = 0  # trained on; 0 takes all
    freeze_autoencoder: bool = False
    precision: str | None = None  # of rows whose tower is trained


FULL = Size("full")
REDUCED = Size(
    "reduced", hidden=256, depth=2, epochs=8, tuned_epochs=2, type_epochs=5, batch_size=8, images=100, freeze_autoencoder=True,
    precision="bf16",
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """What the rows of a table share."""

    data: Path
    glove: Path
    autoencoder: Path | None
    output: Path
    size: Size = FULL
    seed: int = 1
    threads: int = 0
    device: str = "auto"

    def rows(self, heads: Sequence[str] = HEADS, towers: Sequence[str] = TOWERS) -> Iterator[dict[str, Any]]:
        """A row for each head and tower, as soon as it is measured. Raises InputError, BundleError, DeviceError and UsageError."""
        for head in heads:
            for tower in towers:
                yield self.row(head, tower)

    def row(self, head: str, tower: str) -> dict[str, Any]:
        folder = self.output / f"{self.size.name}-{self.seed}" / f"{head}-{tower.replace(', ', '-')}"
        if not (folder / "row.json").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write(folder / "row.json", json.dumps(self.measured(self.trained(head, tower, folder), head, tower), indent=1) + "\n")
        row: dict[str, Any] = json.loads((folder / "row.json").read_text(encoding="utf-8"))
        return row

    def trained(self, head: str, tower: str, folder: Path) -> Path:
        size, tuned = self.size, tower == TUNED
        seen = () if tower == NONE else ("clip", "ae") if self.autoencoder else ("clip",)
        plan = Plan(
            head, self.glove, seen, self.autoencoder if "ae" in seen else None, freeze_autoencoder=size.freeze_autoencoder and "ae" in seen,
            depth=size.depth, hidden=size.hidden, type_epochs=size.type_epochs, fine_tune=tuned,
        )  # fmt: skip
        chosen = {"epochs": size.tuned_epochs if tuned else size.epochs, "batch_size": size.batch_size, "limit": size.images or None}
        run = {"seed": self.seed, "threads": self.threads, "device": self.device, "resume": True}
        settings = settings_of_head(
            head, **run, precision=size.precision if tuned else None, **{name: value for name, value in chosen.items() if value is not None}
        )
        train_head(self.data, self.tower(tower), folder, plan, settings)
        for state in (folder / "state.pt", folder / "type" / "state.pt"):
            state.unlink(missing_ok=True)  # a gigabyte at full size
        return folder

    def tower(self, name: str) -> Path:
        """A checkpoint of the tower."""
        if name not in (RANDOM, IMAGENET):
            return DEFAULT_CHECKPOINT
        folder, spec = self.output / f"tower-{name}-{self.seed}", BACKBONES[LITE]
        if not (folder / "checkpoint.json").is_file():
            torch.manual_seed(self.seed)
            folder.mkdir(parents=True, exist_ok=True)
            model = spec.build()
            projection = {k: v.clone() for k, v in model.state_dict().items()}
            tokenizer = spec.load_pretrained(model)
            if name == RANDOM:
                model.load_state_dict(projection)
            meta: Checkpoint = {"name": name, "version": "0", "backbone": LITE, "logit_scale": 1.0, "metrics": {}, "provenance": {}}
            write_checkpoint(folder, model, meta, tokenizer)
        return folder

    def measured(self, checkpoint: Path, head: str, tower: str) -> dict[str, Any]:
        """On the official English test questions, with the baselines' figures."""
        known, asked = (rows_from_questions(of) for of in questions_of_split(self.data, "test", 0))
        ask, model = checkpoint_answerer(checkpoint, asked, self.data, self.device)
        document = figures(asked, ask, model, known, 0, comparable, (QCR,))[0]
        groups = {**document["by"]["type"], "overall": document}
        made = read_checkpoint(checkpoint)[0]["provenance"]["head"]

        def cells(of: dict[str, Any]) -> dict[str, Any]:
            return {key: of[key] for key in ("n", "accuracy", "ci95", "gain", "gain_ci95") if key in of}

        return {
            "head": head,
            "tower": tower,
            "size": asdict(self.size),
            "run": {key: made[key] for key in ("epochs", "batch_size", "images", "questions", "seconds", "device", "threads")},
            **{name: cells(group) for name, group in groups.items()},
            "baselines": {name: {k: cells(group["baselines"][name]) for k, group in groups.items()} for name in document["baselines"]},
            "as_qcr_counts": document["counts"]["qcr"],
        }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table, with the paper's row and the baselines."""
    groups = ("open", "closed", "overall")

    def cell(of: dict[str, Any]) -> str:
        return "{:.3f} ({:.3f}-{:.3f})".format(of["accuracy"], *of["ci95"])

    def line(*cells: object) -> str:
        return f"| {' | '.join(map(str, cells))} |"

    lines = [
        line("Head", "Tower", *(f"{name.title()}, {rows[0][name]['n']}" for name in groups), "Shown another image", "Epochs", "Minutes"),
        "|" + "---|" * 8,
        line("QCR", PAPER["tower"], *(f"{PAPER[name]:.3f}" for name in groups), "", 200, ""),
    ]
    for name in BASELINES:
        of = rows[0]["baselines"][name]
        lines.append(line(f"baseline: {name.replace('_', ' ')}", "", *(cell(of[group]) for group in groups), "", "", ""))
    for row in rows:
        other, run = row["baselines"]["shuffled_image"]["overall"], row["run"]
        about = (cell(other), run["epochs"], f"{run['seconds'] / 60:.1f}")
        lines.append(line(row["head"].upper(), row["tower"], *(cell(row[group]) for group in groups), *about))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pmclip_deploy.benchmarks.slake_heads", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of SLAKE")
    parser.add_argument("--glove", type=Path, required=True, help="text file of GloVe's word vectors")
    parser.add_argument("--autoencoder", type=Path, help="weights of MEVF's auto-encoder (default: heads without it)")
    parser.add_argument("--output", type=Path, required=True, help="folder of the trained heads")
    parser.add_argument("--head", action="append", choices=HEADS, help="repeat for more (default: all)")
    parser.add_argument("--tower", action="append", choices=TOWERS, help="repeat for more (default: all)")
    parser.add_argument("--reduced", action="store_true", help="small heads on 100 images")
    parser.add_argument("--seed", type=int, default=1, help="of the trainings (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="of a CPU; 0 takes all cores (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON document in place of the table")
    of = parser.parse_args(arguments)
    table = Table(of.data, of.glove, of.autoencoder, of.output, REDUCED if of.reduced else FULL, of.seed, of.threads, of.device)
    try:
        rows = list(table.rows(of.head or HEADS, of.tower or TOWERS))
    except PmclipError as error:
        parser.exit(error.exit_code, f"error: {error}\n")
    print(json.dumps({"paper": PAPER, "rows": rows}, indent=1) if of.json else markdown(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
