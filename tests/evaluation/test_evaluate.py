"""Evaluation: each figure against a hand count or a plain rewriting, then the whole on a tiny bundle."""

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import pmclip_deploy as pm
from pmclip_deploy.decision.evidence import OUTSIDE
from pmclip_deploy.evaluation.counting import MEVF, MEVF_ALL, QCR, VQA_MED_2019
from pmclip_deploy.evaluation.evaluate import Decisions, about_bundle, evaluation, figures, tower_trained_on
from pmclip_deploy.evaluation.rows import Row, normalised, pictures_of, rows_from_jsonl
from pmclip_deploy.evaluation.statistics import (
    Bootstrap,
    _weighted_auroc,
    calibration_error,
    coverage_curve,
    derangement,
    difference,
    mcnemar,
    seeds,
)
from tests.tiny.bundle import tiny_bundle, tiny_manifest


def test_normalised() -> None:
    assert normalised("  X-Ray \n Chest. ") == "x-ray chest"
    assert normalised("t.b.") == "t.b" and normalised("no") == "no"


@pytest.mark.parametrize("count", [2, 3, 10, 101])
def test_a_derangement_leaves_nothing_in_place(count: int) -> None:
    other = derangement(count, 0)
    assert sorted(other) == list(range(count)) and not (other == np.arange(count)).any()
    assert (derangement(count, 0) == other).all()


def test_calibration_error() -> None:
    assert calibration_error(np.array([0.75] * 4), np.array([True, True, True, False])) == pytest.approx(0)
    assert calibration_error(np.array([1.0, 1.0]), np.array([True, False])) == pytest.approx(0.5)
    assert calibration_error(np.array([0.9, 0.1]), np.array([False, True])) == pytest.approx(0.9)  # two bins do not cancel
    assert calibration_error(np.array([]), np.array([], bool)) is None


def test_coverage_curve() -> None:
    curve = coverage_curve(np.array([0.9, 0.8, 0.1, 0.0]), np.array([True, True, False, False]), np.array([True, True, True, False]))
    assert curve == [[0.25, 1.0], [0.5, 1.0], [0.75, pytest.approx(2 / 3)]]
    assert coverage_curve(np.zeros(2), np.zeros(2, bool), np.zeros(2, bool)) == []


def test_auroc_equals_counting_pairs() -> None:
    rng = np.random.default_rng(0)
    score, positive = rng.integers(0, 5, 40) / 5, rng.random(40) < 0.4
    weight = rng.integers(0, 3, (3, 40))
    for w, value in zip(weight, _weighted_auroc(score, positive, weight), strict=True):
        pairs = [
            (w[i] * w[j], (score[i] > score[j]) + (score[i] == score[j]) / 2)
            for i in np.flatnonzero(positive)
            for j in np.flatnonzero(~positive)
        ]
        assert value == pytest.approx(sum(a * b for a, b in pairs) / sum(a for a, _ in pairs))


def test_auroc_of_many_rows_takes_little_memory() -> None:
    rng = np.random.default_rng(0)
    sample, score, positive = Bootstrap(np.arange(10_000) // 100, 0), rng.random(10_000), rng.random(10_000) < 0.3
    tracemalloc.start()
    sample.auroc(score, positive, np.arange(10_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6  # all resamples at once: 80 MB for each intermediate


def test_rows_may_hold_unicode_line_separators(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"image": "a", "question": "is\u2028\x85it?", "answer": "yes"}\n', encoding="utf-8")
    assert rows_from_jsonl(tmp_path / "q.jsonl") == [Row("a", "is\u2028\x85it?", "yes")]


def test_an_interval_is_wider_where_rows_share_an_image() -> None:
    right = np.repeat(np.random.default_rng(0).random(50) < 0.6, 4)  # four questions per image, all right or all wrong
    apart, together = (
        Bootstrap(np.arange(200), 0).interval(right, np.ones(200)),
        Bootstrap(np.repeat(np.arange(50), 4), 0).interval(right, np.ones(200)),
    )
    assert apart and together and together[1] - together[0] > 1.7 * (apart[1] - apart[0])
    assert together[0] < right.mean() < together[1]


def test_an_interval_agrees_with_the_normal_one() -> None:
    right = np.random.default_rng(1).random(2000) < 0.7
    low, high = Bootstrap(np.arange(2000), 0).interval(right, np.ones(2000)) or (0, 0)
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.7 * 0.3 / 2000), rel=0.1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"image": "a.png", "question": "q", "answer": "x"}\n{broken', "line 2: no JSON"),
        ('\n{"image": "a.png", "question": "q"}', 'line 2: "answer" is missing'),
        ('{"image": "a.png", "question": " ", "answer": "x"}', '"question" is missing, empty'),
        ('{"image": 3, "question": "q", "answer": "x"}', '"image" is missing, empty or no text'),
        ("[1]", '"image" is missing'),
        ('{"image": "b.png", "question": "q", "answer": "x"}', "b.png is missing; check the folder of images"),
        ("", "holds no rows"),
    ],
)
def test_a_broken_row_is_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "data.jsonl").write_text(text)
    with pytest.raises(pm.InputError) as caught:
        rows_from_jsonl(tmp_path / "data.jsonl", tmp_path)
    assert said in str(caught.value) and "data.jsonl" in str(caught.value)


def test_a_datasets_file_that_is_one_list(tmp_path: Path) -> None:
    (tmp_path / "test.json").write_text('[{"img_name": "a.png"}]')
    with pytest.raises(pm.InputError, match="one JSON list, not JSON lines; of a dataset pass the folder"):
        rows_from_jsonl(tmp_path / "test.json")


def test_data_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes(b"\xff")
    for name in ("latin.jsonl", "nowhere.jsonl", "."):
        with pytest.raises(pm.InputError):
            rows_from_jsonl(tmp_path / name)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures, three bright (a fracture) and three dark, one flat; two kinds of question and one outside."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for i, brightness in enumerate([220, 200, 190, 40, 60, 70]):
        noise = rng.integers(-30, 31, (32, 32)) if i != 5 else np.zeros((32, 32))
        Image.fromarray(np.clip(brightness + noise, 0, 255).astype(np.uint8)).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "question": "is there a fracture?", "answer": "Yes." if i < 3 else "no", "category": "finding"})
        rows.append({"image": f"{i}.png", "question": "which plane", "answer": "axial", "category": "plane"})
    rows.append({"image": "0.png", "question": "asdf", "answer": "?"})
    (folder / "val.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "train.jsonl").write_text("\n".join(json.dumps({**row, "answer": "axial"}) for row in rows))
    tiny_bundle(folder / "bundle")
    return folder


def test_the_whole(data: Path) -> None:
    predictor, rows = pm.load(data / "bundle"), rows_from_jsonl(data / "val.jsonl", data)
    document = evaluation(predictor, rows, data, rows_from_jsonl(data / "train.jsonl"))
    assert document == evaluation(predictor, rows, data, rows_from_jsonl(data / "train.jsonl"))
    json.dumps(document, allow_nan=False)
    assert (document["n"], document["images"]) == (13, 6)
    by = document["by"]
    assert by["category"]["finding"]["accuracy"] == 1 and by["category"]["none"]["accuracy"] == 0
    assert {name: kind["n"] for name, kind in by["kind"].items()} == {"fracture": 6, "outside": 1, "plane": 6}
    assert document["accuracy"] == pytest.approx((6 + 6 * by["category"]["plane"]["accuracy"]) / 13)
    assert document["ci95"][0] <= document["accuracy"] <= document["ci95"][1]
    assert document["abstentions"] == {"the picture does not look like a radiology image": 2, OUTSIDE: 1}
    assert document["coverage"] == pytest.approx(10 / 13)
    assert document["binary"]["fracture"] == {"n": 6, "positives": 3, "auroc": 1.0, "ci95": [1.0, 1.0]}
    baselines = document["baselines"]
    assert baselines["majority"]["accuracy"] == pytest.approx((3 + 6) / 13)  # "no" for fracture, "axial" for plane
    assert baselines["question_only"]["accuracy"] == pytest.approx(6 / 13)  # the training rows say "axial" to everything
    assert baselines["shuffled_image"]["accuracy"] < document["accuracy"]
    assert document["curve"][-1][0] == pytest.approx(12 / 13)
    challenge = document["counts"]["vqa-med-2019"]
    assert (challenge["n"], challenge["accuracy"], challenge["bleu"]) == (13, document["accuracy"], document["accuracy"])  # single words
    assert challenge["ci95"] == challenge["bleu_ci95"] == document["ci95"]
    assert {name: of["accuracy"] for name, of in challenge["baselines"].items()} == {n: of["accuracy"] for n, of in baselines.items()}
    assert challenge["by"]["category"].keys() == by["category"].keys() and challenge["by"]["category"]["finding"]["bleu"] == 1


def test_what_cannot_be_measured_is_null(data: Path) -> None:
    document = evaluation(pm.load(data / "bundle"), [Row("0.png", "asdf", "?")], data)
    assert document["baselines"] == {"majority": None, "question_only": None, "shuffled_image": None}
    assert document["selective_accuracy"] is None and document["ece"] is None and document["binary"] == {} and document["curve"] == []
    json.dumps(document, allow_nan=False)


@pytest.mark.parametrize(
    ("head", "kinds", "binary", "said"),
    [("qcr", {"closed": 7, "open": 6}, {"closed"}, 12), ("mevf", {}, set(), 12), ("blind", {}, set(), 9)],
)
def test_the_whole_of_a_head_that_reads_words(data: Path, head: str, kinds: dict[str, int], binary: set[str], said: int) -> None:
    predictor, rows = pm.load(tiny_bundle(data / head, head)), rows_from_jsonl(data / "val.jsonl", data)
    document = evaluation(predictor, rows, data, rows_from_jsonl(data / "train.jsonl"))
    json.dumps(document, allow_nan=False)
    one_by_one = [normalised(predictor.ask(data / row.image, row.question).candidates[0].answer) for row in rows]
    assert document["accuracy"] == np.mean([a == normalised(row.answer) for a, row in zip(one_by_one, rows, strict=True)]) == said / 13
    assert {name: kind["n"] for name, kind in document["by"]["kind"].items()} == kinds and set(document["binary"]) == binary
    assert document["abstentions"] == {"the kind of question is not sure, or no word of it is known": 1}
    baselines = document["baselines"]
    assert baselines["majority"]["accuracy"] == baselines["question_only"]["accuracy"] == 6 / 13  # the training rows all say "axial"
    assert (baselines["shuffled_image"]["accuracy"] < document["accuracy"]) == (head != "blind")
    assert evaluation(predictor, rows, data)["baselines"]["majority"] is None


def test_a_majority_of_some_kinds_is_not_mixed_with_that_of_the_training_rows(data: Path) -> None:
    closed, opened = tiny_manifest("qcr").kinds
    predictor = pm.load(tiny_bundle(data / "some", "qcr", kinds=(closed, replace(opened, majority=3))))
    rows = rows_from_jsonl(data / "val.jsonl", data)
    assert evaluation(predictor, rows, data, rows)["baselines"]["majority"]["accuracy"] == 0  # "coronal" to the six about the plane


def test_towers_alone_answer_nothing(data: Path) -> None:
    predictor = pm.load(tiny_bundle(data / "towers", None))
    with pytest.raises(pm.UsageError, match="has no head"):
        evaluation(predictor, [Row("missing.png", "?", "yes")], data)


@pytest.mark.parametrize(("head", "names"), [("lite", ["med"]), ("mevf", ["med"]), ("qcr", []), (None, ["med"])])
def test_a_head_that_does_not_look_through_the_tower(tmp_path: Path, head: str | None, names: list[str]) -> None:
    predictor = pm.load(tiny_bundle(tmp_path / "b", head, provenance={"clip": {"data": ["med"]}}))
    assert about_bundle(predictor)["tower_trained_on"] == names


# Six questions about three images, with what a model says; "b" has two of its closed ones right.
TABLE = [
    (Row("a", "where is it?", "Left lung.", "organ", "open"), "left lung"),
    (Row("a", "is it big?", "yes", "other", "closed"), "yes"),
    (Row("b", "where is it?", "right lung", "organ", "open"), "left lung"),
    (Row("b", "is it big?", "no", "other", "closed"), "no"),
    (Row("b", "is it old?", "no", "other", "closed"), "no"),
    (Row("c", "is it new?", "yes", "other", "closed"), "no"),
]
TRAIN = [
    Row("x", "where is it?", "right lung", "organ", "open"),
    Row("x", "what is it?", "a cyst", "other", "open"),
    Row("y", "what is it?", "a cyst", "other", "open"),
    Row("y", "is it big?", "yes", "other", "closed"),
    Row("z", "is it sharp?", "no", "other", "closed"),
    Row("z", "is it flat?", "no", "other", "closed"),
]


def says(answers: list[str]) -> Any:
    """A model that says this where every row is asked of its own image, and else nothing right."""

    def asked(picture: Any) -> Decisions:
        own = (picture == [0, 0, 1, 1, 1, 2]).all()
        return Decisions(answers if own else ["?"] * 6, np.full(6, 0.5), [None] * 6)

    return asked


def test_the_table_by_type() -> None:
    rows = [row for row, _ in TABLE]
    document, right = figures(rows, says([answer for _, answer in TABLE]), {"name": "m"}, TRAIN)
    assert right.tolist() == [True, True, False, True, True, False]
    types, overall = document["by"]["type"], document["baselines"]
    assert {name: (group["n"], group["accuracy"]) for name, group in types.items()} == {"open": (2, 0.5), "closed": (4, 0.75)}
    assert document["accuracy"] == pytest.approx(4 / 6) and document["by"]["kind"] == {} and document["binary"] == {}
    assert document["by"]["category"]["organ"]["accuracy"] == 0.5 and "baselines" not in document["by"]["category"]["organ"]
    counted = {
        name: [types[t]["baselines"][name]["accuracy"] for t in ("open", "closed")] + [overall[name]["accuracy"]] for name in overall
    }
    assert counted == {
        "majority": [0, 0.5, pytest.approx(2 / 6)],  # always "a cyst", always "no"
        "question_only": [0.5, 0.5, pytest.approx(3 / 6)],  # "right lung" and "yes" by their words, else "no"
        "shuffled_image": [0, 0, 0],
    }
    assert (overall["majority"]["gain"], types["open"]["baselines"]["majority"]["gain"]) == (pytest.approx(2 / 6), 0.5)
    gain, count = np.array([2, 0, 0]), np.array([2, 3, 1])  # over "a cyst" and "no": both questions of the first image
    draws = np.stack(np.meshgrid(*[range(3)] * 3), -1).reshape(-1, 3)
    values = gain[draws].sum(1) / count[draws].sum(1)
    assert overall["majority"]["gain_ci95"] == pytest.approx([values.min(), values.max()])
    assert document["model"] == {"name": "m"} and document["coverage"] == 1
    json.dumps(document, allow_nan=False)
    assert figures(rows, says(["?"] * 6), {})[0]["baselines"]["majority"] is None  # no training rows


def test_answers_are_compared_as_the_caller_says() -> None:
    rows = [Row("a", "?", "the heart"), Row("b", "?", "lung")]
    model = lambda picture: Decisions(["heart", "lung"], np.ones(2), [None] * 2)  # noqa: E731
    assert figures(rows, model, {})[0]["accuracy"] == 0.5
    assert figures(rows, model, {}, same=lambda a: a.removeprefix("the "))[0]["accuracy"] == 1


def test_counts_of_others_stand_beside_our_own() -> None:
    """Three rows about two images; the second is counted by none, the third was taken for the other type."""
    rows = [Row("a", "?", "left lung", "organ", "open"), Row("b", "?", "no", "x", "closed", "para"), Row("b", "?", "t2", "x", "open")]
    kinds = ["open", "closed", "closed"]
    model = lambda picture: Decisions(["the left lung", "no", "t2"], np.ones(3), [None] * 3, kinds)  # noqa: E731
    document = figures(rows, model, {}, rows, counts=(VQA_MED_2019, MEVF, MEVF_ALL, QCR))[0]
    json.dumps(document, allow_nan=False)
    counts = document["counts"]
    assert document["accuracy"] == pytest.approx(2 / 3)
    assert {name: (of["n"], round(of["accuracy"], 3)) for name, of in counts.items()} == {
        "vqa-med-2019": (3, 0.667),
        "mevf": (2, 1.0),
        "mevf-all": (3, 1.0),
        "qcr": (3, 0.333),
    }
    assert counts["vqa-med-2019"]["bleu"] == pytest.approx((1 + 1 + (2 / 3 * 1 / 2) ** 0.25) / 3)
    assert "bleu" not in counts["mevf"] and counts["mevf"]["by"]["type"].keys() == {"open"}  # no closed row is free-form
    assert {t: (of["n"], of["accuracy"]) for t, of in counts["qcr"]["by"]["type"].items()} == {"closed": (2, 0.5), "open": (1, 0)}
    assert counts["qcr"]["baselines"]["question_only"]["accuracy"] == 1 / 3  # the most frequent answer, "left lung", to all
    assert document["counts"]["mevf"]["ci95"] == [1, 1]
    only_para = [Row("b", "?", "no", "x", "closed", "para")]
    nothing = figures(only_para, lambda picture: Decisions(["no"], np.ones(1), [None]), {}, counts=(MEVF,))[0]["counts"]["mevf"]
    assert nothing["n"] == 0 and nothing["accuracy"] is None and nothing["by"] == {"type": {}}


def test_the_difference_of_two_models() -> None:
    rows = [row for row, _ in TABLE]
    assert pictures_of(rows)[0] == ["a", "b", "c"]
    one, two = np.array([1, 1, 0, 1, 1, 0], bool), np.array([0, 1, 0, 0, 0, 1], bool)
    found = difference(rows, one, two, {"name": "other"})
    assert (found["accuracy"], found["difference"]) == (pytest.approx(2 / 6), pytest.approx(2 / 6))
    assert found["mcnemar"] == {"only_this": 3, "only_other": 1, "p": pytest.approx(2 * (1 + 4) / 16)}
    assert {k: v["difference"] for k, v in found["by"]["type"].items()} == {"open": 0.5, "closed": 0.25}
    assert found["against"] == {"name": "other"}
    # All resamples of three images, by hand: gains 1, 2, -1 over 2, 3, 1 rows.
    gain, count = np.array([1, 2, -1]), np.array([2, 3, 1])
    draws = np.stack(np.meshgrid(*[range(3)] * 3), -1).reshape(-1, 3)
    values = gain[draws].sum(1) / count[draws].sum(1)
    assert found["ci95"] == pytest.approx([values.min(), values.max()])  # 2.5% lies within the rarest draws, of 1 in 27
    back = difference(rows, two, one, {})
    assert back["difference"] == -found["difference"] and back["ci95"] == pytest.approx([-x for x in found["ci95"][::-1]])
    assert difference(rows, one, one, {})["mcnemar"]["p"] == 1
    assert difference(rows, (one.astype(float) + two) / 2, two, {})["mcnemar"] is None  # of several seeds there are no pairs


@pytest.mark.parametrize(("only_this", "only_other"), [(0, 0), (1, 0), (5, 5), (9, 1), (30, 12), (700, 601)])
def test_mcnemar_is_the_binomial_test(only_this: int, only_other: int) -> None:
    n, rng = only_this + only_other, np.random.default_rng(0)
    sample = np.abs(rng.binomial(n, 0.5, 200_000) - n / 2)
    assert mcnemar(only_this, only_other)["p"] == pytest.approx((sample >= abs(only_this - n / 2)).mean(), abs=0.005)


def test_several_seeds() -> None:
    rows = [row for row, _ in TABLE]
    answers = [["left lung", "yes", "right lung", "no", "no", "yes"], ["?", "yes", "?", "no", "no", "yes"], ["?"] * 6]
    found = seeds([figures(rows, says(a), {"seed": i})[0] for i, a in enumerate(answers)])
    assert (found["n"], found["mean"]) == (3, pytest.approx((1 + 4 / 6 + 0) / 3))
    assert found["std"] == pytest.approx(np.std([1, 4 / 6, 0], ddof=1))
    assert found["by"]["type"]["open"] == {"mean": pytest.approx(1 / 3), "std": pytest.approx(np.std([1, 0, 0], ddof=1))}
    assert [each["model"]["seed"] for each in found["each"]] == [0, 1, 2]


def test_rows_without_a_type_are_a_group_of_their_own_beside_those_with_one() -> None:
    rows = [Row("a", "?", "yes", type="closed"), Row("b", "?", "yes"), Row("c", "?", "yes")]
    right, other = np.array([True, True, False]), np.array([True, False, False])
    document, _ = figures(rows, lambda picture: Decisions(["yes", "yes", "no"], np.ones(3), [None] * 3), {})
    compared = difference(rows, right, other, {})["by"]["type"]
    assert document["by"]["type"].keys() == seeds([document, document])["by"]["type"].keys() == compared.keys() == {"closed", "none"}
    assert (compared["closed"]["difference"], compared["none"]["difference"]) == (0, 0.5)
    untyped = [Row(row.image, row.question, row.answer) for row in rows]
    assert difference(untyped, right, other, {})["by"]["type"] == {}


@pytest.mark.parametrize(
    ("provenance", "names"),
    [
        ({"clip": {"data": ["vqa-rad", "med"]}, "vqa": {"data": ["slake", "med"]}}, ["med", "slake", "vqa-rad"]),
        ({"clip": {"data": ["med"]}, "head": {"data": ["vqa-rad"]}, "export": {}}, ["med"]),
        ({"import": {"source": "ViT-B-32.pt"}}, []),
        ({"clip": "random", "vqa": {"data": 3}}, []),
    ],
    ids=["both stages", "a head leaves the tower as it is", "imported", "damaged"],
)
def test_what_the_tower_learned_from(provenance: dict[str, Any], names: list[str]) -> None:
    assert tower_trained_on(provenance) == names


def test_rows_may_say_their_answer_type(tmp_path: Path) -> None:
    lines = ['{"image": "a", "question": "q", "answer": "x", "answer_type": "%s"}' % t for t in ("CLOSED ", "open", "odd")]  # noqa: UP031
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    assert [row.type for row in rows_from_jsonl(tmp_path / "q.jsonl")] == ["closed", "open", None]
