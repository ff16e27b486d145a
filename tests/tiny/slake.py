"""A dataset of a few pictures in SLAKE's layout, with words for its questions."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = ("Black", "Dark", "Light", "White")


def slake(folder: Path, images: dict[str, int]) -> Path:
    """SLAKE's three files and its pictures, of which ``images`` says how many each split has; beside them glove.txt."""
    rng, number = np.random.default_rng(0), 0
    for split, count in images.items():
        rows = []
        for i in range(count):
            level, name = number % 4, f"xmlab{number}/source.jpg"
            (folder / "imgs" / name).parent.mkdir(parents=True)
            Image.fromarray((rng.integers(0, 40, (72, 64)) + 60 * level).astype(np.uint8)).save(folder / "imgs" / name)
            about = {"img_name": name, "q_lang": "en", "content_type": "Color"}
            rows += [
                {**about, "qid": 3 * i, "question": "What colour is it?", "answer": COLOURS[level], "answer_type": "OPEN"},
                {**about, "qid": 3 * i + 1, "question": "Is it bright?", "answer": "Yes" if level > 1 else "No", "answer_type": "CLOSED"},
                {**about, "qid": 3 * i + 2, "question": "\u4eae\u5417?", "answer": "\u662f", "answer_type": "CLOSED", "q_lang": "zh"},
            ]
            number += 1
        (folder / f"{split}.json").write_text(json.dumps(rows), encoding="utf-8")
    words = ["what", "colour", "is", "it", "bright"]
    vectors = np.random.default_rng(1).normal(size=(len(words), 6))
    (folder / "glove.txt").write_text("".join(f"{w} {' '.join(f'{x:.3f}' for x in row)}\n" for w, row in zip(words, vectors, strict=True)))
    return folder
