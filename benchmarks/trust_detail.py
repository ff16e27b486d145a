"""How many answers about a detail of the modality change with the threshold from which it is given (`DETAIL`, decision/evidence.py).

    python -m pmclip_deploy.benchmarks.trust_detail --data vqa-med-2019 --limit 1600
    python -m pmclip_deploy.benchmarks.trust_detail --data vqa-med-2019 --about contrast

asks the embedded model of each training picture, as it is and changed. --about contrast and --about weighting ask only of pictures about
which the training set asks the same, and count right answers too. The memory answers without the picture itself; the image tower has
learned from it. No validation picture is read. Prints a Markdown table: of the answers given before a change, the share that is another
one after it, with the upper end of its 95% interval, which resamples pictures. "Not determined" is an answer too.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

import pmclip_deploy as pm
from pmclip_deploy.answer import Candidate
from pmclip_deploy.benchmarks.trust_bench import Over, changed
from pmclip_deploy.benchmarks.trust_robustness import CHANGES
from pmclip_deploy.console import progress
from pmclip_deploy.decision.evidence import FACETS, WEAKEST, summed
from pmclip_deploy.decision.facets import modality_from_candidates
from pmclip_deploy.decision.heads import HeadLogits, decision_from_heads
from pmclip_deploy.imaging.images import Image
from pmclip_deploy.models import DEFAULT_CHECKPOINT
from pmclip_deploy.train.checkpoint import read_checkpoint, under
from pmclip_deploy.train.datasets import Question
from pmclip_deploy.train.heads.lite import LiteHead
from pmclip_deploy.train.questions import questions_for_training

ASKED = ("half size", "crop of 10%", "JPEG quality 50")
THRESHOLDS = (WEAKEST, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)

Said = tuple[Candidate, ...] | None  # the likeliest first; None where the picture does not look like radiology


def asked_of_pictures(training: Sequence[Question], about: str) -> dict[Path, tuple[str, str]]:
    """The question about the detail that each picture is asked, and the right answer; "" where only the question is known."""
    texts = [text for kind, text in FACETS.values() if kind == about]
    if about == "modality":
        return {question.image: (texts[0], "") for question in training}
    return {question.image: (question.question, question.answer) for question in training if question.question in texts}


def candidates_of_pictures(cases: Sequence[Path], asked: Mapping[Path, tuple[str, str]]) -> Iterator[list[Said]]:
    """What is said of each picture as it is, and after each change; ``cases`` are those of the memory."""
    predictor = pm.load()
    _, tensors = read_checkpoint(DEFAULT_CHECKPOINT)
    head = LiteHead.from_tensors(under(tensors, "head"))
    slots = head.slots.clone()
    for i, path in progress([(i, path) for i, path in enumerate(cases) if path in asked], "pictures"):
        head.slots = slots.clone()
        head.slots[i] = len(head.balance)  # the case speaks for nothing
        forms: list[Image] = [path, *(changed(path, CHANGES[name]) for name in ASKED)]
        seen = torch.from_numpy(np.stack([predictor.image_features(form) for form in forms]))
        text = torch.from_numpy(predictor.question_features([asked[path][0]]))
        with torch.no_grad():
            answer, kind, radiograph = (x.numpy() for x in head(seen, text.expand(len(seen), -1)))
        heads = HeadLogits(answer, kind, radiograph)
        decisions = [decision_from_heads(predictor.manifest, heads, row) for row in range(len(heads))]
        yield [None if decision.rule == "radiograph" else decision.candidates for decision in decisions]


def table(said: Sequence[Sequence[Said]], about: str = "modality", truth: Sequence[str] = ()) -> str:
    """``truth``: the right answers, one a picture; none are counted where it is empty."""
    over = Over([str(i) for i in range(len(said))], 0)
    columns = ["detail from", *ASKED, "answers in detail", *(["right of these"] if truth else [])]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for threshold in THRESHOLDS:
        words = np.array([[_word(candidates, threshold, about) for candidates in of] for of in said])  # (N, 1 + changes)
        given, cells = words[:, 0] != "", list[str]()
        for column in range(1, words.shape[1]):
            share = over.share((words[:, column] != words[:, 0]) & (words[:, column] != ""), given)
            cells.append(f"{share['value']:.3f}, at most {share['ci95'][1]:.3f}")
        details = np.array([bool(word) and "not determined" not in word for word in words[:, 0]])
        cells.append(f"{details.sum():,} of {given.sum():,}")
        if truth:
            cells.append(f"{(words[:, 0] == [_value(answer, about) for answer in truth]).sum():,}")
        lines.append(f"| {threshold:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _word(candidates: Said, threshold: float, about: str) -> str:
    """What is answered; "" for nothing."""
    if not candidates:
        return ""
    if about == "modality":
        given = modality_from_candidates(candidates, 0.0, threshold)
        return given[0] if given else ""
    word, share = next(iter(summed(candidates, lambda answer: _value(answer, about)).items()))
    return word if share >= threshold else "not determined"


def _value(answer: str, about: str) -> str:
    """Each kind of contrast is contrast."""
    return "contrast" if about == "contrast" and answer != "noncontrast" else answer


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="VQA-Med 2019, which the embedded model was trained on")
    parser.add_argument("--about", choices=("modality", "contrast", "weighting"), default="modality", help="the detail; default: modality")
    parser.add_argument("--limit", type=int, help="asks of the first pictures alone")
    options = parser.parse_args(arguments)
    training, _ = questions_for_training([options.data])
    cases = sorted({question.image for question in training}, key=lambda path: path.name)
    asked = asked_of_pictures(training, options.about)
    taken = [path for path in cases[: options.limit] if path in asked]
    truth = [] if options.about == "modality" else [asked[path][1] for path in taken]
    print(table(list(candidates_of_pictures(cases[: options.limit], asked)), options.about, truth))


if __name__ == "__main__":
    main()
