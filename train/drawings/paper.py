"""Drawn pages, screens, charts, curves, maps, signs and codes."""

from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw

from pmclip_deploy.train.drawings.tools import SIZE, Rng, between, colour, font, fractal, growth, image, lit, outline, values, words


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
                draw.text((left, y), words(rng, 8), fill=fill, font=font(size * 1.7))
                y += size * 2.4
            elif kind < 0.1:
                high = rng.uniform(20, 70)
                draw.rectangle((left, y, left + wide - 8, y + high), outline=fill, fill=colour(rng) if rng.random() < 0.5 else None)
                y += high + 6
            elif kind < 0.14:
                for _ in range(int(rng.integers(2, 7))):
                    draw.line((left, y, left + wide - 8, y), fill=fill)
                    for cell in range(3):
                        draw.text((left + cell * wide / 3, y + 1), words(rng, 3), fill=fill, font=font(size * 0.8))
                    y += size * 1.3
            else:
                draw.text((left, y), words(rng, int(1.7 * wide / size)), fill=fill, font=font(size))
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
                draw.text((x + 6 + indent, line), words(rng, int(rng.uniform(0.2, 1) * (w - indent) / size)), fill=tone, font=font(size))
            line += size * 1.45
    return picture


def chart(rng: Rng) -> Image.Image:
    """Bars, lines, points, shares or a table of colours, with axes and words."""
    picture = Image.new(
        "RGB", (SIZE, SIZE), tuple(int(c) for c in (rng.integers(235, 256, 3) if rng.random() < 0.75 else rng.integers(0, 50, 3)))
    )
    draw, ink = ImageDraw.Draw(picture), (20, 20, 20) if sum(picture.getpixel((0, 0))) > 380 else (220, 220, 220)  # type: ignore[arg-type]
    n, kind, base = int(rng.integers(3, 30)), int(rng.integers(5)), 255
    draw.text((rng.uniform(20, 120), 6), words(rng, 16), fill=ink, font=font(rng.uniform(10, 18)))
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
        draw.text((8, base - 6 - 40 * i), str(i * int(rng.integers(1, 50))), fill=ink, font=font(9))
        draw.text((40 + 40 * i, base + 4), words(rng, 3), fill=ink, font=font(9))
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
        draw.text((3, SIZE * row / rows + 2), words(rng, 2), fill=ink, font=font(9))
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
        ways = growth(rng, (float(x), float(y)), angle, rng.uniform(1, 4), 12, 0.15, 0.02)
        for start, end, _ in ways[:60]:
            draw.line((*start, *end), fill=colour(rng) if rng.random() < 0.02 else (200, 80, 60), width=2)
    for _ in range(int(rng.integers(0, 14))):
        draw.text(tuple(rng.uniform(0, SIZE - 40, 2)), words(rng, 6).title(), fill=(20, 20, 20), font=font(rng.uniform(7, 14)))
    return picture


def logo(rng: Rng) -> Image.Image:
    """A sign: a few flat shapes and a word."""
    picture = Image.new("RGB", (SIZE, SIZE), (255, 255, 255) if rng.random() < 0.5 else colour(rng))
    draw = ImageDraw.Draw(picture)
    for scale in sorted(rng.uniform(0.2, 1.1, int(rng.integers(1, 5))), reverse=True):
        draw.polygon(
            [(SIZE / 2 + (x - SIZE / 2) * scale, SIZE / 2 + (y - SIZE / 2) * scale) for x, y in outline(rng, 0.7)], fill=colour(rng)
        )
    if rng.random() < 0.7:
        draw.text((rng.uniform(10, 120), rng.uniform(10, 240)), words(rng, 5).upper(), fill=colour(rng), font=font(rng.uniform(18, 60)))
    return picture


def code(rng: Rng) -> Image.Image:
    """Bars or squares that machines read, and pixel art."""
    n, paper = int(rng.integers(8, 45)), np.ones((SIZE, SIZE))
    grid = rng.integers(0, 2, (1 if rng.random() < 0.4 else n, n)).astype(np.uint8) * 255
    margin = int(rng.integers(4, 70))
    side = SIZE - 2 * margin
    paper[margin : margin + side, margin : margin + side] = values(Image.fromarray(grid).resize((side, side), Image.Resampling.NEAREST))
    return image(between(paper, *(rng.random((2, 3)) if rng.random() < 0.3 else (np.zeros(3), np.ones(3)))))
