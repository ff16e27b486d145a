"""Pictures that are no radiology images, synthetic ones and crops of photographs: what the head learns to turn away."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

SIZE = 288
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


def nonradiographs(count: int, seed: int) -> list[NDArray[np.uint8]]:
    """``count`` pictures (288, 288, 3) u8, of all the kinds below in turn, a good third of them without colour."""
    rng = np.random.default_rng(seed)
    photographs = [Image.open(_photograph(name)).convert("RGB") for name in PHOTOGRAPHS]

    def crop(rng: np.random.Generator) -> Image.Image:
        picture = photographs[int(rng.integers(len(photographs)))]
        share = rng.uniform(0.25, 1.0, 2)
        w, h = (np.array(picture.size) * share).astype(int).tolist()
        x, y = int(rng.integers(picture.width - w + 1)), int(rng.integers(picture.height - h + 1))
        picture = picture.crop((x, y, x + w, y + h)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else picture

    makers = (_blank, _noise, _smooth_noise, _gradient, _shapes, _leaves, _leaves, _page, _stripes, *[crop] * 9)
    out = []
    for i in range(count):
        picture = makers[i % len(makers)](rng)
        if rng.random() < 0.4:
            picture = picture.convert("L")
        out.append(np.asarray(picture.convert("RGB")))
    return out


def _photograph(name: str) -> Path:
    import skimage.data

    return Path(skimage.data.__file__).parent / name


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    r, g, b = rng.integers(0, 256, 3).tolist()
    return r, g, b


def _blank(rng: np.random.Generator) -> Image.Image:
    return Image.new("RGB", (SIZE, SIZE), _colour(rng))


def _noise(rng: np.random.Generator) -> Image.Image:
    cell = int(rng.choice([1, 2, 4, 8, 32]))
    small = rng.integers(0, 256, (SIZE // cell + 1, SIZE // cell + 1, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((SIZE, SIZE), Image.Resampling.NEAREST)


def _smooth_noise(rng: np.random.Generator) -> Image.Image:
    """Noise with a 1/f spectrum, as clouds and landscapes have."""
    f = np.hypot(*np.meshgrid(np.fft.fftfreq(SIZE), np.fft.fftfreq(SIZE))) + 1 / SIZE
    planes = np.fft.ifft2(np.fft.fft2(rng.normal(size=(3, SIZE, SIZE))) / f ** rng.uniform(0.7, 1.6)).real
    planes = 0.6 * planes[:1] + 0.4 * planes
    low, high = np.percentile(planes, [1, 99])
    return Image.fromarray((np.clip((planes - low) / (high - low), 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0))


def _gradient(rng: np.random.Generator) -> Image.Image:
    ends = rng.integers(0, 256, (2, 3))
    ramp = np.linspace(0, 1, SIZE)[:, None, None] * np.ones((1, SIZE, 1))
    picture = Image.fromarray((ends[0] + ramp * (ends[1] - ends[0])).astype(np.uint8))
    return picture.rotate(float(rng.uniform(0, 360)), fillcolor=_colour(rng))


def _shapes(rng: np.random.Generator) -> Image.Image:
    picture = _blank(rng)
    draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(1, 12))):
        x, y, w, h = rng.integers(0, SIZE, 4).tolist()
        shape = (draw.ellipse, draw.rectangle)[int(rng.integers(2))]
        shape((x, y, x + w // 2 + 1, y + h // 2 + 1), fill=_colour(rng), outline=_colour(rng))
    return picture


def _leaves(rng: np.random.Generator) -> Image.Image:
    """Dead leaves (Lee, Mumford, Huang 2001): textured discs that hide each other, with the statistics of photographs."""
    picture = Image.new("RGB", (SIZE, SIZE), _colour(rng))
    draw = ImageDraw.Draw(picture)
    base = rng.integers(0, 256, 3)
    for _ in range(int(rng.integers(150, 700))):
        radius = min(4 * (1 - rng.random()) ** -0.7, 110)
        x, y = rng.uniform(-20, SIZE + 20, 2)
        stretch = rng.uniform(0.4, 1.0)
        fill = tuple(np.clip(base * 0.3 + rng.integers(0, 256, 3) * 0.7 * rng.uniform(0.4, 1.3), 0, 255).astype(int).tolist())
        box = (x - radius, y - radius * stretch, x + radius, y + radius * stretch)
        (draw.ellipse if rng.random() < 0.7 else draw.rectangle)(box, fill=fill)
    light = np.asarray(_smooth_noise(rng).convert("L"), dtype=np.float32)[..., None] / 255
    texture = rng.normal(0, rng.uniform(0, 18), (SIZE, SIZE, 1))
    pixels = np.asarray(picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 2)))), dtype=np.float32)
    return Image.fromarray(np.clip(pixels * (0.5 + light) + texture, 0, 255).astype(np.uint8))


def _page(rng: np.random.Generator) -> Image.Image:
    paper, ink = sorted([_colour(rng), _colour(rng)], key=sum, reverse=rng.random() < 0.8)
    picture = Image.new("RGB", (SIZE, SIZE), paper)
    draw = ImageDraw.Draw(picture)
    for y in range(int(rng.integers(5, 25)), SIZE - 10, int(rng.integers(11, 24))):
        words = "".join(chr(int(c)) for c in rng.integers(97, 123, int(rng.integers(10, 50))))
        draw.text((int(rng.integers(4, 30)), y), " ".join(words[i : i + 5] for i in range(0, len(words), 5)), fill=ink)
    return picture


def _stripes(rng: np.random.Generator) -> Image.Image:
    x, y = np.meshgrid(np.arange(SIZE), np.arange(SIZE))
    wave = np.sin((x * rng.normal() + y * rng.normal()) * rng.uniform(0.02, 0.6))[..., None]
    a, b = rng.integers(0, 256, (2, 3))
    return Image.fromarray((a + (b - a) * (wave if rng.random() < 0.5 else np.sign(wave)) / 2 + (b - a) / 2).clip(0, 255).astype(np.uint8))
