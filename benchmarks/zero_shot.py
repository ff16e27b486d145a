"""What the towers know without a head: retrieval among validation captions, zero-shot modality and organ, with chance beside them; and what
int8 loses of the nearest pictures.

    python -m pmclip_deploy.benchmarks.zero_shot --data vqa-med-2019 [--bundle DIR] [--output FILE.csv]

Captions are made of all that is said about an image, as in training. Labels are those of the training rows; a modality is known by the
first letters of its answer ("mr - flair" is an MRI). Baselines: the most frequent training label, and the embedding of another image.
int8 has a scale a row; scored again are the best 40, in f32, among the embeddings of all images, training and validation.
"""

import argparse
import csv
from collections import Counter
from pathlib import Path

import numpy as np

from pmclip_deploy.classify import bank_from_labels
from pmclip_deploy.evaluation.rows import rows_from_jsonl
from pmclip_deploy.kernels import contrastive_similarity
from pmclip_deploy.opening import load
from pmclip_deploy.train.captions import statement

MODALITIES = {
    "xr": "x-ray", "us": "ultrasound", "ct": "ct", "cta": "ct", "mr": "mri", "mra": "mri", "an": "angiogram", "mammograph": "mammogram",
    "bas": "barium study", "ugi": "barium study", "be": "barium study", "sbft": "barium study", "nm": "nuclear medicine",
    "pet": "nuclear medicine",
}  # fmt: skip


def label_of(category: str, answer: str) -> str | None:
    """The label that an answer stands for; None where it is left out."""
    if category == "modality":
        return MODALITIES.get(answer.replace("-", " ").split(" ")[0])
    return None if answer in ("yes", "no") else answer


def recall(ours: np.ndarray, theirs: np.ndarray, captions: list[str], k: int) -> float:
    """How often the pair, or one with the same caption, is among the k nearest."""
    near = contrastive_similarity(ours, theirs, 1.0, k).index
    return float(np.mean([any(captions[j] == captions[i] for j in row) for i, row in enumerate(near)]))


def recall_of_int8(x: np.ndarray, k: int = 10) -> tuple[float, float]:
    """(N, D) -> how many of the k nearest int8 finds, alone and with four times as many scored again."""
    scales = np.abs(x).max(1) / np.float32(127)
    small = np.round(x / scales[:, None]).astype(np.int8)
    exact = contrastive_similarity(x, x, 1.0, k).index
    near = contrastive_similarity(x, small, 1.0, 4 * k, scales).index
    again = [rows[contrastive_similarity(q[None], x[rows], 1.0, k).index[0]] for q, rows in zip(x, near, strict=True)]
    alone, rescored = (float(np.mean([len({*a} & {*b}) / k for a, b in zip(exact, of, strict=True)])) for of in (near[:, :k], again))
    return alone, rescored


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    images = options.data / "images"
    training, rows = (rows_from_jsonl(options.data / f"{name}.jsonl", images) for name in ("train", "val"))
    predictor = load(options.bundle)
    said: dict[str, list[str]] = {}
    for row in rows:
        of = said.setdefault(row.image, [])
        if (text := statement(row.question, row.answer)) not in of:
            of.append(text)
    place = {name: i for i, name in enumerate(said)}
    seen = np.stack([predictor.embed_image(images / name) for name in said])  # (P, D)
    captions = [", ".join(of) for of in said.values()]
    texts = predictor.embed_texts(captions)
    table: list[tuple[str, int, float, float, float | str, float | str]] = []
    for way, ours, theirs in (("image to text", seen, texts), ("text to image", texts, seen)):
        for k in (1, 5, 10):
            same = float(np.mean([captions.count(caption) for caption in captions]))
            table.append((f"{way}, R@{k}", len(seen), recall(ours, theirs, captions, k), k * same / len(seen), "", ""))
    for category in ("modality", "plane", "organ"):
        known = Counter(filter(None, (label_of(category, row.answer) for row in training if row.category == category)))
        labels = sorted(known)
        told_of = [(place[r.image], label_of(category, r.answer)) for r in rows if r.category == category]
        asked = [(i, label) for i, label in told_of if label is not None and label in known]
        at, truth = np.array([i for i, _ in asked]), np.array([labels.index(label) for _, label in asked])
        bank = bank_from_labels(predictor.embed_texts, labels)
        told = contrastive_similarity(seen, bank, 1.0, 1).index[:, 0]
        other = np.random.default_rng(0).permutation(len(seen))
        majority = labels.index(known.most_common(1)[0][0])
        figures = (float(np.mean(x)) for x in (told[at] == truth, truth == majority, told[other[at]] == truth))
        accuracy, frequent, shuffled = figures
        table.append((f"{category}, {len(labels)} labels", len(asked), accuracy, 1 / len(labels), frequent, shuffled))
    names = sorted({row.image for row in [*training, *rows]})
    alone, rescored = recall_of_int8(np.stack([predictor.embed_image(images / name) for name in names]))
    table.append(("int8, recall@10", len(names), alone, 10 / len(names), "", ""))
    table.append(("int8 scored again, recall@10", len(names), rescored, 10 / len(names), "", ""))
    header = ("what", "n", "figure", "chance", "majority", "shuffled image")
    for line in (header, *table):
        print("  ".join(f"{x:.3f}".rjust(14) if isinstance(x, float) else str(x).rjust(14) for x in line))
    if options.output:
        with options.output.open("w", newline="") as file:
            csv.writer(file).writerows([header, *([round(x, 4) if isinstance(x, float) else x for x in line] for line in table)])


if __name__ == "__main__":
    main()
