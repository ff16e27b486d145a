"""mypy --strict reads every line: a checkout without the links, or a package of ours that is skipped, would pass it unread."""

from pathlib import Path

import pytest
from mypy.main import process_options

from tests.sources import ROOT, modules


def test_mypy_reads_every_module_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    sources, options = process_options(["--config-file", "pyproject.toml"])
    assert {Path(source.path).resolve() for source in sources if source.path and Path(source.path).is_file()} == set(modules())
    for source in sources:
        of = options.clone_for_module(source.module)
        assert of.follow_imports == "normal" and of.check_untyped_defs and of.strict_equality, source.module
        assert not (of.ignore_errors or of.ignore_missing_imports or of.exclude or of.disable_error_code), source.module
