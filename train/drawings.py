"""Drawn pictures that are no radiology images, by kind: what photographs, documents and other clinics' pictures look like, from a seed.

Each function takes a generator and gives one picture (288 x 288, grey or RGB). None needs a file, so that training has them everywhere.
"""

from collections.abc import Callable
from itertools import pairwise

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


# --- tools ----------------------------------------------------------------------------------------------------------------------


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


def _text(rng: Rng, letters: int) -> str:
    """Words of random letters, some of them numbers."""
    words: list[str] = []
    while sum(map(len, words)) < letters:
        first, count = (48, 10) if rng.random() < 0.1 else (65, 26) if rng.random() < 0.1 else (97, 26)
        words.append("".join(chr(first + int(c)) for c in rng.integers(0, count, int(rng.integers(1, 10)))))
    return " ".join(words)


def _font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)  # Pillow's own: the same on every machine


def _outline(rng: Rng, rough: float) -> list[Point]:
    """A closed smooth shape around the middle, in pixels."""
    turn = np.linspace(0, 2 * np.pi, 90, endpoint=False)
    radius = np.ones(90)
    for k in range(2, 9):
        radius += rng.normal(0, rough / k) * np.cos(k * turn + rng.uniform(0, 2 * np.pi))
    radius *= SIZE * rng.uniform(0.3, 0.5) / radius.max()
    wide, high = rng.uniform(0.5, 1, 2)
    return [(SIZE / 2 + float(r * wide * np.cos(t)), SIZE / 2 + float(r * high * np.sin(t))) for r, t in zip(radius, turn, strict=True)]


def _shifted(points: list[Point], rng: Rng, scale: float) -> list[Point]:
    dx, dy = rng.uniform(-0.3, 0.3, 2) * SIZE
    return [(SIZE / 2 + (x - SIZE / 2) * scale + dx, SIZE / 2 + (y - SIZE / 2) * scale + dy) for x, y in points]


def _growth(rng: Rng, start: Point, angle: float, width: float, step: float, bend: float, fork: float) -> list[tuple[Point, Point, float]]:
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


def _mask(pieces: list[tuple[Point, Point, float]], blur: float) -> Floats:
    layer = Image.new("L", (SIZE, SIZE))
    draw = ImageDraw.Draw(layer)
    for start, end, width in pieces:
        draw.line((*start, *end), fill=255, width=max(1, round(width)))
        draw.ellipse((end[0] - width / 2, end[1] - width / 2, end[0] + width / 2, end[1] + width / 2), fill=255)
    return values(layer.filter(ImageFilter.GaussianBlur(blur)))


def _spots(rng: Rng, count: int, low: float, high: float) -> Floats:
    """(S, S), 0 to 1: soft round spots of these radii (in half sides)."""
    level = np.zeros((SIZE, SIZE))
    for _ in range(count):
        x, y, radius, stretch = *rng.uniform(-1, 1, 2), rng.uniform(low, high), rng.uniform(0.6, 1.6)
        level = np.maximum(level, rng.uniform(0.5, 1) * np.clip(1.5 - 1.5 * ((U - x) ** 2 * stretch + (V - y) ** 2) / radius**2, 0, 1))
    return level


# --- patterns -------------------------------------------------------------------------------------------------------------------


def blank(rng: Rng) -> Image.Image:
    return Image.new("RGB", (SIZE, SIZE), colour(rng))


def noise(rng: Rng) -> Image.Image:
    cell = int(rng.choice([1, 2, 4, 8, 32]))
    small = rng.integers(0, 256, (SIZE // cell + 1, SIZE // cell + 1, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((SIZE, SIZE), Image.Resampling.NEAREST)


def clouds(rng: Rng) -> Image.Image:
    power = rng.uniform(0.7, 2.2)
    grey = fractal(rng, power)[..., None]
    return image(0.6 * grey + 0.4 * np.stack([fractal(rng, power) for _ in range(3)], -1))


def ramp(rng: Rng) -> Image.Image:
    level = U * rng.normal() + V * rng.normal() if rng.random() < 0.6 else np.hypot(U - rng.uniform(-1, 1), V - rng.uniform(-1, 1))
    return image(between((level - level.min()) / (np.ptp(level) + 1e-9), rng.random(3), rng.random(3)))


def stripes(rng: Rng) -> Image.Image:
    wave = np.sin((U * rng.normal() + V * rng.normal()) * rng.uniform(3, 90))
    if rng.random() < 0.4:
        wave *= np.sin((U * rng.normal() + V * rng.normal()) * rng.uniform(3, 90))
    return image(between((wave if rng.random() < 0.5 else np.sign(wave)) / 2 + 0.5, rng.random(3), rng.random(3)))


def shapes(rng: Rng) -> Image.Image:
    picture = blank(rng)
    draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(1, 12))):
        x, y, w, h = rng.integers(0, SIZE, 4).tolist()
        shape = (draw.ellipse, draw.rectangle)[int(rng.integers(2))]
        shape((x, y, x + w // 2 + 1, y + h // 2 + 1), fill=colour(rng), outline=colour(rng))
    return picture


def dead_leaves(rng: Rng) -> Image.Image:
    """Textured discs that hide each other (Lee, Mumford, Huang 2001), with the statistics of photographs."""
    picture = Image.new("RGB", (SIZE, SIZE), colour(rng))
    draw = ImageDraw.Draw(picture)
    base = rng.integers(0, 256, 3)
    for _ in range(int(rng.integers(150, 700))):
        radius = min(4 * (1 - rng.random()) ** -0.7, 110)
        (x, y), stretch = rng.uniform(-20, SIZE + 20, 2), rng.uniform(0.4, 1.0)
        fill = tuple(np.clip(base * 0.3 + rng.integers(0, 256, 3) * 0.7 * rng.uniform(0.4, 1.3), 0, 255).astype(int).tolist())
        box = (x - radius, y - radius * stretch, x + radius, y + radius * stretch)
        (draw.ellipse if rng.random() < 0.7 else draw.rectangle)(box, fill=fill)
    blurred = values(picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 2)))))
    return image(blurred * (0.5 + fractal(rng, 1.2)[..., None]) + rng.normal(0, rng.uniform(0, 0.07), (SIZE, SIZE, 1)))


def cells(rng: Rng) -> Image.Image:
    """What is nearest to scattered points: stones, cracked ground, scales, foam."""
    points = rng.uniform(-1.1, 1.1, (int(rng.integers(12, 160)), 2))
    first, second, owner = np.full((SIZE, SIZE), 9.0), np.full((SIZE, SIZE), 9.0), np.zeros((SIZE, SIZE), int)
    for i, (x, y) in enumerate(points):
        far = np.hypot(U - x, V - y)
        second = np.minimum(second, np.maximum(first, far))
        owner[far < first] = i
        first = np.minimum(first, far)
    stone = rng.uniform(0.3, 1, len(points))[owner] * np.clip((second - first) / second * rng.uniform(2, 12), 0, 1)
    return image(between(stone * (0.7 + 0.3 * fractal(rng, 1)), rng.random(3) * 0.4, rng.uniform(0.4, 1, 3)))


def ground(rng: Rng) -> Image.Image:
    """A rough surface in slanting light, in places with craters: sand, bark, walls, moons."""
    height = fractal(rng, rng.uniform(0.9, 2.0))
    for _ in range(int(rng.integers(0, 60)) if rng.random() < 0.4 else 0):
        (x, y), radius = rng.uniform(-1, 1, 2), 0.02 + 0.05 * rng.pareto(2.5)
        far = np.hypot(U - x, V - y) / radius
        height += radius * 3 * (np.clip(far**2 - 1, -1, 0) + 0.6 * np.exp(-((far - 1) ** 2) * 12))
    level = lit(height, rng, rng.uniform(8, 60)) * (0.8 + 0.2 * fractal(rng, 1))
    return image(between(level, rng.random(3) * 0.2, rng.uniform(0.5, 1, 3)))


def weave(rng: Rng) -> Image.Image:
    """Cloth, bricks and tiles."""
    x, y = U * rng.uniform(5, 40), V * rng.uniform(5, 40)
    if rng.random() < 0.5:
        level = np.where((np.floor(x) + np.floor(y)) % 2 == 0, np.abs(np.sin(np.pi * x)), np.abs(np.sin(np.pi * y)))
    else:
        x = x + (np.floor(y) % 2) * 0.5
        level = np.minimum(np.minimum(x % 1, y % 1) * 8, 1) * (0.6 + 0.4 * np.sin(np.floor(x) * 12.9 + np.floor(y) * 78.2))
    return image(between(level * (0.7 + 0.3 * fractal(rng, 1.2)), rng.random(3) * 0.5, rng.uniform(0.4, 1, 3)))


# --- paper and screens ----------------------------------------------------------------------------------------------------------


def page(rng: Rng) -> Image.Image:
    """Columns of text with headings, rules, tables and boxes for figures."""
    paper, ink = sorted([rng.uniform(0.75, 1), rng.uniform(0, 0.35)], reverse=rng.random() < 0.85)
    picture = Image.new("RGB", (SIZE, SIZE), tuple(int(255 * paper * c) for c in rng.uniform(0.93, 1, 3)))
    draw, fill, columns = ImageDraw.Draw(picture), (int(255 * ink),) * 3, int(rng.integers(1, 4))
    size, margin = rng.uniform(6, 16), rng.uniform(4, 30)
    wide = (SIZE - 2 * margin) / columns
    for column in range(columns):
        left, y = margin + column * wide, margin
        while y < SIZE - margin:
            kind = rng.random()
            if kind < 0.06:
                draw.text((left, y), _text(rng, 8), fill=fill, font=_font(size * 1.7))
                y += size * 2.4
            elif kind < 0.1:
                high = rng.uniform(20, 70)
                draw.rectangle((left, y, left + wide - 8, y + high), outline=fill, fill=colour(rng) if rng.random() < 0.5 else None)
                y += high + 6
            elif kind < 0.14:
                for _ in range(int(rng.integers(2, 7))):
                    draw.line((left, y, left + wide - 8, y), fill=fill)
                    for cell in range(3):
                        draw.text((left + cell * wide / 3, y + 1), _text(rng, 3), fill=fill, font=_font(size * 0.8))
                    y += size * 1.3
            else:
                draw.text((left, y), _text(rng, int(1.7 * wide / size)), fill=fill, font=_font(size))
                y += size * rng.choice([1.2, 1.3, 2.2], p=[0.5, 0.4, 0.1])
        draw.rectangle((left + wide - 7, 0, left + wide, SIZE), fill=picture.getpixel((0, 0)))
    return image(values(picture) * (0.7 + 0.4 * fractal(rng, 2.3)[..., None])) if rng.random() < 0.3 else picture


def screen(rng: Rng) -> Image.Image:
    """Windows, bars, buttons, lists and lines of source, light or dark."""
    dark = rng.random() < 0.5
    picture = Image.new("RGB", (SIZE, SIZE), colour(rng))
    draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(1, 5))):
        (x, y), (w, h) = rng.uniform(-30, 150, 2), rng.uniform(90, 300, 2)
        back = int(rng.integers(10, 60) if dark else rng.integers(215, 256))
        draw.rectangle((x, y, x + w, y + h), fill=(back, back, back), outline=colour(rng))
        draw.rectangle((x, y, x + w, y + 13), fill=colour(rng))
        size, line = rng.uniform(7, 13), y + 18
        while line < y + h - size:
            indent = rng.integers(0, 5) * size
            tone = tuple(int(c) for c in (rng.integers(150, 256, 3) if dark else rng.integers(0, 130, 3)))
            if rng.random() < 0.12:
                draw.rounded_rectangle((x + 6 + indent, line, x + 6 + indent + 5 * size, line + size * 1.3), 3, fill=colour(rng))
            else:
                draw.text((x + 6 + indent, line), _text(rng, int(rng.uniform(0.2, 1) * (w - indent) / size)), fill=tone, font=_font(size))
            line += size * 1.45
    return picture


def chart(rng: Rng) -> Image.Image:
    """Bars, lines, points, shares or a table of colours, with axes and words."""
    picture = Image.new(
        "RGB", (SIZE, SIZE), tuple(int(c) for c in (rng.integers(235, 256, 3) if rng.random() < 0.75 else rng.integers(0, 50, 3)))
    )
    draw, ink = ImageDraw.Draw(picture), (20, 20, 20) if sum(picture.getpixel((0, 0))) > 380 else (220, 220, 220)  # type: ignore[arg-type]
    n, kind, base = int(rng.integers(3, 30)), int(rng.integers(5)), 255
    draw.text((rng.uniform(20, 120), 6), _text(rng, 16), fill=ink, font=_font(rng.uniform(10, 18)))
    x, y = np.linspace(45, 270, n), base - rng.uniform(0, 210, n)
    if kind == 0:
        ends = np.cumsum([0, *rng.dirichlet(np.ones(min(n, 9)))]) * 360
        for start, end in pairwise(ends):
            draw.pieslice((50, 45, 250, 245), start, end, fill=colour(rng), outline=ink)
        return picture
    if kind == 4:
        side = 220 / n
        for i in range(n * n):
            level, at = rng.random(), (40 + i % n * side, 30 + i // n * side)
            draw.rectangle((*at, at[0] + side, at[1] + side), fill=(int(255 * level), int(120 * level), int(255 * (1 - level))))
    for _ in range(1 if kind == 1 else int(rng.integers(1, 5))):
        tone = colour(rng)
        y = base - rng.uniform(0, 210, n) if kind != 2 else np.clip(150 + np.cumsum(rng.normal(0, 18, n)), 30, base)
        if kind == 1:
            for a, b in zip(x, y, strict=True):
                draw.rectangle((a - 90 / n, b, a + 90 / n, base), fill=tone, outline=ink)
        elif kind == 2:
            draw.line([(float(a), float(b)) for a, b in zip(x, y, strict=True)], fill=tone, width=int(rng.integers(1, 4)))
        elif kind == 3:
            for a, b in zip(rng.uniform(45, 270, 4 * n), base - rng.uniform(0, 210, 4 * n), strict=True):
                draw.ellipse((a - 2, b - 2, a + 2, b + 2), fill=tone)
    draw.line((36, 25, 36, base, 280, base), fill=ink, width=int(rng.integers(1, 3)))
    for i in range(6):
        draw.text((8, base - 6 - 40 * i), str(i * int(rng.integers(1, 50))), fill=ink, font=_font(9))
        draw.text((40 + 40 * i, base + 4), _text(rng, 3), fill=ink, font=_font(9))
    return picture


def trace(rng: Rng) -> Image.Image:
    """Curves of monitors and strips of squared paper: heart, breath, brain."""
    dark = rng.random() < 0.3
    paper = (5, 10, 8) if dark else tuple(int(c) for c in rng.integers([240, 225, 220], 256))
    picture = Image.new("RGB", (SIZE, SIZE), paper)
    draw, step, tone = ImageDraw.Draw(picture), rng.uniform(5, 12), colour(rng)
    if rng.random() < 0.85:
        for i in range(int(SIZE / step) + 1):
            line = tuple(int(0.75 * p + 0.25 * c * (1.4 if i % 5 == 0 else 0.7)) for p, c in zip(paper, tone, strict=True))
            draw.line((i * step, 0, i * step, SIZE), fill=line)
            draw.line((0, i * step, SIZE, i * step), fill=line)
    rows, x = int(rng.integers(1, 13)), np.linspace(0, 1, 4 * SIZE)
    period, spike = rng.uniform(0.1, 0.4), rng.random() < 0.7
    for row in range(rows):
        phase = (x + rng.random()) % period / period
        wave = (
            rng.normal() * np.exp(-((phase - 0.5) ** 2) * 3000) + 0.2 * np.sin(2 * np.pi * phase)
            if spike
            else np.cumsum(rng.normal(0, 0.1, x.size))
        )
        wave = wave - wave.mean() + 0.12 * np.exp(-((phase - 0.75) ** 2) * 200)
        y = SIZE * (row + 0.5) / rows - wave / (np.abs(wave).max() + 1e-6) * SIZE / rows * 0.5
        ink = tuple(int(c) for c in (rng.integers(120, 256, 3) if dark else rng.integers(0, 90, 3)))
        draw.line([(float(a) * SIZE, float(b)) for a, b in zip(x, y, strict=True)], fill=ink)
        draw.text((3, SIZE * row / rows + 2), _text(rng, 2), fill=ink, font=_font(9))
    return picture


def plan(rng: Rng) -> Image.Image:
    """Maps: land and sea, borders, contour lines, streets and names."""
    height, sea = fractal(rng, rng.uniform(1.6, 2.6)), rng.uniform(0.2, 0.6)
    tones = rng.uniform(0.35, 1, (int(rng.integers(2, 12)), 3))
    land = tones[(height * len(tones) * rng.uniform(1, 2)).astype(int) % len(tones)]
    filled = np.where((height < sea)[..., None], rng.uniform([0.3, 0.5, 0.7], 1), land)
    lines = (height * rng.uniform(8, 30) % 1 < 0.07) | (np.abs(height - sea) < 0.006)
    filled[lines & (rng.random() < 0.7)] = rng.random(3) * 0.6
    picture = image(filled * (0.75 + 0.25 * lit(height, rng, 30)[..., None] if rng.random() < 0.4 else 1))
    draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(0, 9))):
        (x, y), angle = rng.uniform(0, SIZE, 2), rng.uniform(0, np.pi)
        ways = _growth(rng, (float(x), float(y)), angle, rng.uniform(1, 4), 12, 0.15, 0.02)
        for start, end, _ in ways[:60]:
            draw.line((*start, *end), fill=colour(rng) if rng.random() < 0.02 else (200, 80, 60), width=2)
    for _ in range(int(rng.integers(0, 14))):
        draw.text(tuple(rng.uniform(0, SIZE - 40, 2)), _text(rng, 6).title(), fill=(20, 20, 20), font=_font(rng.uniform(7, 14)))
    return picture


def logo(rng: Rng) -> Image.Image:
    """A sign: a few flat shapes and a word."""
    picture = Image.new("RGB", (SIZE, SIZE), (255, 255, 255) if rng.random() < 0.5 else colour(rng))
    draw = ImageDraw.Draw(picture)
    for scale in sorted(rng.uniform(0.2, 1.1, int(rng.integers(1, 5))), reverse=True):
        draw.polygon(
            [(SIZE / 2 + (x - SIZE / 2) * scale, SIZE / 2 + (y - SIZE / 2) * scale) for x, y in _outline(rng, 0.7)], fill=colour(rng)
        )
    if rng.random() < 0.7:
        draw.text((rng.uniform(10, 120), rng.uniform(10, 240)), _text(rng, 5).upper(), fill=colour(rng), font=_font(rng.uniform(18, 60)))
    return picture


def code(rng: Rng) -> Image.Image:
    """Bars or squares that machines read, and pixel art."""
    n, paper = int(rng.integers(8, 45)), np.ones((SIZE, SIZE))
    grid = rng.integers(0, 2, (1 if rng.random() < 0.4 else n, n)).astype(np.uint8) * 255
    margin = int(rng.integers(4, 70))
    side = SIZE - 2 * margin
    paper[margin : margin + side, margin : margin + side] = values(Image.fromarray(grid).resize((side, side), Image.Resampling.NEAREST))
    return image(between(paper, *(rng.random((2, 3)) if rng.random() < 0.3 else (np.zeros(3), np.ones(3)))))


# --- things ---------------------------------------------------------------------------------------------------------------------


def vessel(rng: Rng) -> Image.Image:
    """A bottle, bowl, fruit or ball on a plain ground: a profile that turns about its axis, with a pattern and a highlight."""
    ground = fractal(rng, 2.4)[..., None] * rng.uniform(0, 0.3) + rng.random(3) * rng.choice([0, 1, 0.5])
    if rng.random() < 0.3:
        ground = np.ones((SIZE, SIZE, 3)) * rng.uniform(0.85, 1)
    for _ in range(int(rng.integers(1, 5))):
        (cx, cy), scale = rng.uniform(-0.55, 0.55, 2), rng.uniform(0.25, 0.9)
        t = (V - cy) / scale
        profile = sum(rng.normal(0.15, 0.3) * np.cos(k * np.pi * t + rng.uniform(0, 6)) / (k + 1) for k in range(4)) + 0.35
        profile = np.clip(profile, 0.08, 0.8) if rng.random() < 0.6 else np.sqrt(np.clip(1 - t**2, 0, 1)) * rng.uniform(0.5, 1)
        across = (U - cx) / (scale * profile + 1e-6)
        inside = (np.abs(t) < 1) & (np.abs(across) < 1)
        facing = np.sqrt(np.clip(1 - across**2, 0, 1))
        light = rng.uniform(-0.9, 0.9)
        shade = np.clip(0.25 + 0.75 * (across * light + facing * np.sqrt(1 - light**2)), 0, 1)
        skin = rng.random(3) * (0.75 + 0.25 * fractal(rng, 1.2)[..., None])
        if rng.random() < 0.4:
            bands = np.sin(np.arcsin(np.clip(across, -1, 1)) * rng.integers(0, 12) + t * rng.uniform(0, 30)) > rng.uniform(-0.5, 0.8)
            skin = np.where(bands[..., None], skin, rng.random(3))
        gloss = np.exp(-((across - light) ** 2) * 60) * rng.uniform(0, 0.7)
        ground = np.where(inside[..., None], skin * shade[..., None] + gloss[..., None], ground)
    return image(ground)


def box(rng: Rng) -> Image.Image:
    """Blocks, books, furniture and buildings: sides of unlike brightness, some with windows."""
    picture = image(between(fractal(rng, 2), *(rng.random((2, 3)))) if rng.random() < 0.5 else np.ones((SIZE, SIZE, 3)) * rng.random(3))
    draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(1, 7))):
        (x, y), (w, h), (dx, dy) = rng.uniform(0, 200, 2), rng.uniform(30, 160, 2), rng.uniform(10, 70, 2) * rng.choice([-1, 1], 2)
        tone, rows = rng.integers(40, 256, 3), int(rng.integers(0, 9))
        sides = (
            (1.0, [(x, y), (x + w, y), (x + w, y + h), (x, y + h)]),
            (0.75, [(x, y), (x + dx, y - abs(dy)), (x + w + dx, y - abs(dy)), (x + w, y)]),
            (0.5, [(x + w, y), (x + w + dx, y - abs(dy)), (x + w + dx, y + h - abs(dy)), (x + w, y + h)]),
        )
        for light, corners in sides:
            draw.polygon(corners, fill=tuple(int(c * light) for c in tone), outline=(30, 30, 30) if rng.random() < 0.3 else None)
        for i in range(rows * rows):
            a, b = x + (i % rows + 0.25) * w / rows, y + (i // rows + 0.25) * h / rows
            draw.rectangle((a, b, a + w / rows / 2, b + h / rows / 2), fill=tuple(int(c * rng.choice([0.3, 1.3])) for c in tone))
    return image(values(picture) * (0.75 + 0.25 * fractal(rng, 1.2)[..., None]))


def cutout(rng: Rng) -> Image.Image:
    """Something cut out on white or black, drawn or photographed: a shape with parts, shaded within, animals and clip art."""
    picture = Image.new("RGB", (SIZE, SIZE), rng.choice(["white", "black"]))
    surface = between(lit(fractal(rng, 1.9), rng, rng.uniform(5, 40)), rng.random(3) * 0.5, rng.uniform(0.3, 1, 3))
    flat, edged = rng.random() < 0.4, rng.random() < 0.5
    body = _outline(rng, rng.uniform(0.2, 1.6))
    parts = [_shifted(_outline(rng, 0.8), rng, rng.uniform(0.12, 0.5)) for _ in range(int(rng.integers(0, 9)))]
    for i, points in enumerate([*parts[: len(parts) // 2], body, *parts[len(parts) // 2 :]]):
        mask = Image.new("L", (SIZE, SIZE))
        ImageDraw.Draw(mask).polygon(points, fill=255)
        mask = mask.filter(ImageFilter.GaussianBlur(0.7))
        thick = values(mask.filter(ImageFilter.GaussianBlur(14)))
        fill = np.ones((SIZE, SIZE, 3)) * rng.random(3) if flat else np.roll(surface, i * 41, axis=1) * rng.uniform(0.5, 1.3, 3)
        picture.paste(image(fill * (1 if flat else (0.25 + 0.85 * thick[..., None]))), mask=mask)
        if edged:
            ImageDraw.Draw(picture).line([*points, points[0]], fill=(15, 15, 15), width=int(rng.integers(1, 4)))
    return picture


def bokeh(rng: Rng) -> Image.Image:
    """Lights out of focus behind something sharp."""
    level = np.zeros((SIZE, SIZE, 3)) + rng.random(3) * 0.3 + 0.2 * fractal(rng, 2.2)[..., None]
    for _ in range(int(rng.integers(4, 40))):
        (x, y), radius = rng.uniform(-1, 1, 2), rng.uniform(0.04, 0.3)
        level += (np.hypot(U - x, V - y) < radius)[..., None] * rng.uniform(0.05, 0.5) * rng.random(3)
    picture = image(level).filter(ImageFilter.GaussianBlur(rng.uniform(0, 4)))
    if rng.random() < 0.6:
        thing = image(between(lit(fractal(rng, 1.6), rng, 25), rng.random(3) * 0.3, rng.uniform(0.4, 1, 3)))
        mask = Image.new("L", (SIZE, SIZE))
        ImageDraw.Draw(mask).polygon(_shifted(_outline(rng, 0.9), rng, rng.uniform(0.6, 1.3)), fill=255)
        picture.paste(thing, mask=mask)
    return picture


def view(rng: Rng) -> Image.Image:
    """Sky, hills behind hills, water or a field, and a sun or moon in some."""
    sky, horizon = rng.uniform(0.35, 1, 3), rng.uniform(-0.4, 0.5)
    tone = rng.uniform(0.1, 0.9, 3)
    out = between(np.clip(0.5 - V / 2 + 0.3 * fractal(rng, 1.9), 0, 1), np.clip(sky * 1.15, 0, 1), sky * 0.7)
    if rng.random() < 0.4:
        out += np.clip(1 - np.hypot(U - rng.uniform(-1, 1), V + rng.uniform(0, 1)) / rng.uniform(0.08, 0.5), 0, 1)[..., None] * 0.8
    count = int(rng.integers(1, 7))
    for i in range(count):
        top = (
            horizon
            + (1 - horizon) * i / count * 0.8
            + (fractal(rng, rng.uniform(1.1, 2.0))[int(rng.integers(SIZE))] - 0.5) * rng.uniform(0.1, 0.7)
        )
        near = (i + 1) / count
        hill = between(fractal(rng, rng.uniform(0.7, 1.4)), tone * (1 - 0.7 * near), tone * (1 - 0.4 * near) + 0.15)
        out = np.where((top[None] < V)[..., None], sky * (1 - near) * 0.7 + hill * (0.3 + 0.7 * near), out)
    if rng.random() < 0.3:  # water mirrors what is above
        line = int(SIZE * rng.uniform(0.5, 0.8))
        mirrored = out[2 * line - SIZE : line][::-1] if 2 * line > SIZE else out[:line][::-1][: SIZE - line]
        out[line : line + len(mirrored)] = mirrored * 0.7 + 0.1 * fractal(rng, 0.8)[: len(mirrored), :, None]
    return image(out)


def wood(rng: Rng) -> Image.Image:
    """Bare twigs, trunks, roots and coral before a plain or blurred ground."""
    pieces = []
    for _ in range(int(rng.integers(1, 6))):
        start, angle = (rng.uniform(0, SIZE), float(SIZE)), rng.uniform(-2.3, -0.8)
        if rng.random() < 0.35:
            start, angle = (rng.uniform(0, SIZE), rng.uniform(0, SIZE)), rng.uniform(0, 2 * np.pi)
        pieces += _growth(rng, start, angle, rng.uniform(3, 38), rng.uniform(5, 14), rng.uniform(0.05, 0.3), rng.uniform(0.04, 0.25))
    mask = _mask(pieces, rng.uniform(0.4, 2.5))
    round_side = values(Image.fromarray((mask * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(rng.uniform(2, 7))))
    bark = (0.3 + 0.7 * round_side) * (0.55 + 0.45 * fractal(rng, rng.uniform(0.6, 1.4)))
    behind = between(fractal(rng, rng.uniform(1.5, 3)), rng.random(3) * 0.5, rng.random(3))
    front = between(bark, rng.random(3) * 0.3, rng.uniform(0.3, 1, 3))
    return image(behind * rng.choice([0.1, 0.5, 1]) * (1 - mask[..., None]) + front * mask[..., None])


def leaf(rng: Rng) -> Image.Image:
    """Leaves, feathers and flowers: blades with a rib and veins, alone or around a middle."""
    out = between(fractal(rng, 2), rng.random(3) * 0.6, rng.random(3)) * rng.choice([0, 1])
    blades, turn, tone = int(rng.choice([1, 1, 2, 5, 8, 13])), rng.uniform(0, 6.3), rng.uniform(0.2, 1, 3)
    wide, veins = rng.uniform(0.15, 0.5) / (1 + blades / 8), rng.uniform(10, 40)
    for i in range(blades):
        angle = turn + i * 2 * np.pi / blades
        along, across = U * np.cos(angle) + V * np.sin(angle), V * np.cos(angle) - U * np.sin(angle)
        along = along + (0.8 if blades == 1 else 0)
        edge = wide * np.sin(np.pi * np.clip(along / (1.6 if blades == 1 else 0.85), 0, 1)) ** 0.7
        rib = np.exp(-((across / 0.012) ** 2)) + 0.35 * (np.sin((along + np.abs(across)) * veins * 2) > 0.9)
        level = np.clip(0.8 - 0.5 * np.abs(across) / (edge + 1e-6) + 0.25 * rib + 0.15 * fractal(rng, 1.2), 0, 1)
        out = np.where((np.abs(across) < edge)[..., None], level[..., None] * tone, out)
    if blades > 4:
        out = np.where(
            (np.hypot(U, V) < rng.uniform(0.1, 0.3))[..., None], values(cells(rng).convert("L"))[..., None] * rng.uniform(0.4, 1, 3), out
        )
    return image(out)


def section(rng: Rng) -> Image.Image:
    """Sawn trunks, halved fruit, pipes, plates and wheels: rings, spokes and a rim."""
    (cx, cy), stretch = rng.uniform(-0.15, 0.15, 2), rng.uniform(0.8, 1.2)
    x, y = (U - cx) * stretch, V - cy
    far = np.hypot(x, y) + rng.uniform(0, 0.12) * (fractal(rng, 2.4) - 0.5)
    turn, edge = np.arctan2(y, x), rng.uniform(0.45, 0.95)
    rings = 0.5 + 0.5 * np.sin(far / edge * rng.uniform(10, 120))
    spokes = np.abs(np.cos(turn * int(rng.integers(2, 9)) + rng.uniform(0, 3))) ** rng.uniform(0.2, 3)
    level = np.clip(rng.uniform(0, 0.6) * rings + rng.uniform(0, 0.6) * spokes + 0.3 * fractal(rng, 1.1), 0, 1)
    level = np.where(far > edge * rng.uniform(0.85, 0.98), rng.random(), level)
    level = np.where(far < edge * rng.uniform(0, 0.3), rng.random(), level)
    body = between(level, rng.random(3) * 0.5, rng.uniform(0.4, 1, 3))
    behind = np.zeros(3) if rng.random() < 0.5 else rng.random(3)
    return image(np.where((far < edge)[..., None], body, behind))


# --- people, and pictures of other clinics --------------------------------------------------------------------------------------


def face(rng: Rng) -> Image.Image:
    """A head from the front, in light from a side: sockets, nose, mouth, hair; close up in most."""
    scale, (cx, cy) = rng.uniform(0.55, 1.15), rng.uniform(-0.12, 0.12, 2)
    tilt = rng.normal(0, 0.12)
    x, y = (U - cx) * np.cos(tilt) + (V - cy) * np.sin(tilt), (V - cy) * np.cos(tilt) - (U - cx) * np.sin(tilt)
    x, y = x / scale, y / scale
    look, long = rng.normal(0, 0.08), rng.uniform(0.8, 1.0)

    def bump(at: float, down: float, wide: float, high: float) -> Floats:
        return np.asarray(np.exp(-(((x - look - at) / wide) ** 2) - ((y - down) / high) ** 2))

    oval = (x / 0.66) ** 2 + (y / long) ** 2
    apart, level = rng.uniform(0.22, 0.32), rng.uniform(-0.22, -0.08)
    height = np.sqrt(np.clip(1 - oval, 0, 1)) + 0.16 * bump(0, 0.05, 0.1, 0.22) + 0.05 * bump(0, 0.45, 0.2, 0.06)
    height = height + sum(0.05 * bump(side * 0.3, 0.22, 0.2, 0.2) - 0.13 * bump(side * apart, level, 0.15, 0.1) for side in (-1, 1))
    tone = np.array([0.95, 0.75, 0.62]) * rng.uniform(0.25, 1.05)
    skin = tone * (0.3 + 0.75 * lit(height, rng, 110 * scale) + 0.05 * fractal(rng, 1))[..., None]
    dark = rng.uniform(0.02, 0.35)
    smile, mouth = rng.normal(0, 0.3), rng.uniform(0.4, 0.52)
    lips = np.exp(-((((y - mouth) + smile * (x - look) ** 2) / rng.uniform(0.025, 0.07)) ** 2)) * (
        np.abs(x - look) < rng.uniform(0.16, 0.26)
    )
    for side in (-1, 1):
        open_eye = np.clip(1.4 - ((x - look - side * apart) / 0.11) ** 2 - ((y - level) / rng.uniform(0.025, 0.05)) ** 2, 0, 1)
        iris = np.hypot(x - look - side * apart, y - level) < 0.045
        skin = skin * (1 - open_eye[..., None]) + open_eye[..., None] * np.where(iris, dark * 0.5, 0.8)[..., None]
        brow = np.exp(-(((y - level + 0.11 + 0.3 * (np.abs(x - look) - apart) ** 2) / 0.025) ** 2)) * (
            np.abs(x - look - side * apart) < 0.15
        )
        skin = skin * (1 - 0.7 * brow[..., None])
    skin = skin * (1 - lips[..., None] * np.array([0.25, 0.5, 0.5]))
    if rng.random() < 0.25:  # beard
        skin = skin * (1 - 0.6 * ((y > 0.28) & (lips < 0.3)) * (0.5 + 0.5 * fractal(rng, 0.6)))[..., None]
    line = rng.uniform(-0.75, -0.42) + 0.25 * (fractal(rng, 2.2) - 0.5) + rng.uniform(-0.3, 0.5) * x**2
    hair = np.array([0.5, 0.35, 0.2]) * dark * 2.4 * (0.5 + np.roll(fractal(rng, 0.9), 3, 0))[..., None]
    behind = between(fractal(rng, rng.uniform(1.4, 2.6)), rng.random(3) * 0.6, rng.random(3))
    head = np.hypot(x / 0.75, (y + 0.1) / (long + 0.08)) < rng.uniform(0.95, 1.2)
    out = np.where(head[..., None] & ((y < line) | (oval > 0.97))[..., None] & (y < rng.uniform(0.1, 1))[..., None], hair, behind)
    out = np.where(((oval < 1) & (y > line))[..., None], skin, out)
    body = (y > long * 0.8) & (np.abs(x) < 0.3 + 1.5 * (y - long * 0.8)) & (oval > 1)
    out = np.where(body[..., None], rng.random(3) * (0.7 + 0.3 * fractal(rng, 1.3)[..., None]), out)
    small = int(rng.choice([22, 30, 48, 90, SIZE]))
    return image(out).resize((small, small), Image.Resampling.BOX).resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def skin(rng: Rng) -> Image.Image:
    """Skin close up: tone, grain, folds, spots and moles with a fading edge, hairs, in some a dermatoscope's round field."""
    tone = np.array([0.98, 0.76, 0.66]) * rng.uniform(0.3, 1.05)
    out = tone * (0.82 + 0.12 * fractal(rng, 1.8) + 0.12 * fractal(rng, rng.uniform(0.4, 1.0)))[..., None]
    if rng.random() < 0.4:
        out = out * (0.9 + 0.1 * np.sin((U * rng.normal() + V * rng.normal()) * rng.uniform(20, 90) + 8 * fractal(rng, 2)))[..., None]
    for _ in range(int(rng.choice([0, 1, 1, 1, 2, 6]))):
        (x, y), size, soft = rng.uniform(-0.4, 0.4, 2), rng.uniform(0.1, 0.75), rng.uniform(4, 40)
        ragged = np.hypot((U - x) * rng.uniform(0.7, 1.3), V - y) + rng.uniform(0, 0.5) * (fractal(rng, 2.1) - 0.5)
        amount = 1 / (1 + np.exp(np.clip((ragged - size) * soft, -60, 60)))
        pigment = (0.4 + 0.6 * fractal(rng, rng.uniform(0.8, 2)))[..., None] * rng.uniform([0.2, 0.4, 0.4], [0.75, 0.95, 0.9])
        out = out * (1 - amount[..., None] * pigment)
    picture = image(out)
    draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(0, 30)) if rng.random() < 0.5 else 0):
        hair = _growth(rng, tuple(rng.uniform(0, SIZE, 2)), rng.uniform(0, 6.3), rng.uniform(1, 2.5), 7, 0.06, 0)[:40]
        for start, end, width in hair:
            draw.line((*start, *end), fill=(45, 32, 26), width=max(1, round(width)))
    out = values(picture)
    return image(out * (np.hypot(U, V) < rng.uniform(0.85, 1.05))[..., None]) if rng.random() < 0.25 else image(out)


def fundus(rng: Rng) -> Image.Image:
    """The back of an eye: a red ground in a round field, a bright disc, arcades that leave it, a dark macula, spots."""
    side, up = rng.choice([-1, 1]) * rng.uniform(0.25, 0.55), rng.normal(0, 0.06)
    start = ((side + 1) * SIZE / 2, (up + 1) * SIZE / 2)
    pieces = []
    for heading in (*rng.normal([0.8, -0.8, 2.3, -2.3], 0.25), *rng.uniform(0, 6.3, int(rng.integers(0, 5)))):
        pieces += _growth(rng, start, float(heading), rng.uniform(2.5, 8), 6, rng.uniform(0.06, 0.16), rng.uniform(0.03, 0.12))
    blood = _mask(pieces, rng.uniform(0.4, 1.4))[..., None]
    far = np.hypot(U, V)
    light = 0.85 - 0.35 * far**2 + 0.2 * (fractal(rng, 1.9) - 0.5)
    light = light - rng.uniform(0.1, 0.4) * np.exp(-((U + 0.25 * np.sign(side)) ** 2 + (V - up) ** 2) * rng.uniform(15, 50))
    tone = np.array([1.0, rng.uniform(0.3, 0.65), rng.uniform(0.05, 0.35)]) * rng.uniform(0.6, 1)
    out = light[..., None] * tone * (1 - blood * np.array([0.3, 0.6, 0.6]))
    disc = 1 / (1 + np.exp(np.clip((np.hypot(U - side, V - up) - rng.uniform(0.1, 0.18)) * rng.uniform(25, 60), -60, 60)))
    out = out + disc[..., None] * np.array([0.35, 0.5, 0.35]) * (1 - 0.6 * blood)
    out = out + _spots(rng, int(rng.integers(0, 25)) * int(rng.random() < 0.4), 0.01, 0.05)[..., None] * rng.choice(
        [[-0.5, -0.4, -0.2], [0.2, 0.4, 0.2]]
    )
    if rng.random() < 0.25:  # the field without red, as it is read for small bleedings
        out = np.repeat(out[..., 1:2], 3, -1) * rng.uniform(1, 1.6)
    return image(out * (far < rng.uniform(0.86, 1.45))[..., None])


def scope(rng: Rng) -> Image.Image:
    """Down a gullet, gut or airway: walls that recede to a dark hollow, folds, vessels, wet highlights, an aperture."""
    (cx, cy), lobes = rng.uniform(-0.4, 0.4, 2), int(rng.integers(1, 5))
    x, y = U - cx, (V - cy) * rng.uniform(0.8, 1.2)
    turn = np.arctan2(y, x)
    far = np.hypot(x, y) * (1 + 0.25 * np.cos(lobes * turn + rng.uniform(0, 6))) + 0.2 * (fractal(rng, 2.2) - 0.5)
    depth = np.log(np.clip(far, 0.03, None)) * rng.uniform(3, 9)
    wall = lit(np.abs(np.sin(depth)) ** rng.uniform(0.3, 1) + 0.4 * fractal(rng, 1.6), rng, rng.uniform(5, 20))
    level = np.clip(far * rng.uniform(1.0, 2.5), 0, 1) * (0.35 + 0.65 * wall)
    tone = np.array([1, rng.uniform(0.4, 0.75), rng.uniform(0.3, 0.65)])
    out = between(level, (0.05, 0.01, 0.01), tone)
    if rng.random() < 0.5:
        pieces = _growth(rng, tuple(rng.uniform(0, SIZE, 2)), rng.uniform(0, 6.3), 3, 6, 0.25, 0.15)
        out = out * (1 - 0.4 * _mask(pieces, 1)[..., None] * np.array([0.3, 1, 1]))
    out[(wall > rng.uniform(0.9, 0.99)) & (fractal(rng, 1.2) > 0.75)] = 0.97
    if rng.random() < 0.3:  # a polyp
        p, r = rng.uniform(-0.5, 0.5, 2), rng.uniform(0.12, 0.4)
        ball = np.sqrt(np.clip(1 - ((U - p[0]) ** 2 + (V - p[1]) ** 2) / r**2, 0, 1))
        out = np.where((ball > 0)[..., None], (0.3 + 0.7 * ball[..., None]) * tone, out)
    corner = np.maximum(np.maximum(np.abs(U), np.abs(V)), (np.abs(U) + np.abs(V)) * rng.uniform(0.6, 0.75))
    field = (np.hypot(U, V), corner)[int(rng.integers(2))] < rng.choice([0.8, 0.95, 2.0])
    return image(out * field[..., None])


def tissue(rng: Rng) -> Image.Image:
    """Stained slices: fibres, gaps, glands and nuclei, in the colours of common stains."""
    stains = (((0.93, 0.68, 0.8), (0.4, 0.25, 0.6)), ((0.9, 0.87, 0.85), (0.5, 0.3, 0.15)), ((0.75, 0.85, 0.8), (0.55, 0.15, 0.25)))
    light, dark = (np.array(c) for c in stains[int(rng.choice(3, p=[0.7, 0.2, 0.1]))])
    flow = np.sin(rng.uniform(8, 60) * fractal(rng, 2.3) + 4 * fractal(rng, 1.2))
    out = light * (1 - 0.25 * (flow > 0.3) - 0.2 * fractal(rng, 0.9))[..., None]
    gaps = fractal(rng, rng.uniform(1.7, 2.4))
    out[gaps > rng.uniform(0.72, 1)] = 0.95
    picture = image(out)
    draw, size = ImageDraw.Draw(picture), rng.uniform(1.5, 10)
    crowd = fractal(rng, 2)
    for _ in range(int(rng.uniform(0.1, 0.5) * SIZE**2 / size**2)):
        x, y = rng.uniform(0, SIZE, 2)
        if rng.random() < crowd[int(y), int(x)] and gaps[int(y), int(x)] < 0.75:
            (a, b), shade = size * rng.uniform(0.5, 1.2, 2), rng.uniform(0.7, 1.3)
            draw.ellipse((x - a, y - b, x + a, y + b), fill=tuple(int(c) for c in np.clip(dark * 255 * shade, 0, 255)))
    for _ in range(int(rng.integers(0, 6))):  # glands
        x, y, r = *rng.uniform(0, SIZE, 2), rng.uniform(14, 50)
        for turn in np.linspace(0, 6.28, int(r)):
            a, b = x + r * np.cos(turn), y + r * np.sin(turn)
            draw.ellipse((a - size, b - size, a + size, b + size), fill=tuple(int(c) for c in dark * 255))
        draw.ellipse((x - r * 0.6, y - r * 0.6, x + r * 0.6, y + r * 0.6), fill=(244, 240, 244))
    return picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.5)))


def slide(rng: Rng) -> Image.Image:
    """Cells under other microscopes: glowing in one dye or more on black, grey with bright rims, or blood on a bright field."""
    kind, size = rng.random(), rng.uniform(0.03, 0.25)
    count = int(min(400, rng.uniform(0.3, 1.5) / size**2))
    spots = _spots(rng, min(count, 90), size * 0.6, size * 1.3)
    if kind < 0.45:
        out = spots[..., None] * (0.5 + 0.5 * fractal(rng, 1.1)[..., None]) * (rng.random(3) if rng.random() < 0.6 else np.ones(3))
        if rng.random() < 0.4:
            out = out + _spots(rng, 30, size, size * 2)[..., None] * 0.6 * rng.random(3)
        return image(out + 0.08 * fractal(rng, 1.5)[..., None] * rng.random())
    rim = np.clip(lit(spots, rng, 25), 0, 1)
    if kind < 0.75:
        return image(0.25 + 0.6 * rim + 0.1 * fractal(rng, 0.7))
    return image(
        between(
            np.clip(spots * rng.uniform(0.4, 1) - 0.3 * (spots > 0.9), 0, 1),
            (0.93, 0.9, 0.9),
            rng.uniform([0.6, 0.3, 0.3], [0.9, 0.5, 0.6]),
        )
    )


DRAWN: dict[str, Callable[[Rng], Image.Image]] = {
    f.__name__: f
    for f in (
        *(blank, noise, clouds, ramp, stripes, shapes, dead_leaves, cells, ground, weave),
        *(page, screen, chart, trace, plan, logo, code),
        *(vessel, box, cutout, bokeh, view, wood, leaf, section),
        *(face, skin, fundus, scope, tissue, slide),
    )
}
