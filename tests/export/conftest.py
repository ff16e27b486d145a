"""What the tests of exports share: the command in this process, and a ranking of layers that takes less time."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pydicom's samples as PNG files."""
    from pmclip_deploy.benchmarks.towers import pictures_for_calibration  # imports torch

    return pictures_for_calibration(tmp_path_factory.mktemp("samples"))


@pytest.fixture(scope="module")
def ranked_on_two_pictures() -> Iterator[Callable[..., Any]]:
    """Not on pydicom's seven: most of an INT8 export's time goes into asking about each of them once for every layer.

    Gives the method that takes all seven, for a test that needs them.
    """
    from pmclip_deploy.export.recipes import Work  # imports torch

    every = Work._ranked_on
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Work, "_ranked_on", lambda work, part: every(work, part)[:2])
        yield every
