"""From questions to token ids: cut to their own length and padded within the batch, or all of one length."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from pmclip_deploy.errors import BundleError


def tokenizer_from_file(path: Path) -> Tokenizer:
    """Raises BundleError."""
    return tokenizer_from_text(None, path)


def tokenizer_from_text(text: str | None, path: Path) -> Tokenizer:
    """Of a tokenizer.json's text, or of the file itself. Raises BundleError, which names the file."""
    try:
        tokenizer = Tokenizer.from_file(str(path)) if text is None else Tokenizer.from_str(text)
    except Exception as error:  # the tokenizers package raises bare Exceptions
        raise BundleError(f"{path}: no usable tokenizer ({' '.join(str(error).split())[:200]})", "copy the bundle again") from error
    tokenizer.no_padding()  # the file's own settings pad every text to 128
    return tokenizer


def tokens_from_text(
    tokenizer: Tokenizer | Path, texts: Sequence[str], context_length: int, pad_id: int, length: int | None = None
) -> NDArray[np.int64]:
    """(B, T) with T the longest text's length in tokens, specials included, and at most ``context_length``; or T = ``length``, always."""
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = tokenizer_from_file(tokenizer)
    tokenizer.enable_truncation(context_length if length is None else length)
    rows = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    tokens = np.full((len(rows), max(map(len, rows), default=0) if length is None else length), pad_id, np.int64)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return tokens
