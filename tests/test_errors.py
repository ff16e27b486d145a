"""Errors: code, message and hint apart, one line together, and the same on the other side of a process."""

import ast
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

import pmclip_deploy
from pmclip_deploy import errors
from pmclip_deploy.errors import InputError, PmclipError

CLASSES = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, PmclipError)]


def raised() -> None:
    raise InputError("a.png: is broken", "save it again")


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_keeps_code_message_and_hint_through_pickle(kind: type[PmclipError]) -> None:
    for error in (kind("a.png: is broken", "save it; or copy it"), kind("a.png: is broken"), kind("a", hint="b")):
        again = pickle.loads(pickle.dumps(error))  # noqa: S301 - made here
        for one in (error, again):
            assert type(one) is kind and (one.code, one.exit_code) == (kind.code, kind.exit_code)
            assert (one.message, one.hint) == (error.message, error.hint)
            assert str(one) == (f"{error.message}; {error.hint}" if error.hint else error.message)


def test_an_error_comes_whole_from_another_process() -> None:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool, pytest.raises(InputError) as caught:
        pool.submit(raised).result(timeout=60)
    assert (caught.value.code, caught.value.message, caught.value.hint) == ("input", "a.png: is broken", "save it again")


def test_codes_are_pinned_and_one_a_class() -> None:
    assert {kind.__name__: kind.code for kind in CLASSES} == {
        "PmclipError": "error",
        "UsageError": "usage",
        "InputError": "input",
        "NoPictureError": "input.no_picture",
        "BundleError": "bundle",
        "ParityError": "parity",
        "GateError": "gate",
        "DeviceError": "device",
        "TrainingError": "training",
    }


def test_the_runtime_gives_message_and_hint_apart() -> None:
    """An error that is made of one text with "; " in it has its hint in its message."""
    whole, names = [], {kind.__name__ for kind in CLASSES}
    for path in Path(pmclip_deploy.__file__).parent.rglob("*.py"):  # not through the links: they are other people's rooms
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (
                isinstance(call, ast.Call) and len(call.args) == 1 and isinstance(call.args[0], (ast.Constant, ast.JoinedStr, ast.BinOp))
            ):
                continue
            if names & {x.id for x in ast.walk(call.func) if isinstance(x, ast.Name)}:
                texts = [x.value for x in ast.walk(call.args[0]) if isinstance(x, ast.Constant) and isinstance(x.value, str)]
                whole += [f"{path.name}: {text}" for text in texts if "; " in text]
    assert not whole
