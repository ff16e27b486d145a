"""Counting as others count: each rule on its own source's examples, BLEU against what NLTK gave."""

import pytest

from pmclip_deploy.evaluation.counting import MEVF, MEVF_ALL, MOST_BRACKETS, QCR, VQA_MED_2019, answer_as_qcr, bleu, readings, words_of
from pmclip_deploy.evaluation.rows import Row


def test_words() -> None:
    assert words_of("XR - Plain Film") == ["xr", "plain", "film"]
    assert words_of("CT w/contrast (IV).") == ["ct", "wcontrast", "iv"]  # a mark is removed, and no blank put in its place
    assert words_of(" - ") == []


@pytest.mark.parametrize(
    ("reference", "allowed"),
    [  # the first two: the README of the test set
        ("anaplastic oligodendroglioma#multi-cystic complex mass", ["anaplastic oligodendroglioma", "multicystic complex mass"]),
        (
            "(angioinvasive aspergillosis with) septic cerebral emboli",
            ["angioinvasive aspergillosis with septic cerebral emboli", "septic cerebral emboli"],
        ),
        ("noncontrast (mri)#ct", ["noncontrast mri", "noncontrast", "ct"]),
        ("(a) b (c)", ["a b c", "a b", "b c", "b"]),
        ("(a (b)", ["a b", "a"]),  # a bracket that is not closed is a mark like others
        ("(iatrogenic)", ["iatrogenic"]),  # not nothing
        ("#", [""]),
    ],
)
def test_readings_of_a_reference(reference: str, allowed: list[str]) -> None:
    assert sorted(" ".join(words) for words in readings(reference)) == sorted(allowed)


def test_many_brackets_take_no_time() -> None:
    assert len(readings("x" + " (a)" * MOST_BRACKETS)) == 2**MOST_BRACKETS
    assert readings("x" + " (a)" * 40) == [["x"] + ["a"] * 40, ["x"]]


@pytest.mark.parametrize(
    ("answer", "reference", "of_nltk"),
    [  # of NLTK 3.2.5: sentence_bleu([reference.split()], answer.split(), smoothing_function=SmoothingFunction().method0)
        ("axial", "axial", 1),
        ("axial", "coronal", 0),
        ("ct noncontrast", "ct with iv contrast", 0.3093485033),
        ("xr plain film", "xr plain film", 1),
        ("ct noncontrast scan", "ct", 0.7598356857),
        ("mr t1w wgadolinium", "mr t1w noncontrast", 0.7598356857),
        ("acute subdural hematoma of the left side", "subacute subdural hematoma of the left hemisphere", 0.614788153),
        ("the the the the", "the left lung is the smaller", 0.5100294575),
        ("septic cerebral emboli", "angioinvasive aspergillosis with septic cerebral emboli", 0.3678794412),
        ("a b c d e", "a b c d e", 1),
        ("a b x c d", "a b c d", 0.7952707288),
        ("mass", "large mass in the left upper lobe", 0.002478752177),
        ("cyst cyst", "cyst", 0.8408964153),
    ],
)
def test_bleu(answer: str, reference: str, of_nltk: float) -> None:
    assert bleu(answer.split(), reference.split()) == pytest.approx(of_nltk, rel=1e-9)


def test_bleu_of_nothing() -> None:  # as the organisers' code has it
    assert (bleu([], []), bleu([], ["a"]), bleu(["a"], [])) == (1, 0, 0)


def test_vqa_med_2019() -> None:
    rows = [Row("a", "?", answer, "abnormality") for answer in ("(Left) lung#heart.", "heart", "mass (big)", "x", "x")]
    judged = VQA_MED_2019.judge(rows, ["Lung", "the heart", "mass", None, "y"], None, None)
    assert judged.accuracy == [True, False, True, False, False] and judged.groups == ["abnormality"] * 5 and not judged.taken
    assert judged.bleu == pytest.approx([1, (1 / 2) ** 0.25, 1, 0, 0])


ROWS = [
    Row("a", "?", "The left-lung.", type="open", phrase="freeform"),
    Row("a", "?", "yes", type="closed", phrase="para"),
    Row("b", "?", "two", type="open", phrase="freeform"),
    Row("b", "?", "unseen", type="open", phrase="freeform"),
    Row("b", "?", "no", type="closed", phrase="freeform"),
]
SAID = ["left lung", "Yes", "2", "unseen", "yes"]


def test_mevf() -> None:
    train = [Row("c", "?", answer) for answer in ("left lung", "2", "yes", "no")]
    judged = MEVF.judge(ROWS, SAID, None, train)
    assert judged.accuracy == [True, True, True, False, False]  # "unseen" is no label
    assert judged.taken == [True, False, True, True, True] and judged.groups == ["open", "closed", "open", "open", "closed"]
    assert MEVF.judge(ROWS, SAID, None, None).accuracy[3]  # no training rows, so no labels to hold it to
    assert not MEVF_ALL.judge(ROWS, SAID, None, train).taken
    assert MEVF.judge([Row("a", "?", "yes")], [None], None, None).accuracy == [False]


def test_qcr() -> None:
    assert answer_as_qcr("  Left \n Lung. ") == "left lung."
    judged = QCR.judge(ROWS, ["the left-lung.", "yes", "two", "unseen", "no"], ["open", "open", "open", "open", "closed"], None)
    assert judged.accuracy == [True, False, True, True, True]  # the second was taken for an open question
    assert judged.groups == ["open", "open", "open", "open", "closed"]
    assert QCR.judge(ROWS, SAID, None, None).accuracy == [False, True, False, True, False]  # "left lung" is not "the left-lung."
    kinds_of_lite = QCR.judge(ROWS, SAID, ["organ", "plane", "organ", "organ", "plane"], None)
    assert kinds_of_lite.groups == ["open", "closed", "open", "open", "closed"]
