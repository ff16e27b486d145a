"""Pictures that are no radiology images, drawn from a seed. Like trust_pictures.py, nothing that trains may use them."""

import inspect
import json
import textwrap
import unittest.mock
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

SIZE = 384  # longest side of what is read, side of what is drawn
Rng = np.random.Generator
Floats = NDArray[np.float64]
LEADS = (("I", "V1"), ("II", "V2"), ("III", "V3"), ("aVR", "V4"))

Y, X = np.mgrid[0:SIZE, 0:SIZE] / SIZE
R = np.hypot(X - 0.5, Y - 0.5)


def _picture(values: Floats, rng: Rng, noise: float = 0.02) -> Image.Image:
    """(S, S) or (S, S, 3), 0 to 1, with a camera's noise."""
    return Image.fromarray((np.clip(values + rng.normal(0, noise, values.shape), 0, 1) * 255).astype(np.uint8))


def _clouds(rng: Rng, power: float) -> Floats:
    """(S, S), 0 to 1, with a spectrum that falls with the frequency to this power."""
    f = np.hypot(*np.meshgrid(np.fft.fftfreq(SIZE), np.fft.fftfreq(SIZE))) + 1 / SIZE
    plane = np.fft.ifft2(np.fft.fft2(rng.normal(size=(SIZE, SIZE))) / f**power).real
    low, high = np.percentile(plane, [1, 99])
    return np.asarray(np.clip((plane - low) / (high - low), 0, 1))


def _tint(grey: Floats, dark: ArrayLike, light: ArrayLike) -> Floats:
    return np.asarray(np.asarray(dark) + grey[..., None] * (np.asarray(light) - np.asarray(dark)))


def _font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)  # Pillow's own: the same on every machine


def _prose(rng: Rng) -> list[str]:
    """Real sentences: the standard library's documentation."""
    modules = (json, textwrap, inspect, unittest.mock, inspect.Signature, json.JSONEncoder, textwrap.TextWrapper)
    words = " ".join(inspect.getdoc(modules[int(i)]) or "" for i in rng.permutation(len(modules))).split()
    return textwrap.wrap(" ".join(words[int(rng.integers(40)) :]), int(rng.integers(34, 70)))


def _document(rng: Rng) -> Image.Image:
    """A page of text with a heading, and some with a form's lines; one in three is photographed askew in uneven light."""
    picture = Image.new("RGB", (SIZE, SIZE), tuple(int(c) for c in rng.integers(225, 256, 3)))
    draw, size, left = ImageDraw.Draw(picture), rng.uniform(8, 14), int(rng.integers(12, 40))
    draw.text((left, 14), " ".join(_prose(rng)[0].split()[:4]).title(), fill="black", font=_font(size * 1.8))
    y = 14 + size * 3.5
    for line in _prose(rng):
        draw.text((left, y), line, fill=(30, 30, 30), font=_font(size))
        y += size * (2.6 if rng.random() < 0.12 else 1.35)
        if rng.random() < 0.1:
            draw.rectangle((left, y, SIZE - left, y + size * 2), outline=(90, 90, 90))
            y += size * 2.5
    if rng.random() < 0.33:
        picture = picture.rotate(rng.uniform(-8, 8), Image.Resampling.BICUBIC, fillcolor=(60, 50, 45))
        return _picture(np.asarray(picture) / 255 * (0.6 + 0.5 * _clouds(rng, 2.5))[..., None], rng)
    return picture


def _chart(rng: Rng) -> Image.Image:
    picture = Image.new("RGB", (SIZE, SIZE), "white" if rng.random() < 0.7 else (25, 25, 35))
    draw, n, kind = ImageDraw.Draw(picture), int(rng.integers(5, 14)), int(rng.integers(4))
    ink = "black" if picture.getpixel((0, 0)) == (255, 255, 255) else "white"
    colours = [tuple(int(c) for c in rng.integers(20, 230, 3)) for _ in range(n)]
    draw.text((90, 10), " ".join(_prose(rng)[1].split()[:3]), fill=ink, font=_font(15))
    if kind == 0:
        ends = np.cumsum(rng.dirichlet(np.ones(n))) * 360
        for start, end, colour in zip(np.append(0, ends), ends, colours, strict=False):
            draw.pieslice((70, 70, 320, 320), start, end, fill=colour, outline=ink)
        return picture
    draw.line((45, 40, 45, 345, 365, 345), fill=ink, width=2)
    for tick in range(6):
        draw.text((14, 340 - 58 * tick), str(20 * tick), fill=ink, font=_font(11))
    x = np.linspace(60, 345, n if kind == 1 else 60)
    for series in range(1 if kind == 1 else int(rng.integers(1, 4))):
        y = 330 - 280 * rng.random(len(x)) if kind != 2 else 190 + np.cumsum(rng.normal(0, 9, len(x)))
        if kind == 1:
            for i in range(n):
                draw.rectangle((x[i] - 9, y[i], x[i] + 9, 345), fill=colours[series])
        elif kind == 2:
            draw.line([(float(a), float(np.clip(b, 42, 340))) for a, b in zip(x, y, strict=True)], fill=colours[series], width=2)
        else:
            for a, b in zip(x + rng.normal(0, 8, len(x)), y, strict=True):
                draw.ellipse((a - 3, b - 3, a + 3, b + 3), fill=colours[series])
    return picture


def _terminal(rng: Rng) -> Image.Image:
    """Source text in a window, light on dark or dark on light."""
    is_dark = rng.random() < 0.75
    picture = Image.new("RGB", (SIZE, SIZE), (18, 20, 26) if is_dark else (250, 250, 245))
    draw, size, lines = ImageDraw.Draw(picture), rng.uniform(9, 14), inspect.getsource(textwrap).split("\n")
    start = int(rng.integers(len(lines) - 60))
    for i, line in enumerate(lines[start : start + 45]):
        colour = tuple(int(c) for c in (rng.integers(140, 256, 3) if is_dark else rng.integers(0, 120, 3)))
        draw.text((8, 24 + i * size * 1.3), line, fill=colour, font=_font(size))
    draw.rectangle((0, 0, SIZE, 18), fill=(70, 70, 80))
    return picture


def _ecg(rng: Rng) -> Image.Image:
    """Strips on squared paper: medical, and no radiology image."""
    picture = Image.new("RGB", (SIZE, SIZE), [(255, 240, 240), (255, 255, 255), (235, 245, 255)][int(rng.integers(3))])
    draw, beat = ImageDraw.Draw(picture), rng.uniform(50, 110)
    for i in range(0, SIZE, 8):
        for line in ((i, 0, i, SIZE), (0, i, SIZE, i)):
            draw.line(line, fill=(240, 190, 190) if i % 40 == 0 else (250, 220, 220))
    x = np.arange(SIZE)
    # Place, width and height of P, Q, R, S, T.
    waves = ((0.16, 0.03, 6), (0.28, 0.012, -5), (0.31, 0.012, 38), (0.34, 0.012, -9), (0.55, 0.05, 10))
    for lead in range(4):
        phase = (x / beat + rng.random()) % 1
        y = sum(h * rng.uniform(0.6, 1.4) * np.exp(-(((phase - p) / w) ** 2) / 2) for p, w, h in waves)
        y = 70 + 85 * lead - y + np.cumsum(rng.normal(0, 0.2, SIZE))
        draw.line([(float(a), float(b)) for a, b in zip(x, y, strict=True)], fill="black", width=1)
        draw.text((4, 35 + 85 * lead), LEADS[lead][int(rng.integers(2))], fill="black", font=_font(12))
    return picture


def _tree(draw: ImageDraw.ImageDraw, rng: Rng, at: tuple[float, float], angle: float, width: float, length: float, fill: int) -> None:
    """A branch of short bent pieces that forks until it is thin."""
    while width > 0.8:
        for _ in range(6):
            angle += rng.normal(0, 0.12)
            end = (at[0] + length / 6 * np.cos(angle), at[1] + length / 6 * np.sin(angle))
            draw.line((*at, *end), fill=fill, width=max(1, round(width)))
            draw.ellipse((end[0] - width / 2, end[1] - width / 2, end[0] + width / 2, end[1] + width / 2), fill=fill)
            at = end
        side = rng.choice([-1, 1]) * rng.uniform(0.4, 0.9)
        _tree(draw, rng, at, angle + side, width * rng.uniform(0.45, 0.7), length * 0.75, fill)
        angle, width, length = angle - side * 0.4, width * rng.uniform(0.65, 0.85), length * 0.85


def _branches(rng: Rng) -> Image.Image:
    """Bare branches, grey: bone-like, light on dark or dark against a sky."""
    layer = Image.new("L", (SIZE, SIZE))
    draw = ImageDraw.Draw(layer)
    for _ in range(int(rng.integers(1, 5))):
        _tree(draw, rng, (rng.uniform(0, SIZE), SIZE), rng.uniform(-2.1, -1.0), rng.uniform(8, 36), rng.uniform(70, 150), 255)
    mask = np.asarray(layer.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 2.5)))) / 255
    ground, wood = 0.25 * _clouds(rng, 2), 0.55 + 0.4 * _clouds(rng, 1.2)
    grey = ground + mask * (wood - ground)
    return _picture(grey if rng.random() < 0.6 else 1 - grey, rng, 0.03)


def _landscape(rng: Rng) -> Image.Image:
    """Ridges in haze below a sky, grey in half of them."""
    grey = 0.95 - 0.3 * Y * rng.random() - 0.25 * _clouds(rng, 1.8)
    layers = int(rng.integers(3, 7))
    for layer in range(layers):
        ridge = _clouds(rng, rng.uniform(1.3, 1.9))[0] * rng.uniform(0.1, 0.35) + 0.3 + 0.55 * layer / layers
        shade = 0.7 * (1 - layer / layers) + 0.25 * _clouds(rng, 1.0)
        grey = np.where(ridge[None] < Y, shade, grey)
    if rng.random() < 0.5:
        return _picture(grey, rng)
    return _picture(_tint(grey, rng.uniform(0, 0.25, 3), rng.uniform(0.7, 1, 3)), rng)


def _fundus(rng: Rng) -> Image.Image:
    """Vessels from a bright disc on an orange ground in a round aperture."""
    layer = Image.new("L", (SIZE, SIZE))
    draw, side = ImageDraw.Draw(layer), rng.choice([-1, 1])
    disc = (SIZE * (0.5 + 0.22 * side), SIZE * rng.uniform(0.44, 0.56))
    for angle in (0.9, 2.2, 4.0, 5.4, *rng.uniform(0, 6.28, 3)):
        _tree(draw, rng, disc, angle + rng.normal(0, 0.2), rng.uniform(3, 7), rng.uniform(50, 90), 255)
    vessels = np.asarray(layer.filter(ImageFilter.GaussianBlur(1))) / 255
    bright = np.exp(-((X * SIZE - disc[0]) ** 2 + (Y * SIZE - disc[1]) ** 2) / (2 * rng.uniform(14, 22) ** 2))
    fovea = 0.25 * np.exp(-((X - 0.5 + 0.12 * side) ** 2 + (Y - 0.52) ** 2) / 0.008)
    level = np.clip(0.75 - R * 0.6 + 0.15 * _clouds(rng, 2) - fovea, 0, 1)
    colour = _tint(level, (0.15, 0.02, 0.0), (0.95, 0.5 + 0.2 * rng.random(), 0.2)) * (1 - 0.5 * vessels[..., None] * [0.5, 1, 1])
    colour += bright[..., None] * np.array([0.4, 0.45, 0.3])
    return _picture(colour * (rng.uniform(0.44, 0.52) > R)[..., None], rng)


def _histology(rng: Rng) -> Image.Image:
    """Haematoxylin and eosin: violet nuclei in a pink weave with white gaps."""
    weave = 0.6 * _clouds(rng, 1.1) + 0.4 * np.sin(40 * _clouds(rng, 2.2)) ** 2
    colour = _tint(weave, (0.75, 0.35, 0.6), (0.98, 0.8, 0.9))
    colour[_clouds(rng, 2.2) > rng.uniform(0.75, 0.98)] = 0.95
    picture = Image.fromarray((colour * 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    size = rng.uniform(2.5, 9)
    for _ in range(int(rng.uniform(20000, 60000) / size**2)):
        (x, y), (a, b) = rng.uniform(0, SIZE, 2), size * rng.uniform(0.6, 1.4, 2)
        fill = tuple(int(c) for c in np.clip(np.array([85, 50, 130]) + rng.normal(0, 18, 3), 0, 255))
        draw.ellipse((x - a, y - b, x + a, y + b), fill=fill)
    return _picture(np.asarray(picture.filter(ImageFilter.GaussianBlur(0.9))) / 255, rng)


def _fluorescence(rng: Rng) -> Image.Image:
    """Bright cells on black, of one dye or grey."""
    grey = 0.06 * _clouds(rng, 1.5)
    for _ in range(int(rng.integers(12, 70))):
        (x, y), (a, b), turn = rng.random(2), rng.uniform(0.012, 0.05, 2), rng.uniform(0, 3.14)
        u, v = (X - x) * np.cos(turn) + (Y - y) * np.sin(turn), (Y - y) * np.cos(turn) - (X - x) * np.sin(turn)
        grey = np.maximum(grey, rng.uniform(0.4, 1) * np.clip(1.6 - 1.3 * ((u / a) ** 2 + (v / b) ** 2), 0, 1))
    grey *= 0.7 + 0.3 * _clouds(rng, 1)
    dye = [(0.1, 0.3, 1), (0.1, 1, 0.3), (1, 0.2, 0.2), None][int(rng.integers(4))]
    return _picture(grey if dye is None else grey[..., None] * np.array(dye), rng)


def _endoscopy(rng: Rng) -> Image.Image:
    """Folds around a dark lumen, with highlights, in a round or eight-sided aperture."""
    cx, cy = rng.uniform(0.35, 0.65, 2)
    depth, turn = np.hypot(X - cx, Y - cy), np.arctan2(Y - cy, X - cx)
    folds = 0.5 + 0.5 * np.sin(depth * rng.uniform(25, 60) + 1.5 * np.sin(3 * turn + rng.uniform(0, 6)) + 3 * _clouds(rng, 2.2))
    level = np.clip(depth * 2.2, 0, 1) * (0.55 + 0.35 * folds) + 0.08 * _clouds(rng, 1.2)
    colour = _tint(np.clip(level, 0, 1), (0.12, 0.02, 0.02), (1.0, 0.62, 0.5))
    colour[(folds > 0.93) & (_clouds(rng, 1.4) > 0.82)] = 0.98
    inside = rng.uniform(0.42, 0.49) > (R if rng.random() < 0.5 else np.maximum(np.maximum(abs(X - 0.5), abs(Y - 0.5)), R * 0.85))
    return _picture(colour * inside[..., None], rng)


def _skin(rng: Rng) -> Image.Image:
    """A pigmented spot under a dermatoscope, with hairs."""
    skin = np.array([0.87, 0.68, 0.58]) * rng.uniform(0.45, 1.1)
    edge = R + 0.16 * (_clouds(rng, 2.2) - 0.5)
    spot = 1 / (1 + np.exp((edge - rng.uniform(0.1, 0.28)) * 60))
    grain = 0.9 + 0.15 * _clouds(rng, 1.1)
    colour = (skin * grain[..., None]) * (1 - spot[..., None] * np.array([0.5, 0.65, 0.7]) * (0.7 + 0.5 * _clouds(rng, 1.3))[..., None])
    picture = _picture(np.asarray(colour), rng)
    draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(0, 14))):
        x, y = rng.uniform(-50, SIZE, 2)
        draw.arc((x, y, x + rng.uniform(60, 300), y + rng.uniform(60, 300)), rng.uniform(0, 180), rng.uniform(190, 360), (40, 28, 22), 2)
    return picture


def _slice(rng: Rng) -> Image.Image:
    """Cut wood or fruit: rings, rays and a rind on black, as round as a CT."""
    cx, cy = rng.uniform(0.46, 0.54, 2)
    depth = np.hypot((X - cx) * rng.uniform(0.85, 1.2), Y - cy) + 0.03 * _clouds(rng, 2.3)
    turn, edge = np.arctan2(Y - cy, X - cx), rng.uniform(0.3, 0.46)
    if rng.random() < 0.5:
        level = 0.45 + 0.25 * np.sin(depth * rng.uniform(120, 300)) + 0.2 * _clouds(rng, 1)
    else:
        level = 0.55 + 0.3 * np.abs(np.sin(turn * int(rng.integers(3, 7)))) ** 0.3 - 0.5 * np.exp(-((depth / edge - 0.15) ** 2) / 0.01)
    level = np.where(depth > edge * 0.93, 0.9, level) * (depth < edge)
    if rng.random() < 0.5:
        return _picture(level, rng)
    return _picture(_tint(level, (0, 0, 0), rng.uniform([0.8, 0.5, 0.2], [1, 0.85, 0.5])), rng)


def _contours(rng: Rng) -> Image.Image:
    """Contour lines, roads and names on a hill-shaded map."""
    height = _clouds(rng, 2.3)
    gy, gx = np.gradient(height)
    colour = _tint(np.clip(height + 6 * (gx + gy), 0, 1), (0.65, 0.8, 0.6), (0.98, 0.95, 0.85))
    colour[(height * 18 % 1) < 0.08] = (0.6, 0.45, 0.3)
    picture = Image.fromarray((colour * 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(1, 5))):
        road = np.cumsum(rng.normal(0, 14, 24)) + rng.uniform(80, 300)
        draw.line([(16.5 * i, float(y)) for i, y in enumerate(road)], fill=(200, 60, 40), width=3)
    for _ in range(int(rng.integers(3, 9))):
        x, y = rng.uniform(10, SIZE - 60, 2)
        draw.text((x, y), str(rng.choice(_prose(rng)[0].split())).title(), fill="black", font=_font(12))
    return picture


def _plain(rng: Rng) -> Image.Image:
    """Blank, noise, a ramp, a test grid."""
    kind, colour = int(rng.integers(4)), rng.random(3)
    if kind == 0:
        return _picture(np.ones((SIZE, SIZE, 3)) * colour, rng, 0)
    if kind == 1:
        return _picture(np.full((SIZE, SIZE), 0.5), rng, rng.uniform(0.05, 0.5))
    if kind == 2:
        return _picture((X * rng.normal() + Y * rng.normal()) * 0.5 + rng.random(), rng, 0.01)
    cells = int(rng.integers(3, 12))
    return _picture(((X * cells).astype(int) + (Y * cells).astype(int)) % 2 * rng.uniform(0.5, 1) * np.ones((SIZE, SIZE)), rng, 0.01)


def _snapshot(rng: Rng) -> Image.Image:
    """A film photographed off a screen is radiology; a screen of windows and buttons without one is not."""
    picture = Image.new("RGB", (SIZE, SIZE), tuple(int(c) for c in rng.integers(20, 160, 3)))
    draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(2, 6))):
        x, y = rng.uniform(0, 240, 2)
        w, h = rng.uniform(100, 240, 2)
        light = int(rng.integers(20, 250))
        draw.rectangle((x, y, x + w, y + h), fill=(light, light, light), outline="black")
        draw.rectangle((x, y, x + w, y + 14), fill=tuple(int(c) for c in rng.integers(40, 200, 3)))
        for i, line in enumerate(_prose(rng)[: int(h / 16) - 2]):
            draw.text((x + 6, y + 20 + 15 * i), line[: int(w / 6.5)], fill="white" if light < 128 else "black", font=_font(10))
    return picture if rng.random() < 0.7 else ImageOps.invert(picture)


DRAWN: dict[str, tuple[Callable[[Rng], Image.Image], int]] = {
    "documents": (_document, 20),
    "charts": (_chart, 14),
    "screens": (_terminal, 10),
    "windows": (_snapshot, 8),
    "ECG strips": (_ecg, 12),
    "fundus": (_fundus, 18),
    "histology": (_histology, 18),
    "microscopy": (_fluorescence, 12),
    "endoscopy": (_endoscopy, 12),
    "skin": (_skin, 12),
    "branches": (_branches, 18),
    "landscapes": (_landscape, 18),
    "cut wood and fruit": (_slice, 14),
    "maps": (_contours, 8),
    "blank, noise, ramps, grids": (_plain, 12),
}
