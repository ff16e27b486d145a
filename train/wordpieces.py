"""Fewer word pieces: a tokenizer without those that its texts never need, so that a bundle's word table is a quarter as large.

    python -m pmclip_deploy.train.wordpieces --checkpoint runs/findings --data vqa-med-2019 --data vqa-rad --output runs/small
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from tokenizers import Tokenizer

from pmclip_deploy.atomic import write_errors
from pmclip_deploy.bundle.names import SIGNATURES, TOKENIZER
from pmclip_deploy.console import print_error
from pmclip_deploy.errors import PmclipError, UsageError
from pmclip_deploy.questions import lexicon
from pmclip_deploy.texts import lines_of_file, text_of_file
from pmclip_deploy.train.checkpoint import read_checkpoint, save_checkpoint
from pmclip_deploy.train.datasets import questions_from_folder
from pmclip_deploy.train.kinds import PHRASES

PIECES = 8000  # what it costs stands in docs/tried/training.md


def fewer_pieces(tokenizer: str, texts: Iterable[str], most: int = PIECES) -> str:
    """A WordPiece tokenizer.json with at most ``most`` pieces, each with the number that it had.

    It keeps what is special, single characters, what ``texts`` are made of, and then the most frequent, which BERT numbers first. So
    ``texts`` give the tokens that they gave, any other word at worst falls into more pieces, and none becomes unknown.
    Raises UsageError where ``most`` is too few, or the tokenizer has no WordPiece.
    """
    content = json.loads(tokenizer)
    if content["model"]["type"] != "WordPiece":
        raise UsageError(f"the tokenizer is {content['model']['type']}, not WordPiece", "give a checkpoint of pmclip-lite")
    pieces: dict[str, int] = content["model"]["vocab"]
    whole = Tokenizer.from_str(tokenizer)
    whole.no_truncation()
    needed = {piece for encoding in whole.encode_batch(list(texts)) for piece in encoding.tokens}
    needed |= {added["content"] for added in content["added_tokens"]} | {piece for piece in pieces if len(piece.removeprefix("##")) == 1}
    if len(needed) > most:
        raise UsageError(f"the texts need {len(needed)} word pieces, and only {most} may be kept", "give a larger --pieces")
    others = sorted((piece for piece in pieces if piece not in needed and not piece.startswith("[unused")), key=pieces.__getitem__)
    kept = needed | set(others[: most - len(needed)])
    content["model"]["vocab"] = {piece: number for piece, number in pieces.items() if piece in kept}
    return json.dumps(content, ensure_ascii=False)


def texts_of(datasets: Sequence[Path], files: Sequence[Path] = ()) -> list[str]:
    """Questions and answers of the datasets' training splits, the lines of text files, and every word that we know by name."""
    rows = [row for folder in datasets for row in questions_from_folder(folder, "train")]
    files = [*files, Path(lexicon.__file__).with_name("lexicon.txt"), *sorted(PHRASES.glob("*.*"))]
    known = [line for file in files for _, line in lines_of_file(file, "give a text file in UTF-8")]
    return [*(text for row in rows for text in (row.question, row.answer)), *known]


def rewrite(checkpoint: Path, data: Sequence[Path], text: Sequence[Path], pieces: int, output: Path) -> dict[str, int]:
    """Writes the checkpoint to ``output`` with a smaller tokenizer. Raises InputError, UsageError and BundleError."""
    meta, tensors = read_checkpoint(checkpoint)
    before = text_of_file(checkpoint / TOKENIZER, "give a checkpoint")
    after = fewer_pieces(before, [*texts_of(data, text), *meta.get("answers", ())], pieces)
    meta["provenance"]["wordpieces"] = {"data": [path.name for path in (*data, *text)], "pieces": pieces}
    with write_errors(f"{output}: the checkpoint", "make room, or give another --output"), TemporaryDirectory() as scratch:
        tokenizer = Path(scratch, TOKENIZER)
        tokenizer.write_text(after, encoding="utf-8")
        if (checkpoint / SIGNATURES).is_file():
            shutil.copy(checkpoint / SIGNATURES, scratch)
        save_checkpoint(output, tensors, meta, tokenizer)
    return {name: len(json.loads(text)["model"]["vocab"]) for name, text in (("before", before), ("after", after))}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", type=Path, action="append", required=True, help="a dataset whose training texts keep their tokens")
    parser.add_argument("--text", type=Path, action="append", default=[], help="a text file whose lines keep their tokens; repeat for more")
    parser.add_argument("--pieces", type=int, default=PIECES)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    try:
        print(json.dumps(rewrite(**vars(options))))
    except PmclipError as error:
        print_error(str(error))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
