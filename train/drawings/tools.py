"""What the drawings share: colours, noise, light, outlines, strokes and words."""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIZE = 288
Rng = np.random.Generator
Floats = NDArray[np.float64]
Colour = tuple[int, ...]
Point = tuple[float, float]

FREQUENCY = np.hypot(np.fft.fftfreq(SIZE)[:, None], np.fft.rfftfreq(SIZE)) + 1 / SIZE
V, U = np.mgrid[0:SIZE, 0:SIZE] / (SIZE / 2) - 1  # rows and columns, -1 to 1


def colour(rng: Rng) -> Colour:
    return tuple(rng.integers(0, 256, 3).tolist())


def fractal(rng: Rng, power: float) -> Floats:
    """(S, S), 0 to 1: noise whose spectrum falls with this power of the frequency, as those of clouds and ground do."""
    drawn = rng.normal(size=(2, *FREQUENCY.shape))
    plane = np.fft.irfft2((drawn[0] + 1j * drawn[1]) / FREQUENCY**power, (SIZE, SIZE))
    low, high = np.percentile(plane, [1, 99])
    return np.asarray(np.clip((plane - low) / (high - low), 0, 1))


def lit(height: Floats, rng: Rng, depth: float) -> Floats:
    """(S, S), 0 to 1: a surface under a lamp that stands aside (Lambert)."""
    down, right = np.gradient(height * depth)
    turn, tilt = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, 1.2)
    lamp = np.array([np.cos(turn) * np.sin(tilt), np.sin(turn) * np.sin(tilt), np.cos(tilt)])
    return np.asarray(np.clip((lamp[2] - lamp[0] * right - lamp[1] * down) / np.sqrt(1 + right**2 + down**2), 0, 1))


def between(level: Floats, dark: ArrayLike, light: ArrayLike) -> Floats:
    """(S, S) -> (S, S, 3), from one colour (0 to 1) to another."""
    return np.asarray(np.array(dark) + level[..., None] * (np.array(light) - np.array(dark)))


def image(values: Floats) -> Image.Image:
    """(S, S) or (S, S, 3), 0 to 1."""
    return Image.fromarray((np.clip(values, 0, 1) * 255).astype(np.uint8))


def values(picture: Image.Image) -> Floats:
    return np.asarray(picture, np.float64) / 255


def words(rng: Rng, letters: int) -> str:
    """Words of random letters, some of them numbers."""
    words: list[str] = []
    while sum(map(len, words)) < letters:
        first, count = (48, 10) if rng.random() < 0.1 else (65, 26) if rng.random() < 0.1 else (97, 26)
        words.append("".join(chr(first + int(c)) for c in rng.integers(0, count, int(rng.integers(1, 10)))))
    return " ".join(words)


def font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)  # Pillow's own: the same on every machine


def outline(rng: Rng, rough: float) -> list[Point]:
    """A closed smooth shape around the middle, in pixels."""
    turn = np.linspace(0, 2 * np.pi, 90, endpoint=False)
    radius = np.ones(90)
    for k in range(2, 9):
        radius += rng.normal(0, rough / k) * np.cos(k * turn + rng.uniform(0, 2 * np.pi))
    radius *= SIZE * rng.uniform(0.3, 0.5) / radius.max()
    wide, high = rng.uniform(0.5, 1, 2)
    return [(SIZE / 2 + float(r * wide * np.cos(t)), SIZE / 2 + float(r * high * np.sin(t))) for r, t in zip(radius, turn, strict=True)]


def shifted(points: list[Point], rng: Rng, scale: float) -> list[Point]:
    dx, dy = rng.uniform(-0.3, 0.3, 2) * SIZE
    return [(SIZE / 2 + (x - SIZE / 2) * scale + dx, SIZE / 2 + (y - SIZE / 2) * scale + dy) for x, y in points]


def growth(rng: Rng, start: Point, angle: float, width: float, step: float, bend: float, fork: float) -> list[tuple[Point, Point, float]]:
    """(from, to, width) of pieces that wander, taper and fork: wood, roots, veins."""
    pieces, open_ends = list[tuple[Point, Point, float]](), [(start, angle, width)]
    while open_ends and len(pieces) < 1500:
        at, heading, wide = open_ends.pop()
        while wide > 0.7:
            heading += rng.normal(0, bend)
            to = (at[0] + step * np.cos(heading), at[1] + step * np.sin(heading))
            pieces.append((at, to, wide))
            at, wide = to, wide * rng.uniform(0.93, 0.995)
            if rng.random() < fork:
                open_ends.append((at, heading + rng.choice([-1, 1]) * rng.uniform(0.35, 1.1), wide * rng.uniform(0.4, 0.8)))
            if not -40 < at[0] < SIZE + 40 or not -40 < at[1] < SIZE + 40:
                break
    return pieces


def stroked(pieces: list[tuple[Point, Point, float]], blur: float) -> Floats:
    layer = Image.new("L", (SIZE, SIZE))
    draw = ImageDraw.Draw(layer)
    for start, end, width in pieces:
        draw.line((*start, *end), fill=255, width=max(1, round(width)))
        draw.ellipse((end[0] - width / 2, end[1] - width / 2, end[0] + width / 2, end[1] + width / 2), fill=255)
    return values(layer.filter(ImageFilter.GaussianBlur(blur)))


def spotted(rng: Rng, count: int, low: float, high: float) -> Floats:
    """(S, S), 0 to 1: soft round spots of these radii (in half sides)."""
    level = np.zeros((SIZE, SIZE))
    for _ in range(count):
        x, y, radius, stretch = *rng.uniform(-1, 1, 2), rng.uniform(low, high), rng.uniform(0.6, 1.6)
        level = np.maximum(level, rng.uniform(0.5, 1) * np.clip(1.5 - 1.5 * ((U - x) ** 2 * stretch + (V - y) ** 2) / radius**2, 0, 1))
    return level
