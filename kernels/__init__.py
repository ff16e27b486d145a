"""The fused contrastive-similarity kernel: normalise, scaled dot products, log-sum-exp and top-k in one pass over a bank of embeddings."""

import operator
from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import cpu, numpy_path
from .reference import Similarity

__all__ = ["Similarity", "contrastive_similarity", "implementation"]

FLOAT32 = (np.dtype(np.float32),)
LARGEST = float(np.finfo(np.float32).max)


def contrastive_similarity(
    image: NDArray[np.float32],
    bank: NDArray[np.generic],
    logit_scale: float = 1.0,
    k: int = 10,
    scales: NDArray[np.float32] | None = None,
    threads: int = 0,
) -> Similarity:
    """The k rows of bank (N, D) f32, f16 or int8 most like each image (B, D) f32, with ``scales`` (N,) f32 if its rows have them.

    Scores are logit_scale x cosine, the largest first and of equal ones the lowest row first. A row or an image that is zero or not finite
    scores -inf, adds nothing to ``log_sum_exp``, and is never given; where fewer than k remain, rows are -1. The bank is read once, in
    place, by at most ``threads`` threads (0: as many as the process may use), and Python's lock is free meanwhile.
    """
    logit_scale, k, threads = float(logit_scale), operator.index(k), operator.index(threads)
    _check(image, "image", 2, FLOAT32)
    _check(bank, "bank", 2, cpu.DTYPES)
    if image.shape[1] != bank.shape[1]:
        raise ValueError(f"bank: {bank.shape[1]} numbers a row and the images have {image.shape[1]}; embed both with the same model")
    if scales is not None:
        _check(scales, "scales", 1, FLOAT32)
        if len(scales) != len(bank):
            raise ValueError(f"scales: {len(scales)} of them for a bank of {len(bank)} rows; give one a row")
    if not abs(logit_scale) <= LARGEST:
        raise ValueError(f"logit_scale: {logit_scale} is not a finite 32-bit float")
    if k < 0 or threads < 0:
        raise ValueError(f"k and threads: {k} and {threads}; neither can be negative")
    run = cpu.contrastive_similarity if cpu.library else numpy_path.contrastive_similarity
    return run(image, bank, logit_scale, k, scales, threads)


def implementation() -> str:
    """Which code `contrastive_similarity` runs."""
    return f"C++, {cpu.isa()}" if cpu.library else "NumPy: no compiled kernel"


def _check(array: object, name: str, dimensions: int, dtypes: Collection[np.dtype[Any]]) -> None:
    if not isinstance(array, np.ndarray) or array.ndim != dimensions or array.dtype not in dtypes:
        got = f"{array.ndim}-dimensional {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(f"{name}: {got}; give a {dimensions}-dimensional NumPy array of {' or '.join(map(str, dtypes))}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name}: its rows do not stand one after the other in memory; pass numpy.ascontiguousarray({name})")
