"""How questions are read: confusion of kinds and whole intents on phrasings, the text tower beside the rules, datasets' own categories.

    python -m pmclip_deploy.benchmarks.questions FILE.jsonl... [--part held] [--tower] [--failures]
    python -m pmclip_deploy.benchmarks.questions --data ../shared/data
    python -m pmclip_deploy.benchmarks.questions --confusable WORDS.txt... [--common WORDS.txt] > pmclip_deploy/questions/confusable.txt

A row is {"question", "intent", "or", "part"}: the fields of an `Intent` that must be as they are given ("or" lists other readings that are
right too). Fields that are left out have their defaults; qualifiers are [kind, value], where "*" is any value; "needs": true is a question
to be asked back.
"""

import argparse
import gzip
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pmclip_deploy.questions import KINDS, LANGUAGE, OUT_OF_SCOPE, UNKNOWN, Intent, understood
from pmclip_deploy.questions.lexicon import WORDS
from pmclip_deploy.questions.spelling import slips_between, targets
from pmclip_deploy.texts import lines_of_file

ASKED_BACK = "asked back"
REFUSED = {ASKED_BACK, OUT_OF_SCOPE, LANGUAGE}
LABELS = (*KINDS, ASKED_BACK, OUT_OF_SCOPE, LANGUAGE)
DETAILS = {"modality", "contrast", "weighting"}  # one kind, "modality yes/no", to the tower
Row = dict[str, Any]
Reader = Callable[[str], Intent]

# The kinds that read a dataset's category rightly.
CATEGORIES = {
    "vqa-med-2019": {"modality": DETAILS, "plane": {"plane"}, "organ": {"organ"}, "abnormality": {"abnormality", "normal"}},
    "slake": {
        "Modality": DETAILS, "Plane": {"plane"}, "Organ": {"organ"}, "Abnormality": {"abnormality", "normal", "finding"},
        "Position": {"organ", "abnormality", "finding"}, **dict.fromkeys(("Size", "Shape", "Color", "Quantity", "KG"), REFUSED),
    },
}  # fmt: skip


# --- scoring --------------------------------------------------------------------------------------------------------------------


def label_of(intent: Intent) -> str:
    """The kind, or ASKED_BACK."""
    return ASKED_BACK if intent.kind == UNKNOWN or (intent.needs and intent.kind in KINDS) else intent.kind


def label_of_row(row: Row, got: str) -> str:
    """The first reading that is right, or the one that was got if it is among them."""
    labels = [ASKED_BACK if right.get("needs") else right["kind"] for right in readings(row)]
    return got if got in labels else labels[0]


def readings(row: Row) -> list[Row]:
    """What the row says is right: its intent, and the others that are as good."""
    return [row["intent"], *row.get("or", [])]


def fits(intent: Intent, right: Row) -> bool:
    """Whether the whole intent is read as it should be."""
    if right.get("needs"):
        return bool(intent.kind == right["kind"]) and intent.needs is not None
    if intent.kind != right["kind"] or right["kind"] in (OUT_OF_SCOPE, LANGUAGE):
        return bool(intent.kind == right["kind"])
    same = (intent.form, intent.finding, intent.polarity) == (right.get("form"), right.get("finding"), right.get("polarity", True))
    asked = sorted(intent.asked) == sorted(map(tuple, right.get("asked", [])))
    return same and asked and intent.needs is None and _qualified(intent, right.get("qualifiers", []))


def _qualified(intent: Intent, right: Sequence[Sequence[str]]) -> bool:
    left = [(q.kind, q.value) for q in intent.qualifiers]
    for kind, value in sorted(right, key=lambda pair: pair[1] == "*"):
        match = next((pair for pair in left if pair[0] == kind and value in ("*", pair[1])), None)
        if match is None:
            return False
        left.remove(match)
    return not left


def misread(intent: Intent, row: Row) -> bool:
    """Answered, and as something else than was asked: what must not happen. A qualifier is an abstention that names it."""
    return intent.answerable and not intent.qualifiers and not any(fits(intent, right) for right in readings(row))


def wilson(right: int, n: int) -> tuple[float, float]:
    """95% interval of a share."""
    z, p = 1.96, right / n
    middle, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return float((middle - half) / (1 + z * z / n)), float((middle + half) / (1 + z * z / n))


# --- the text tower -------------------------------------------------------------------------------------------------------------


def reader_of_tower(bundle: Path | None) -> Reader:
    """The kind head of the shipped model, in the words of `Intent`; it knows no polarity, qualifier, value or choice."""
    from pmclip_deploy.opening import load

    predictor = load(bundle)
    seen = predictor.image_features(np.zeros((256, 256), np.uint8))

    def read(question: str) -> Intent:
        kind = predictor.manifest.kinds[int(predictor.head_logits(seen[None], predictor.question_features([question])).kind[0].argmax())]
        name, _, finding = kind.name.partition(": ")
        if finding or name == "finding never learned":
            return Intent("finding", "closed", finding or None)
        of = {"abnormality yes/no": ("normal", "closed"), "modality yes/no": ("modality", "closed"), "out of scope": (OUT_OF_SCOPE, None)}
        return Intent(*of.get(name, (name, "open")))

    return read


def fits_loosely(intent: Intent, right: Row) -> bool:
    """As `fits`, and kind to the tower: values that it has no word for count as read, "modality yes/no" as any of its kinds, and what is
    asked back or another language as refused."""
    if right.get("needs") or right["kind"] in REFUSED:
        return intent.kind == OUT_OF_SCOPE
    kinds = DETAILS if intent.kind == "modality" and intent.form == "closed" else {intent.kind}
    finding = right.get("finding") == intent.finding or (intent.finding is None and right["kind"] == "finding")
    plain = right.get("polarity", True) and not right.get("qualifiers") and right.get("form") != "choice"
    return right["kind"] in kinds and finding and plain


def rules_then(tower: Reader) -> Reader:
    """The tower where the rules ask back what they cannot read at all."""

    def read(question: str) -> Intent:
        intent = understood(question)
        return tower(question) if intent.kind == UNKNOWN else intent

    return read


# --- tables ---------------------------------------------------------------------------------------------------------------------


def figures(rows: Sequence[Row], read: Reader, fit: Callable[[Intent, Row], bool]) -> dict[str, int]:
    """How many rows (n), right kinds, whole intents that are right (whole), and questions answered as another (misread)."""
    out = Counter(n=len(rows))
    for row in rows:
        intent = read(row["question"])
        got, whole = label_of(intent), any(fit(intent, right) for right in readings(row))
        right = label_of_row(row, got)
        out["kind"] += got == right or {got, right} <= REFUSED or (fit is fits_loosely and {got, right} <= DETAILS)
        out["whole"] += whole
        out["misread"] += intent.answerable and not intent.qualifiers and not whole
    return out


def confusion(rows: Sequence[Row], read: Reader) -> str:
    """Rows: what it is; columns: what it was read as."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        got = label_of(read(row["question"]))
        counts[label_of_row(row, got)][got] += 1
    used = [label for label in LABELS if counts[label] or any(count[label] for count in counts.values())]
    lines = ["| it is | " + " | ".join(used) + " |", "|---" * (len(used) + 1) + "|"]
    for label in used:
        lines.append(f"| {label} | " + " | ".join(str(counts[label][other] or "") for other in used) + " |")
    return "\n".join(lines)


def table(rows: Sequence[Row], tower: Reader | None) -> str:
    """Markdown: the shares of `figures`, for the rules and for the text tower."""
    readers: list[tuple[str, Reader, Callable[[Intent, Row], bool]]] = [("rules", understood, fits)]
    if tower is not None:
        readers += [("text tower", tower, fits_loosely), ("rules, and the tower where they ask back", rules_then(tower), _either)]
    lines = ["| read by | kind | whole intent | answered as something else |", "|---|---|---|---|"]
    for name, read, fit in readers:
        f = figures(rows, read, fit)
        low, high = wilson(f["whole"], f["n"])
        whole = f"{f['whole']} of {f['n']}, {f['whole'] / f['n']:.3f} [{low:.3f}, {high:.3f}]"
        lines.append(f"| {name} | {f['kind'] / f['n']:.3f} | {whole} | {f['misread']}, {f['misread'] / f['n']:.3f} |")
    return "\n".join(lines)


def _either(intent: Intent, right: Row) -> bool:
    return fits(intent, right) or fits_loosely(intent, right)


def of_datasets(data: Path) -> str:
    """How many questions of each category are read as one of its kinds, how many are refused, and how many are read as another."""
    lines = ["| data | category | questions | read so | refused | read as another kind |", "|---|---|---|---|---|---|"]
    for name, of in CATEGORIES.items():
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for category, question in _questions(data / name):
            counts[category][label_of(understood(question))] += 1
        for category, kinds in of.items():
            count, n = counts[category], counts[category].total()
            so = sum(count[kind] for kind in kinds)
            refused = sum(count[kind] for kind in REFUSED - kinds)
            lines.append(f"| {name} | {category} | {n} | {so / n:.3f} | {refused / n:.3f} | {(n - so - refused) / n:.3f} |")
    return "\n".join(lines)


def _questions(folder: Path) -> Iterable[tuple[str, str]]:
    """(category, question), training and validation together, SLAKE's in English."""
    for path in sorted(folder.glob("*.json*")):
        lines = (line for _, line in lines_of_file(path, "give the dataset's folder"))
        for row in json.loads(path.read_bytes()) if path.suffix == ".json" else map(json.loads, lines):
            if row.get("q_lang", "en") == "en":
                yield row.get("category") or row["content_type"], row["question"]


# --- words that no misspelling may become ---------------------------------------------------------------------------------------


def confusable(words: Iterable[str], common: set[str]) -> list[str]:
    """Those of ``words`` that are one slip from a word which may be read out of a misspelling, with a star; and those of ``common`` within
    two, from which the same misspelling may come."""
    near = defaultdict(set)
    for target in targets():
        for shorter in _shorter(target):
            near[shorter].add(target)
    found = set()
    for word in {*words, *common} - WORDS:
        alike = set().union(*(near.get(shorter, ()) for shorter in _shorter(word)))
        slips = min((slips_between(word, target, 2) for target in alike), default=3)
        if slips <= (2 if word in common else 1):
            found.add(word if word in common else word + "*")
    return sorted(found)


def _shorter(word: str) -> set[str]:
    """The word, and what is left of it without one or two letters."""
    once = {word[:i] + word[i + 1 :] for i in range(len(word))}
    return {word} | once | {w[:i] + w[i + 1 :] for w in once for i in range(len(w))}


def _words(paths: Sequence[Path]) -> set[str]:
    return {word for path in paths for word in re.findall(r"(?m)^[a-z]{4,}$", path.read_text(encoding="utf-8").lower())}


def phrasings(path: Path, part: str | None = None) -> list[dict[str, Any]]:
    """A row per question. In the file, the questions of one intent stand together."""
    data = path.read_bytes()
    groups = [json.loads(line) for line in (gzip.decompress(data) if path.suffix == ".gz" else data).decode().splitlines()]
    return [group | {"question": question} for group in groups if part in (None, group["part"]) for question in group["questions"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--part", help="build or held; both without it")
    parser.add_argument("--tower", action="store_true", help="the shipped model's kind head beside the rules")
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--failures", action="store_true", help="print what is read otherwise; not while the part is still held out")
    parser.add_argument("--data", type=Path, help="the folder that holds vqa-med-2019 and slake")
    parser.add_argument("--confusable", type=Path, nargs="+", help="word lists, a word a line")
    parser.add_argument("--common", type=Path, nargs="*", default=[], help="lists of frequent words: the others are marked with a star")
    options = parser.parse_args()
    if options.confusable:
        common = _words(options.common)
        print(*confusable(_words(options.confusable), common), sep="\n")
        return
    rows = [row for path in options.files for row in phrasings(path, options.part)]
    if rows:
        print(table(rows, reader_of_tower(options.bundle) if options.tower else None), confusion(rows, understood), sep="\n\n")
    for row in rows if options.failures else ():
        intent = understood(row["question"])
        if not any(fits(intent, right) for right in readings(row)):
            how = "misread" if misread(intent, row) else "refused"
            print(how, row["question"], row["intent"], intent.to_json(), sep="\t", file=sys.stderr)
    if options.data:
        print(of_datasets(options.data))


if __name__ == "__main__":
    main()
