"""The figures of a training run as lines: every figure is there once, and no JSON."""

from typing import Any

import pytest

from pmclip_deploy.cli.train_options import lines_of_figures


@pytest.mark.parametrize(
    ("figures", "lines"),
    [
        ({}, []),
        ({"loss": 0.12345}, ["loss 0.123"]),
        ({"delta": -0.0001}, ["delta 0.000"]),
        ({"pool": 500, "image_to_text_R@1": 0.5}, ["pool 500, image to text R@1 0.500"]),
        ({"v": {"accuracy": 0.5, "ci95": [0.25, 0.75], "ece": None}}, ["v: accuracy 0.500 (95% 0.250 to 0.750), ece not measured"]),
        ({"v": {"coverage": 1.0, "coverage_ci95": None}}, ["v: coverage 1.000"]),
        ({"map": {"value": 0.5, "ci95": [0.25, 0.75], "n": 4}}, ["map 0.500 (95% 0.250 to 0.750)"]),
        ({"v": {"n": 1, "by": {"leg": {"n": 2}}}}, ["v: n 1", "v, by, leg: n 2"]),
        ({"history": [{"loss": 3.0}, {"loss": 1.0}]}, ["last of 2 rows of history: loss 1.000"]),
        ({"history": [{"loss": 3.0}]}, ["last of 1 row of history: loss 3.000"]),
        ({"history": []}, ["history none"]),
    ],
)
def test_figures_are_lines(figures: dict[str, Any], lines: list[str]) -> None:
    assert list(lines_of_figures(figures)) == lines
