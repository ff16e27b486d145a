"""What is cut off around a picture: borders and flat strips of any grey, and nothing of the picture."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pmclip_deploy.imaging.margins import LEAST, inner_box
from pmclip_deploy.imaging.preprocess import padded_place, resized, tensor_from_pixels
from pmclip_deploy.spec import Preprocess

PADDED = Preprocess(64, "pad", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), trim=True)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width), np.uint8)


def framed(inner: np.ndarray, border: int, grey: int) -> np.ndarray:
    return np.pad(inner, border, constant_values=grey)


@pytest.mark.parametrize("grey", [0, 20, 128, 255])
@pytest.mark.parametrize("border", [1, 40, 200])
def test_a_border_of_any_grey_is_cut_off(grey: int, border: int) -> None:
    rows, columns = inner_box(framed(noise(120, 90), border, grey))
    back = 3  # of 120 pixels, what is given back
    assert border - back <= rows.start <= border and border + 120 <= rows.stop <= border + 120 + back
    assert border - back <= columns.start <= border and border + 90 <= columns.stop <= border + 90 + back


def test_a_border_with_noise_letters_and_a_bright_edge_is_cut_off() -> None:
    picture = framed(noise(200, 160), 120, 10)
    picture[:4] = 255  # the edge of a collimated film
    picture[30:40, 30:42] = 250  # a marker: "R"
    picture = np.clip(picture.astype(int) + np.random.default_rng(1).integers(-5, 6, picture.shape), 0, 255).astype(np.uint8)
    rows, columns = inner_box(picture)
    assert abs(rows.start - 116) <= 4 and abs(columns.start - 116) <= 4


def test_a_picture_without_margins_stays_whole() -> None:
    assert inner_box(noise(70, 50)) == (slice(0, 70), slice(0, 50))


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 2), (31, 31), (2048, 2500)])
@pytest.mark.parametrize("grey", [0, 90])
def test_a_flat_picture_stays_whole(shape: tuple[int, int], grey: int) -> None:
    assert inner_box(np.full(shape, grey, np.uint8)) == (slice(0, shape[0]), slice(0, shape[1]))


def test_what_is_left_is_never_smaller_than_the_least_side() -> None:
    picture = np.zeros((400, 400), np.uint8)
    picture[200:208, 200:208] = noise(8, 8)
    rows, columns = inner_box(picture)
    assert rows.stop - rows.start >= LEAST and columns.stop - columns.start >= LEAST


def test_colour_is_looked_at_in_its_brightest_channel() -> None:
    picture = np.zeros((200, 200, 3), np.uint8)
    picture[60:140, 50:150, 2] = noise(80, 100)
    rows, columns = inner_box(picture)
    assert abs(rows.start - 60) <= 2 and abs(columns.stop - 150) <= 2


@pytest.mark.parametrize("border", [50, 300])
def test_a_border_changes_little_of_what_the_model_sees(border: int) -> None:
    inner = np.asarray(Image.fromarray(noise(8, 8)).resize((192, 192), Image.Resampling.BICUBIC))

    def likeness(preprocess: Preprocess) -> float:
        plain, bordered = (resized(x, preprocess).astype(int).ravel() for x in (inner, framed(inner, border, 0)))
        return float(np.corrcoef(plain, bordered)[0, 1])

    # Not 1: a strip of the border is given back, which makes the rest a little smaller.
    assert likeness(PADDED) > 0.75 > 0.6 > likeness(replace(PADDED, trim=False))


@pytest.mark.parametrize(("shape", "place"), [((100, 50), (slice(0, 64), slice(16, 48))), ((3, 300), (slice(31, 32), slice(0, 64)))])
def test_pad_centres_the_picture(shape: tuple[int, int], place: tuple[slice, slice]) -> None:
    assert padded_place(*shape, 64) == place
    square = resized(np.full(shape, 200, np.uint8), PADDED)
    assert (square[place] == 200).all() and square.sum() == 200 * square[place].size


def test_pad_of_colour_gives_a_tensor_of_three_channels() -> None:
    tensor = tensor_from_pixels(np.full((40, 80, 3), 255, np.uint8), PADDED)
    assert tensor.shape == (3, 64, 64) and tensor.max() == 1 and tensor.min() == -1
