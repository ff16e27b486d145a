"""What the tests of exports share: the command in this process, and a ranking of layers that takes less time."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pmclip_deploy.cli import app


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """(exit code, stdout, stderr) of a command in this process: another one takes seconds to import torch and open_clip."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pmclip-deploy", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            app.main()
        return (int(ended.value.code or 0), *capsys.readouterr())

    return run


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
