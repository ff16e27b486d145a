"""The kernel where no C++ compiler was: blocks of the bank in f32 for the sum and to find candidates, which the reference then ranks."""

import numpy as np
from numpy.typing import NDArray

from . import reference
from .reference import Similarity

BLOCK = 1 << 20  # numbers of the bank at a time: 4 MiB in f32
MARGIN, A_NUMBER = 1e-5, 1e-8  # of a cosine: what f32 can be wrong by, and more; it grows with the numbers of a row


def contrastive_similarity(
    image: NDArray[np.float32], bank: NDArray[np.generic], logit_scale: float, k: int, scales: NDArray[np.float32] | None, threads: int = 0
) -> Similarity:
    """As the package's; arguments are right. ``threads`` is NumPy's own affair."""
    unit, known = reference.unit(image.astype(np.float64))
    images, k_all, k = unit.astype(np.float32), k, min(k, len(bank))
    best, index = np.full((len(image), k), -np.inf, np.float32), np.full((len(image), k), -1, np.int64)
    total = np.full(len(image), -np.inf)
    margin = MARGIN + A_NUMBER * bank.shape[1]
    step = max(1, BLOCK // max(1, bank.shape[1]))
    for start in range(0, len(bank), step):
        block = slice(start, start + step)
        scores = _scores(images, known, bank[block], logit_scale, None if scales is None else scales[block])
        total = np.logaddexp(total, _log_sum_exp(scores))
        worst = best[:, -1:] if k else np.full((len(image), 1), np.inf, np.float32)
        least = worst - margin * abs(logit_scale)
        rows = start + np.flatnonzero((scores > least).any(0))  # a later row must exceed what it displaces
        found = reference.contrastive_similarity(
            image, bank[rows], logit_scale, min(k, len(rows)), None if scales is None else scales[rows]
        )
        best, index = np.hstack([best, found.score]), np.hstack([index, np.append(rows, -1)[found.index]])
        order = np.argsort(-best, 1, kind="stable")[:, :k]
        best, index = np.take_along_axis(best, order, 1), np.take_along_axis(index, order, 1)
    missing = ((0, 0), (0, k_all - k))
    return Similarity(np.pad(best, missing, constant_values=-np.inf), np.pad(index, missing, constant_values=-1), total.astype(np.float32))


def _scores(
    images: NDArray[np.float32],
    known: NDArray[np.bool_],
    block: NDArray[np.generic],
    logit_scale: float,
    scales: NDArray[np.float32] | None,
) -> NDArray[np.float64]:  # (B, rows)
    rows = block.astype(np.float32, copy=False)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        square = np.einsum("nd,nd->n", rows, rows)
    usable = (square >= 2.0**-90) & (square <= 2.0**100)  # what f32 holds without loss
    doubtful = np.flatnonzero(~usable)
    if len(doubtful):
        rows = rows.copy()
        rows[doubtful], usable[doubtful] = reference.unit(block[doubtful].astype(np.float64))
        square[doubtful] = 1
    cosine = np.clip((images @ rows.T).astype(np.float64) / np.sqrt(square), -1, 1)
    if scales is not None:
        cosine *= np.sign(scales)
        usable &= np.isfinite(scales) & (scales != 0)
    return np.where(known[:, None] & usable, logit_scale * cosine, -np.inf)


def _log_sum_exp(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    largest = scores.max(1, initial=-np.inf)
    finite = np.where(np.isfinite(largest), largest, 0)
    with np.errstate(divide="ignore"):
        result: NDArray[np.float64] = np.log(np.exp(scores - finite[:, None]).sum(1)) + finite
    return result
