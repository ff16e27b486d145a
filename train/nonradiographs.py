"""Pictures that are no radiology images: drawings and crops of photographs, grey, bordered, blurred, what the head learns to turn away.

Photographs come with scikit-image, and from a folder where one is given. Debian has more, which need no installation:

    apt-get download gcompris-qt-data gnome-control-center-data lomiri-wallpapers-16.04 palapeli-data ukui-wallpapers
    for file in *.deb; do dpkg-deb --extract $file photographs; done
"""

import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps

from pmclip_deploy.errors import InputError
from pmclip_deploy.train.drawings import DRAWN, SIZE

Rng = np.random.Generator

# Photographs and micrographs that scikit-image ships (public domain or CC0). Its others are kept for tests: TEST_PHOTOGRAPHS.
PHOTOGRAPHS = [
    "astronaut.png",
    "brick.png",
    "clock_motion.png",
    "coins.png",
    "hubble_deep_field.jpg",
    "motorcycle_left.png",
    "rocket.jpg",
    "text.png",
    "horse.png",
    "ihc.png",
    "color.png",
]
TEST_PHOTOGRAPHS = ["camera.png", "chelsea.png", "coffee.png", "grass.png", "gravel.png", "page.png", "moon.png", "cell.png"]
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".pgm", ".ppm"}
LARGEST, LEAST = 640, 96  # sides of a photograph: what is kept of it, and what it must have
ALIKE = 0.97  # correlation of two photographs' thumbnails, from which on the second adds nothing
BORDERS = 0.65  # most of a side that a border takes


def nonradiographs(count: int, seed: int, photographs: Sequence[Image.Image] = ()) -> list[NDArray[np.uint8]]:
    """``count`` pictures (288, 288, 3) u8: drawings of all kinds in turn, then as many crops of photographs, each changed as files are.

    ``photographs`` add to scikit-image's. The pictures follow from the seed and from what is given.
    """
    rng = np.random.default_rng(seed)
    files = [*(Image.open(_shipped(name)).convert("RGB") for name in PHOTOGRAPHS), *photographs]
    kinds = list(DRAWN.values())

    def made(i: int) -> Image.Image:
        if i % 2:
            return _crop(files[int(rng.integers(len(files)))], rng, 0.2)
        drawn = kinds[i // 2 % len(kinds)](rng)
        return _crop(drawn, rng, 0.3) if rng.random() < 0.3 else drawn

    return [np.asarray(changed(made(i), rng).convert("RGB")) for i in range(count)]


Photographs = tuple[list[Image.Image], str | None]


def photographs_from_folder(folder: Path | None) -> Photographs:
    """(the photographs of a folder and of those within, at most 640 px a side, sha256 of their pixels); none of None. Raises InputError.

    Those that are smaller than an icon are left out, and of several that look alike all but the first.
    """
    if folder is None:
        return [], None
    kept, seen = list[Image.Image](), list[NDArray[np.float64]]()
    for data in (data for path in sorted(folder.rglob("*")) for data in _files(path)):
        try:
            with Image.open(data) as opened:
                opened.draft("RGB", (2 * LARGEST, 2 * LARGEST))
                picture = Image.alpha_composite(Image.new("RGBA", opened.size, "white"), opened.convert("RGBA")).convert("RGB")
        except (OSError, ValueError, Image.DecompressionBombError):
            continue  # no picture after all; what was read is in the hash
        if min(picture.size) < LEAST:
            continue
        picture.thumbnail((LARGEST, LARGEST))
        small = np.asarray(picture.resize((16, 16), Image.Resampling.BOX).convert("L"), np.float64).ravel()
        small = (small - small.mean()) / (np.linalg.norm(small - small.mean()) + 1e-6)
        if all(float(small @ other) < ALIKE for other in seen):
            kept.append(picture)
            seen.append(small)
    if not kept:
        raise InputError(f"{folder}: holds no photographs", f"give a folder with JPEG or PNG files of {LEAST} px or more")
    return kept, hashlib.sha256(b"".join(picture.tobytes() for picture in kept)).hexdigest()


def _files(path: Path) -> Iterator[Path | io.BytesIO]:
    """The picture itself, or the WebP pictures in a Qt resource file, as gcompris has them (RIFF: its length stands after the name)."""
    if path.suffix.lower() in SUFFIXES:
        yield path
    elif path.suffix == ".rcc":
        content = path.read_bytes()
        for found in re.finditer(rb"RIFF(....)WEBP", content, re.DOTALL):
            yield io.BytesIO(content[found.start() : found.start() + 8 + int.from_bytes(found[1], "little")])


def changed(picture: Image.Image, rng: Rng) -> Image.Image:
    """As it may come: without colour in half, inverted, dim or flat, shadowed at the corners, then as ``filed`` has it."""
    if rng.random() < 0.55:
        picture = picture.convert("L")
    if rng.random() < 0.06:
        picture = ImageOps.invert(picture)
    if rng.random() < 0.5:
        flat = np.asarray(picture, np.float32)
        gamma, gain, shift = np.exp(rng.uniform(-0.6, 0.6)), rng.uniform(0.25, 1.2), rng.uniform(-30, 60)
        picture = Image.fromarray(np.clip((flat / 255) ** gamma * 255 * gain + shift, 0, 255).astype(np.uint8))
    if rng.random() < 0.12:
        down, right = np.mgrid[0 : picture.height, 0 : picture.width] / np.array(picture.size[::-1]).reshape(2, 1, 1) - 0.5
        shade = (
            np.clip(rng.uniform(1.1, 1.6) - rng.uniform(1, 2.5) * np.hypot(down, right), 0, 1)
            if rng.random() < 0.6
            else np.hypot(down, right) < 0.5
        )
        pixels = np.asarray(picture, np.float32)
        picture = Image.fromarray((pixels * (shade if pixels.ndim == 2 else shade[..., None])).astype(np.uint8))
    return filed(picture, rng)


def filed(picture: Image.Image, rng: Rng) -> Image.Image:
    """What happens to pictures of every kind, radiology too: resampling, noise, a border, JPEG. The size stays."""
    size = picture.size
    if rng.random() < 0.25:
        small = [max(16, round(side * s)) for side, s in zip(size, np.repeat(rng.uniform(0.15, 0.7), 2), strict=True)]
        picture = picture.resize((small[0], small[1]), Image.Resampling.BOX).resize(size, Image.Resampling.BICUBIC)
    elif rng.random() < 0.1:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 3)))
    if rng.random() < 0.2:
        pixels = np.asarray(picture, np.float32)
        picture = Image.fromarray(np.clip(pixels + rng.normal(0, rng.uniform(1, 20), pixels.shape), 0, 255).astype(np.uint8))
    if rng.random() < 0.45:
        picture = _bordered(picture, rng)
    if rng.random() < 0.25:
        picture.save(packed := io.BytesIO(), "JPEG", quality=int(rng.integers(25, 90)))
        picture = Image.open(packed).convert(picture.mode)
    return picture


def _bordered(picture: Image.Image, rng: Rng) -> Image.Image:
    """Black in most, white or grey in some; the same on all sides, or as a picture stands in another's shape."""
    level = int(rng.choice([0, 0, 0, 0, int(rng.integers(0, 40)), 255]))
    share = rng.uniform(0.03, BORDERS, 2) * (rng.choice([[1, 1], [1, 0], [0, 1]], p=[0.7, 0.15, 0.15]))
    if rng.random() < 0.6 and share.all():
        share[:] = share[0]
    w, h = (max(8, round(side * (1 - s))) for side, s in zip(picture.size, share, strict=True))
    out = Image.new(picture.mode, picture.size, level if picture.mode == "L" else (level, level, level))
    x, y = picture.width - w, picture.height - h
    at = (x // 2, y // 2) if rng.random() < 0.75 else (int(rng.integers(x + 1)), int(rng.integers(y + 1)))
    out.paste(picture.resize((w, h), Image.Resampling.BICUBIC), at)
    return out


def _crop(picture: Image.Image, rng: Rng, least: float) -> Image.Image:
    share = rng.uniform(least, 1.0) * rng.uniform(0.75, 1.0, 2)
    w, h = (np.array(picture.size) * share).astype(int).tolist()
    x, y = int(rng.integers(picture.width - w + 1)), int(rng.integers(picture.height - h + 1))
    if rng.random() < 0.3:
        x, y, w, h = 0, 0, *picture.size
    cut = picture.crop((x, y, x + w, y + h)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else cut


def _shipped(name: str) -> Path:
    import skimage.data

    return Path(skimage.data.__file__).parent / name
