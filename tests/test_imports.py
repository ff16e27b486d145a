"""What is imported when: the runtime never loads torch, help loads next to nothing, and the public surface is pinned."""

import sys

import pytest

import pmclip_deploy
from tests.imports import HEAVY, RUNTIME, TRAINING, loaded, run_cli


@pytest.mark.parametrize("module", RUNTIME)
def test_the_runtime_never_loads_training(module: str) -> None:
    assert not loaded(f"import {module}") & TRAINING


def test_importing_the_package_is_cheap() -> None:
    assert not loaded("import pmclip_deploy; pmclip_deploy.BundleError; pmclip_deploy.Intent; dir(pmclip_deploy)") & HEAVY


@pytest.mark.parametrize(
    "arguments", [["--help"], ["infer", "--help"], ["train", "--help"], ["export", "--help"], ["--version"], ["infer"]]
)
def test_help_and_usage_errors_load_next_to_nothing(arguments: list[str]) -> None:
    assert not loaded(run_cli(*arguments)) & HEAVY


def test_the_core_is_standard_library_alone() -> None:
    code = "import sys; sys.stdlib_module_names; from pmclip_deploy import spec, errors, answer, intent"
    before = loaded("pass")
    assert loaded(code) - before - set(sys.stdlib_module_names) == {"pmclip_deploy"}


def test_the_public_surface() -> None:
    assert pmclip_deploy.__all__ == [
        "Answer",
        "BundleError",
        "Candidate",
        "Classification",
        "DeviceError",
        "FindingScores",
        "GateError",
        "HeadLogits",
        "ImageInfo",
        "InputError",
        "Intent",
        "Label",
        "Match",
        "ModelInfo",
        "NoPictureError",
        "ParityError",
        "PmclipError",
        "Predictor",
        "Qualifier",
        "TrainingError",
        "UsageError",
        "Worth",
        "load",
    ]
    assert all(getattr(pmclip_deploy, name) for name in pmclip_deploy.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pmclip_deploy.nothing


def test_exit_codes_are_pinned() -> None:
    codes = {name: getattr(pmclip_deploy, name).exit_code for name in pmclip_deploy.__all__ if name.endswith("Error")}
    assert codes == {
        "BundleError": 4,
        "DeviceError": 6,
        "GateError": 5,
        "InputError": 3,
        "NoPictureError": 3,
        "ParityError": 5,
        "PmclipError": 1,
        "TrainingError": 1,
        "UsageError": 2,
    }
