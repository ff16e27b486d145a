"""How many answers to "what modality is this?" change with the threshold of their detail (`DETAIL`, decision/evidence.py).

    python -m pmclip_deploy.benchmarks.trust_detail --data vqa-med-2019 --limit 1600

asks the embedded model of each training picture, as it is and changed. The memory answers without the picture itself; the image tower has
learned from it. No validation picture is read and no label. Prints a Markdown table: of the answers given before a change, the share that
is another one after it, with the upper end of its 95% interval, which resamples pictures.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

import pmclip_deploy as pm
from pmclip_deploy.answer import Candidate
from pmclip_deploy.benchmarks.trust_bench import Over, changed
from pmclip_deploy.benchmarks.trust_robustness import CHANGES
from pmclip_deploy.console import progress
from pmclip_deploy.decision.evidence import FACETS, WEAKEST
from pmclip_deploy.decision.facets import modality_from_candidates
from pmclip_deploy.decision.heads import HeadLogits, decision_from_heads
from pmclip_deploy.imaging.images import Image
from pmclip_deploy.models import DEFAULT_CHECKPOINT
from pmclip_deploy.train.checkpoint import read_checkpoint, under
from pmclip_deploy.train.heads.lite import LiteHead
from pmclip_deploy.train.questions import questions_for_training

ASKED = ("half size", "crop of 10%", "JPEG quality 50")
THRESHOLDS = (WEAKEST, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)

Said = tuple[Candidate, ...] | None  # the likeliest first; None where the picture does not look like radiology


def candidates_of_pictures(paths: Sequence[Path], limit: int | None) -> Iterator[list[Said]]:
    """What is said of each picture as it is, and after each change; ``paths`` are those of the memory's cases."""
    predictor = pm.load()
    _, tensors = read_checkpoint(DEFAULT_CHECKPOINT)
    head = LiteHead.from_tensors(under(tensors, "head"))
    text, slots = torch.from_numpy(predictor.question_features([FACETS["modality"][1]])), head.slots.clone()
    for i in progress(range(len(paths[:limit])), "pictures"):
        head.slots = slots.clone()
        head.slots[i] = len(head.balance)  # the case speaks for nothing
        forms: list[Image] = [paths[i], *(changed(paths[i], CHANGES[name]) for name in ASKED)]
        seen = torch.from_numpy(np.stack([predictor.image_features(form) for form in forms]))
        with torch.no_grad():
            answer, kind, radiograph = (x.numpy() for x in head(seen, text.expand(len(seen), -1)))
        heads = HeadLogits(answer, kind, radiograph)
        decisions = [decision_from_heads(predictor.manifest, heads, row) for row in range(len(heads))]
        yield [None if decision.rule == "radiograph" else decision.candidates for decision in decisions]


def table(said: Sequence[Sequence[Said]]) -> str:
    over = Over([str(i) for i in range(len(said))], 0)
    lines = [f"| detail from | {' | '.join(ASKED)} | answers in detail |", "|---|" + "---|" * 4]
    for threshold in THRESHOLDS:
        words = np.array([[_word(candidates, threshold) for candidates in of] for of in said])  # (N, 1 + changes)
        given, cells = words[:, 0] != "", list[str]()
        for column in range(1, words.shape[1]):
            share = over.share((words[:, column] != words[:, 0]) & (words[:, column] != ""), given)
            cells.append(f"{share['value']:.3f}, at most {share['ci95'][1]:.3f}")
        details = sum(bool(word) and "not determined" not in word for word in words[:, 0])
        lines.append(f"| {threshold:.2f} | {' | '.join(cells)} | {details:,} of {int(given.sum()):,} |")
    return "\n".join(lines)


def _word(candidates: Said, threshold: float) -> str:
    """What is answered; "" for nothing."""
    given = modality_from_candidates(candidates or (), 0.0, threshold)
    return given[0] if given else ""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="VQA-Med 2019, which the embedded model was trained on")
    parser.add_argument("--limit", type=int, help="asks of the first pictures alone")
    options = parser.parse_args(arguments)
    training, _ = questions_for_training([options.data])
    paths = sorted({question.image for question in training}, key=lambda path: path.name)
    print(table(list(candidates_of_pictures(paths, options.limit))))


if __name__ == "__main__":
    main()
