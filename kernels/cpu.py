"""The kernel in C++, called where it was compiled when the package was installed; arrays pass by address, never copied."""

import ctypes
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .reference import Similarity

DTYPES: dict[np.dtype[Any], int] = {
    np.dtype(np.float32): 0,
    np.dtype(np.float16): 1,
    np.dtype(np.int8): 2,
}  # as enum pmclip_dtype in similarity.h
OUT_OF_MEMORY = 1
Anything = ctypes.c_char * 0
MOST_THREADS = 1 << 16  # more would not fit a C int, nor any machine


def _load() -> ctypes.CDLL | None:
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_similarity{suffix}")
        if path.is_file():
            try:
                found = ctypes.CDLL(str(path))  # releases Python's lock while it runs
            except OSError:  # of another processor, or without its C++ runtime
                continue
            address, i64 = ctypes.c_void_p, ctypes.c_int64
            found.pmclip_similarity.argtypes = [address, i64, address, ctypes.c_int, address, i64, i64, ctypes.c_float, i64, ctypes.c_int,
                                                address, address, address]  # fmt: skip
            found.pmclip_similarity_isa.restype = ctypes.c_char_p
            found.pmclip_similarity_use.argtypes = [ctypes.c_char_p]
            return found
    return None


library = _load()


def contrastive_similarity(
    image: NDArray[np.float32], bank: NDArray[np.generic], logit_scale: float, k: int, scales: NDArray[np.float32] | None, threads: int
) -> Similarity:
    """As the package's; arguments are right."""
    assert library
    B, D = image.shape
    score, index, log_sum_exp = np.empty((B, k), np.float32), np.empty((B, k), np.int64), np.empty(B, np.float32)
    status = library.pmclip_similarity(
        _address(image), B, _address(bank), DTYPES[bank.dtype], None if scales is None else _address(scales), len(bank), D,
        logit_scale, k, min(threads, MOST_THREADS), _address(score), _address(index), _address(log_sum_exp),
    )  # fmt: skip
    if status == OUT_OF_MEMORY:
        raise MemoryError(f"similarity: no memory for the best {k} of {B} images; ask for fewer")
    assert status == 0, status
    return Similarity(score, index, log_sum_exp)


def _address(array: NDArray[Any]) -> Any:
    """A third of the time that ``array.ctypes`` takes, which a small call would notice."""
    try:
        return Anything.from_buffer(array)  # type: ignore[arg-type]
    except TypeError:  # read-only
        return array.ctypes.data


def isa() -> str:
    """The instruction set in use."""
    assert library
    name: bytes = library.pmclip_similarity_isa()
    return name.decode()


def use(name: str | None) -> bool:
    """Takes another instruction set from now on, None the best again; whether this processor has it. For tests."""
    assert library
    return bool(library.pmclip_similarity_use(name and name.encode()) == 0)
