"""Drawn things: vessels, blocks, what is cut out, lights, views, wood, leaves, sections."""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from pmclip_deploy.train.drawings.patterns import cells
from pmclip_deploy.train.drawings.tools import SIZE, Rng, U, V, between, fractal, growth, image, lit, outline, shifted, stroked, values


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
    body = outline(rng, rng.uniform(0.2, 1.6))
    parts = [shifted(outline(rng, 0.8), rng, rng.uniform(0.12, 0.5)) for _ in range(int(rng.integers(0, 9)))]
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
        ImageDraw.Draw(mask).polygon(shifted(outline(rng, 0.9), rng, rng.uniform(0.6, 1.3)), fill=255)
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
        pieces += growth(rng, start, angle, rng.uniform(3, 38), rng.uniform(5, 14), rng.uniform(0.05, 0.3), rng.uniform(0.04, 0.25))
    mask = stroked(pieces, rng.uniform(0.4, 2.5))
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
