"""What every kernel must compute, in double precision and nothing clever."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Similarity(NamedTuple):
    score: NDArray[np.float32]  # (B, k), the largest first, of equal ones the lowest index; -inf where there are fewer than k
    index: NDArray[np.int64]  # type: ignore[assignment]  # (B, k) rows of the bank; -1 where there are fewer than k
    log_sum_exp: NDArray[np.float32]  # (B,) over all scores, not only those given; -inf where there is none


def contrastive_similarity(
    image: NDArray[np.float32], bank: NDArray[np.generic], logit_scale: float, k: int, scales: NDArray[np.float32] | None = None
) -> Similarity:
    """score = logit_scale x cosine of image (B, D) f32 and bank (N, D) f32, f16, or int8 with ``scales`` (N,) f32, one a row.

    A row or an image that is zero or not finite has no direction: it scores -inf, adds nothing to the sum, and is never given.
    """
    images, rows = image.astype(np.float64), bank.astype(np.float64)
    if scales is not None:
        rows = rows * scales.astype(np.float64)[:, None]
    (a, known), (b, usable) = unit(images), unit(rows)
    scores = np.where(known[:, None] & usable, float(logit_scale) * (a @ b.T), -np.inf)  # (B, N)
    given = scores.astype(np.float32)  # ranked as they are given, for the last bits of a double differ between equal rows
    order = np.argsort(-given, axis=1, kind="stable")[:, :k]
    score, index = np.full((len(image), k), -np.inf, np.float32), np.full((len(image), k), -1)
    score[:, : order.shape[1]] = np.take_along_axis(given, order, 1)
    index[:, : order.shape[1]] = order
    index[np.isneginf(score)] = -1
    return Similarity(score, index.astype(np.int64), np.logaddexp.reduce(scores, axis=1, initial=-np.inf).astype(np.float32))


def unit(rows: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """(rows of length 1, or zeros; which have a direction)"""
    largest = np.abs(rows).max(1, initial=0)
    usable = np.isfinite(largest) & (largest > 0)
    scaled = np.where(usable[:, None], rows, 0) / np.where(usable, largest, 1)[:, None]  # so that no square overflows
    length = np.sqrt((scaled**2).sum(1))
    return scaled / np.where(usable, length, 1)[:, None], usable
