"""Drawn patterns and surfaces: one colour, noise, stripes, shapes, stones, ground, cloth."""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from pmclip_deploy.train.drawings.tools import SIZE, Rng, U, V, between, colour, fractal, image, lit, values


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
