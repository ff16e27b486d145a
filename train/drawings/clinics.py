"""Drawn people, and pictures of other clinics: faces, skin, eyes, endoscopies, stained slices."""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from pmclip_deploy.train.drawings.tools import SIZE, Floats, Rng, U, V, between, fractal, growth, image, lit, spotted, stroked, values


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
        hair = growth(rng, tuple(rng.uniform(0, SIZE, 2)), rng.uniform(0, 6.3), rng.uniform(1, 2.5), 7, 0.06, 0)[:40]
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
        pieces += growth(rng, start, float(heading), rng.uniform(2.5, 8), 6, rng.uniform(0.06, 0.16), rng.uniform(0.03, 0.12))
    blood = stroked(pieces, rng.uniform(0.4, 1.4))[..., None]
    far = np.hypot(U, V)
    light = 0.85 - 0.35 * far**2 + 0.2 * (fractal(rng, 1.9) - 0.5)
    light = light - rng.uniform(0.1, 0.4) * np.exp(-((U + 0.25 * np.sign(side)) ** 2 + (V - up) ** 2) * rng.uniform(15, 50))
    tone = np.array([1.0, rng.uniform(0.3, 0.65), rng.uniform(0.05, 0.35)]) * rng.uniform(0.6, 1)
    out = light[..., None] * tone * (1 - blood * np.array([0.3, 0.6, 0.6]))
    disc = 1 / (1 + np.exp(np.clip((np.hypot(U - side, V - up) - rng.uniform(0.1, 0.18)) * rng.uniform(25, 60), -60, 60)))
    out = out + disc[..., None] * np.array([0.35, 0.5, 0.35]) * (1 - 0.6 * blood)
    out = out + spotted(rng, int(rng.integers(0, 25)) * int(rng.random() < 0.4), 0.01, 0.05)[..., None] * rng.choice(
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
        pieces = growth(rng, tuple(rng.uniform(0, SIZE, 2)), rng.uniform(0, 6.3), 3, 6, 0.25, 0.15)
        out = out * (1 - 0.4 * stroked(pieces, 1)[..., None] * np.array([0.3, 1, 1]))
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
    spots = spotted(rng, min(count, 90), size * 0.6, size * 1.3)
    if kind < 0.45:
        out = spots[..., None] * (0.5 + 0.5 * fractal(rng, 1.1)[..., None]) * (rng.random(3) if rng.random() < 0.6 else np.ones(3))
        if rng.random() < 0.4:
            out = out + spotted(rng, 30, size, size * 2)[..., None] * 0.6 * rng.random(3)
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
