"""Which pictures are one picture: signatures that outlast another size, JPEG, window or annotation. No torch.

A signature says of 16 x 16 places of a picture whether it gets brighter to the right: 256 bits, of which 16 may differ. Of 64 bits, 206
pairs of Kermany's 2,563 chest films had all in common; of 256, four pairs are taken for one. What is found again, and what is not (a crop,
a border), stands in docs/tried/train-finding.md.
"""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pmclip_deploy.atomic import write, write_errors
from pmclip_deploy.bundle.names import SIGNATURES
from pmclip_deploy.errors import BundleError, PmclipError
from pmclip_deploy.train.datasets.pictures import Place, picture_of

SIDE = 16
DIFFER = 16  # bits, of 256, at most, between two pictures that are one
BLOCK = 512  # rows that are compared at a time


def signature(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W) or (H, W, 3) u8 -> (32,) u8."""
    image = Image.fromarray(np.ascontiguousarray(pixels)).convert("L")
    small = np.asarray(image.resize((SIDE + 1, SIDE), Image.Resampling.BOX), np.int16)
    return np.packbits(small[:, 1:] > small[:, :-1])


def pairs_alike(signatures: NDArray[np.uint8]) -> list[tuple[int, int]]:
    """The pairs (i, j), i < j, of rows of (N, 32) that are one picture."""
    bits = _signs(signatures)
    blocks = ((start, np.argwhere(_close(bits[start : start + BLOCK], bits))) for start in range(0, len(bits), BLOCK))
    return [(start + int(i), int(j)) for start, block in blocks for i, j in block if start + i < j]


def are_in(signatures: NDArray[np.uint8], others: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """(N,) of (N, 32) and (M, 32): whether each is one picture with any of the others."""
    bits, theirs = _signs(signatures), _signs(others)
    found = [_close(bits[start : start + BLOCK], theirs).any(axis=1) for start in range(0, len(bits), BLOCK)]
    return np.concatenate(found) if found and len(others) else np.zeros(len(signatures), bool)


def write_signatures(folder: Path, pictures: Iterable[Place | NDArray[np.uint8]]) -> None:
    """SIGNATURES of a checkpoint: signatures of the pictures that its image tower learned from, so that none of them validates a finding.

    For `train clip` and `train vqa`, when they end: what stands there is added to. A checkpoint that is made from this one takes the file
    over (save_checkpoint), and so does its bundle (`export`). Pictures that cannot be read are left out.
    Raises UsageError.
    """
    rows = {row.tobytes() for row in read_signatures(folder)} if (folder / SIGNATURES).is_file() else set[bytes]()
    for picture in pictures:
        try:
            rows.add(signature(picture if isinstance(picture, np.ndarray) else picture_of(picture).pixels).tobytes())
        except PmclipError:
            continue
    content = io.BytesIO()
    np.save(content, np.frombuffer(b"".join(sorted(rows)), np.uint8).reshape(-1, SIDE * SIDE // 8))
    with write_errors(f"{folder / SIGNATURES}:", "make room and go on with --resume"):
        write(folder / SIGNATURES, content.getvalue())


def read_signatures(folder: Path) -> NDArray[np.uint8]:
    """(M, 32). Raises BundleError."""
    try:
        rows: NDArray[Any] = np.load(folder / SIGNATURES, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BundleError(f"{folder / SIGNATURES}: cannot be read", "copy the bundle again") from error
    if rows.ndim != 2 or rows.shape[1] != SIDE * SIDE // 8 or rows.dtype != np.uint8:
        raise BundleError(f"{folder / SIGNATURES}: holds no signatures of pictures", "export the bundle again")
    return rows


def joined(count: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """The least member of each item's group, where pairs join groups."""
    parent = list(range(count))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for i, j in pairs:
        a, b = sorted((root(i), root(j)))
        parent[b] = a
    return [root(i) for i in range(count)]


def chained(keys: Sequence[object]) -> list[tuple[int, int]]:
    """Pairs that join all rows of one key; None is no key."""
    first: dict[object, int] = {}
    return [(first.setdefault(key, i), i) for i, key in enumerate(keys) if key is not None]


def _signs(signatures: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(N, 32) u8 -> (N, 256) of -1 and 1, whose products count the bits that agree."""
    return np.unpackbits(signatures, axis=1).astype(np.float32) * 2 - 1


def _close(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.bool_]:
    return np.asarray(a @ b.T >= SIDE * SIDE - 2 * DIFFER)
