"""Errors: code, message and hint apart, one line together, and the same on the other side of a process."""

import ast
import pickle
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from pmclip_deploy import errors
from pmclip_deploy.errors import InputError, PmclipError
from tests.sources import modules

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


def texts_of_errors() -> Iterator[tuple[str, list[str]]]:
    """(where, its texts with {} for what is filled in) of each error that is made in the sources."""
    names = {kind.__name__ for kind in CLASSES}
    for path in modules():
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and names & {x.id for x in ast.walk(call.func) if isinstance(x, ast.Name)}:
                yield f"{path.name}:{call.lineno}", [text_of(x) for x in (*call.args, *(of.value for of in call.keywords))]


def text_of(node: ast.expr) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "{}"


def test_the_walk_reads_what_an_error_says() -> None:
    (call,) = [x for x in ast.walk(ast.parse("InputError(f'{a}: b' + c, 'd')")) if isinstance(x, ast.Call)]
    assert list(map(text_of, call.args)) == ["{}: b{}", "d"]
    assert len({where.partition(":")[0] for where, _ in texts_of_errors()}) > 60


def test_message_and_hint_are_given_apart() -> None:
    """An error that is made of one text with "; " in it has its hint in its message."""
    alone = [(where, texts[0]) for where, texts in texts_of_errors() if len(texts) == 1]
    assert not [(where, text) for where, text in alone if "; " in text]


def test_what_opens_in_a_message_or_a_hint_closes_there() -> None:
    """A bracket or quote that closes in the other was cut apart."""
    halves = [(where, text) for where, texts in texts_of_errors() for text in texts]
    pairs = "()", "[]", "{}"
    assert not [half for half in halves if any(half[1].count(opens) != half[1].count(closes) for opens, closes in pairs)]
    assert not [half for half in halves if any(half[1].count(quote) % 2 for quote in ("`", '"'))]
