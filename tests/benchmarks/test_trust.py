"""The trust benchmark: figures against a hand count, pictures that training never saw, and the whole on a tiny bundle."""

import ast
import inspect
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pmclip_deploy.answer import Answer, Candidate, ImageInfo, ModelInfo
from pmclip_deploy.benchmarks import (
    results,
    trust,
    trust_answers,
    trust_bench,
    trust_drawn,
    trust_pictures,
    trust_robustness,
    trust_sections,
    trust_table,
)
from pmclip_deploy.decision.evidence import NO_RADIOGRAPH
from pmclip_deploy.train import nonradiographs
from tests.sources import ROOT, modules
from tests.tiny.bundle import tiny_bundle

COLUMNS = 24


def answer(said: str | None, *candidates: tuple[str, float], reason: str | None = None, note: str | None = None) -> Answer:
    named = tuple(Candidate(*c) for c in candidates)
    image, model, share = ImageInfo("a", "png"), ModelInfo("b", "1", "fp32", "x", "cpu", ""), named[0].probability if named else 0.5
    return Answer("?", said, share, said is None, reason, named, image, model, note=note)


# --- figures --------------------------------------------------------------------------------------------------------------------


def test_share_counts_the_rows_that_are_taken() -> None:
    over = trust_bench.Over(["a", "a", "b", "c", "d", "e"], seed=0)
    figure = over.share([True, False, True, True, False, True], [True, True, True, True, True, False])
    assert (figure["of"], figure["n"], figure["value"]) == (3, 5, 0.6)
    low, high = figure["ci95"]
    assert 0 < low < 0.6 < high <= 1
    assert over.share([True] * 6, [False] * 6) == {"value": None, "n": 0, "of": 0}


def test_where_all_agree_the_interval_counts_groups_not_rows() -> None:
    each, together = trust_bench.Over(list("abcdefghij"), 0), trust_bench.Over(["a"] * 5 + ["b"] * 5, 0)
    assert each.share([False] * 10)["ci95"] == pytest.approx([0, 0.27753], abs=1e-4)  # Wilson's of 0 of 10
    assert each.share([True] * 10)["ci95"] == pytest.approx([1 - 0.27753, 1], abs=1e-4)
    assert together.share([False] * 10)["ci95"] == pytest.approx([0, 0.65762], abs=1e-4)  # of 0 of 2


def test_auroc_leaves_out_what_has_no_score() -> None:
    over, nan = trust_bench.Over(list("abcdef"), 0), float("nan")
    figure = over.auroc([0.9, 0.4, 0.6, 0.1, nan, nan], [True, True, False, False, True, False])
    assert (figure["value"], figure["n"], figure["positives"]) == (0.75, 4, 2)
    assert over.auroc([nan] * 6, [True] * 6) == {"value": None, "n": 0, "positives": 0}
    assert over.auroc([1, 2, 3, 4, 5, 6], [True] * 6)["value"] is None


def test_sensitivity_is_taken_where_nine_of_ten_negatives_are_below() -> None:
    truth = np.array([True] * 10 + [False] * 10)
    score = [9.5, 8.5, *range(8), *range(10)]  # of the negatives, nine of ten are 8 or less
    found = trust_bench.ranking(trust_bench.Over([str(i) for i in range(20)], 0), score, truth, np.ones(20, bool))
    assert found["sensitivity at specificity 0.90"]["of"] == 1  # 9.5 alone is above 9, the negatives' 0.9 quantile, taken from above


def test_a_baseline_learns_nothing_from_the_fold_that_it_scores() -> None:
    groups = [f"g{i}" for i in range(40)]
    truth = np.array([i % 2 == 0 for i in range(40)])
    own = trust_bench.out_of_fold(groups, truth, groups, seed=0)  # a key that no other fold has
    assert own == pytest.approx([0.5] * 40)
    told = trust_bench.out_of_fold(truth.tolist(), truth, groups, seed=0)
    assert min(np.array(told)[truth]) > 0.9 and max(np.array(told)[~truth]) < 0.1


# --- what is read of an answer --------------------------------------------------------------------------------------------------


def test_reading_an_answer() -> None:
    yes = answer("Yes", ("yes", 0.7), ("no", 0.3))
    assert (trust_answers.word(yes), trust_answers.best(yes), trust_answers.probability(yes)) == ("yes", "yes", 0.7)
    assert trust_answers.yes_minus_no(yes) == pytest.approx(0.4)
    assert trust_answers.word(answer("yes - in validation on hand radiographs 61 of 78 were right")) == "yes"
    none = answer(None, ("ct noncontrast", 0.2), reason=NO_RADIOGRAPH)
    assert trust_answers.word(none) is None and trust_answers.best(none) == "ct noncontrast" and trust_answers.turned_away(none)
    assert np.isnan(trust_answers.yes_minus_no(none)) and np.isnan(trust_answers.probability(answer(None)))
    assert not trust_answers.turned_away(answer(None, reason="the confidence 0.55 is under the bundle's threshold 0.60"))
    assert trust_answers.tells(answer("ct", note="the header says MR; the picture looks like a plain film"))
    assert not trust_answers.tells(answer("ct"))


@pytest.mark.parametrize(
    ("said", "truth", "right"),
    [
        ("ct noncontrast", "ct noncontrast", True),
        ("CT, detail not determined", "ct noncontrast", True),
        ("CT, detail not determined", "mr - flair", False),
        ("plain film, detail not determined", "xr - plain film", True),
        ("frontal, AP or PA not determined", "pa", True),
        ("frontal, AP or PA not determined", "lateral", False),
        ("axial", "transverse", True),
        ("coronal", "axial", False),
        ("breast", "gastrointestinal", False),
        ("with contrast", "contrast", True),
        ("without contrast", "contrast", False),
        ("with contrast, type not determined", "gi and iv", True),
        ("with contrast, type not determined", "noncontrast", False),
    ],
)
def test_a_coarser_answer_is_right_where_the_truth_is_one_of_it(said: str, truth: str, right: bool) -> None:
    assert trust_answers.is_right(answer(said, ("mr - flair", 0.4)), truth) is right


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("ct noncontrast", "ct noncontrast", True),
        ("ct noncontrast", "ct with iv contrast", False),
        ("CT, detail not determined", "ct noncontrast", True),
        ("CT, detail not determined", "mr - flair", False),
        ("CT, detail not determined", None, True),
        ("yes", "no", False),
    ],
)
def test_a_coarser_answer_contradicts_none_of_its_own(one: str, other: str | None, same: bool) -> None:
    pair = [answer(x, *([(x, 0.6)] if x and "," not in x else [("mr - flair", 0.4)])) for x in (one, other)]
    assert trust_answers.agree(*pair) is trust_answers.agree(*reversed(pair)) is same


def test_what_is_not_answered_is_judged_by_its_likeliest_candidate() -> None:
    assert trust_answers.is_right(answer(None, ("ap", 0.4), ("pa", 0.3)), "ap")
    assert not trust_answers.is_right(answer(None, ("ap", 0.4)), "frontal")
    assert not trust_answers.is_right(answer(None), "ap")


@pytest.mark.parametrize(
    ("modality", "said", "contradicts"),
    [
        ("MR", "xr - plain film", True),
        ("MR", "mr - flair", False),
        ("CT", "mr - adc map (app diff coeff)", True),
        ("XA", "xr - plain film", False),  # they look alike
        ("ES", "ct noncontrast", True),  # an endoscope's picture is none of radiology
        ("OT", "ct noncontrast", False),  # "other" says nothing
        (None, "ct noncontrast", False),
        ("MR", None, False),
    ],
)
def test_an_answer_contradicts_the_header(modality: str | None, said: str | None, contradicts: bool) -> None:
    assert trust_answers.contradicts(modality, answer(said)) is contradicts


# --- changes --------------------------------------------------------------------------------------------------------------------


def test_changes_keep_what_is_seen() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(1, 256, (40, 80), dtype=np.uint8))
    made = {name: np.asarray(change(picture)) for name, change in trust_robustness.CHANGES.items()}
    assert {name: x.shape for name, x in made.items()} == {
        "black border of 25%": (60, 120),
        "black border of 60%": (88, 176),
        "turned by 90 degrees": (80, 40),
        "half size": (20, 40),
        "crop of 10%": (32, 64),
        "JPEG quality 50": (40, 80),
    }
    wide = made["black border of 25%"]
    assert (wide[10:50, 20:100] == np.asarray(picture)).all() and wide.sum() == np.asarray(picture, int).sum()
    assert (made["crop of 10%"] == np.asarray(picture)[4:36, 8:72]).all()
    assert (np.rot90(np.asarray(picture)) == made["turned by 90 degrees"]).all()


# --- pictures that are no radiology ---------------------------------------------------------------------------------------------


def test_no_picture_is_one_of_training() -> None:
    found, _ = trust_pictures.bases(Path("/"), 0)
    assert len(found) >= 200 and len({base.kind for base in found}) >= 15
    assert not {base.name for base in found} & {*nonradiographs.PHOTOGRAPHS, "motorcycle_right.png"}  # the last is one of a pair


def functions_of(text: str) -> dict[str, str]:
    """{name: what it does, whatever its name}"""
    return {node.name: str([*map(ast.dump, node.body)]) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)}


def not_apart(files: list[Path]) -> list[Path]:
    """Those that name what `trust` measures on, or hold a copy of one of its drawings."""
    functions = functions_of(inspect.getsource(trust_drawn))
    drawings = {functions[draw.__name__] for draw, _ in trust_drawn.DRAWN.values()}
    texts = {path: path.read_text(encoding="utf-8") for path in files}
    return [path for path, text in texts.items() if "trust_" in text or drawings & {*functions_of(text).values()}]


@pytest.mark.parametrize(
    "text",
    [
        "from pmclip_deploy.benchmarks.trust_drawn import DRAWN",
        "from pmclip_deploy.benchmarks import trust_pictures",
        inspect.getsource(trust_drawn._chart).replace("_chart", "page"),
    ],
)
def test_training_uses_no_picture_of_trust(tmp_path: Path, text: str) -> None:
    assert not not_apart(modules("train"))
    (tmp_path / "drawings.py").write_text(text, encoding="utf-8")
    assert not_apart([tmp_path / "drawings.py"])


def test_a_source_that_is_not_there_is_told(tmp_path: Path) -> None:
    _, missing = trust_pictures.bases(tmp_path, 0)
    assert missing["photographs of mate-backgrounds"] == "apt-get download mate-backgrounds"
    assert len([what for what in missing if what.endswith(("opencv-doc", "tuxpaint-stamps-default", "kgeography-data"))]) == 3


def test_pictures_follow_from_the_seed_alone(tmp_path: Path) -> None:
    place = tmp_path / "usr/share/backgrounds/mate/nature"
    place.mkdir(parents=True)
    Image.new("RGB", (900, 600), "green").save(place / "Meadow.jpg")
    less, more = trust_pictures.bases(tmp_path / "nothing", 3)[0], trust_pictures.bases(tmp_path, 3)[0]
    assert [base.name for base in more if base.source != "mate-backgrounds"] == [base.name for base in less]
    chosen = {base.kind: base for base in more if base.source == "drawn"}
    assert chosen.keys() == trust_pictures.DRAWN.keys()
    for base in chosen.values():
        again = next(b for b in less if b.name == base.name)
        for (name, pixels), (other, same) in zip(trust_pictures.variants(base, 3), trust_pictures.variants(again, 3), strict=True):
            assert name == other and pixels.dtype == np.uint8 and (pixels == same).all()
    meadow = next(base for base in more if base.source == "mate-backgrounds")
    made = dict(trust_pictures.variants(meadow, 3))
    assert list(made) == list(trust_pictures.VARIANTS)
    assert made["as it is"].shape == (256, 384, 3) and made["grey"].shape == (256, 384)
    wide = made["grey, bordered"]
    assert wide.shape[0] > 256 and not wide[0].any() and not wide[:, 0].any() and wide.max() == made["grey"].max()


# --- the whole ------------------------------------------------------------------------------------------------------------------


def picture(path: Path, level: int) -> None:
    """A tiny bundle says "fracture" where the level is high. Some contrast, without which it sees no radiograph."""
    pixels = np.full((COLUMNS, COLUMNS), level, np.uint8)
    pixels[::2] += 40
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=95)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sets of a few pictures in the layout of the real ones: FracAtlas' fractures are bright."""
    folder = tmp_path_factory.mktemp("data")
    bone, chest, questions, slake = list[Any](), list[Any](), list[Any](), list[Any]()
    for i in range(12):
        for name, rows, level in (("fracatlas", bone, 200 if i % 2 else 30), ("kermany-cxr", chest, 60 + i)):
            picture(folder / name / "images" / f"{i}.jpg", level)
            labels = {
                **dict.fromkeys(trust_sections.REGIONS, 0),
                trust_sections.REGIONS[i // 2 % 2]: 1,
                "fractured": i % 2,
                "finding": ("normal", "pneumonia")[i % 2],
            }
            rows.append({"image": f"images/{i}.jpg", "group": f"g{i // 2}", "original_size": [400, 300], "labels": labels})
        picture(folder / "vqa-med-2019" / "images" / f"v{i}.jpg", 20 * i)
        asked = {"modality": ("which modality?", "an - angiogram" if i % 3 else "xr - plain film"), "plane": ("which plane?", "axial"),
                 "organ": ("which organ?", "breast"), "abnormality": ("what is abnormal in the x-ray?", "fracture")}  # fmt: skip
        questions += [{"image": f"v{i}.jpg", "category": c, "question": q, "answer": a} for c, (q, a) in asked.items()]
        picture(folder / "slake" / "imgs" / f"xmlab{i}" / "source.jpg", 20 * i)
        slake.append({"img_name": f"xmlab{i}/source.jpg", "modality": "MRI", "answer": "T2" if i % 2 else "MRI"})
    for name, rows in (("fracatlas/labels.jsonl", bone), ("kermany-cxr/labels.jsonl", chest), ("vqa-med-2019/val.jsonl", questions)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for split, rows in (("train", slake), ("validate", []), ("test", [])):
        (folder / "slake" / f"{split}.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


def run(tmp_path: Path, *arguments: object) -> dict[tuple[str, str], dict[str, Any]]:
    """{(part, pictures): figures} of a run."""
    output = tmp_path / "rows.jsonl"
    assert trust.main([*map(str, arguments), "--output", str(output)]) == 0
    return {(row["part"], row["scenario"]): row["figures"] for row in results.read(output)}


def test_every_section_on_a_tiny_bundle(data: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = run(tmp_path, "--data", data, "--bundle", bundle, "--limit", 4, "--pictures", tmp_path)
    assert {part.partition(":")[0] for part, _ in figures} == set(trust.SECTIONS)
    said = capsys.readouterr().out
    assert "## At a glance" in said and "| ... and nothing says so |" in said and str(tmp_path) not in said
    assert all(
        figures["radiology: turned away", f"all sets, {family}"]["turned away"]["value"] in (0, None) for family in ("XR", "CT", "MR")
    )
    common = figures["radiology: turned away", "VQA-Med 2019 val, XR, CT, MR and US"]["turned away"]
    assert 0 < common["n"] < figures["radiology: turned away", "VQA-Med 2019 val"]["turned away"]["n"]  # not the one without a family
    films, yes_or_no, weighted = (
        figures[part, "SLAKE"][figure]["n"]
        for part, figure in (
            ("radiology: turned away", "turned away"),
            ("confidence: modality yes/no", "answered"),
            ("confidence: weighting", "answered"),
        )
    )
    assert 0 < weighted < films and yes_or_no == 2 * films + 2 * weighted  # is it a CT, an MRI, and where that is known T1, T2
    unseen = figures["no radiology: turned away", "photographs of opencv-doc"]
    assert unseen == {}  # not measured, and said so
    assert "not measured: not there; apt-get download opencv-doc" in said


def test_figures_of_a_bundle_whose_answers_are_known(data: Path, bundle: Path, tmp_path: Path) -> None:
    figures = run(tmp_path, "--data", data, "--bundle", bundle, "--only", "findings", "--only", "consistency", "--only", "robustness")
    fracture = figures["findings: is there a fracture?", "FracAtlas, all"]
    assert (fracture["AUROC"]["value"], fracture["AUROC"]["n"], fracture["AUROC"]["positives"]) == (1, 12, 6)
    assert (fracture["right of yes"]["of"], fracture["right of yes"]["n"]) == (6, 6)
    assert fracture["yes where it is not"]["of"] == 0 and fracture["right of the majority answer"]["value"] == 0.5
    assert fracture["AUROC of picture size alone"]["value"] == 0.5  # all are of one size
    assert figures["findings: is there a fracture?", "FracAtlas, hand"]["AUROC"]["n"] == 6
    assert figures["findings: is there a fracture?", "FracAtlas, hip"]["AUROC"]["n"] == 0
    assert figures["consistency: is the bone intact?", "FracAtlas, all"]["answered"]["of"] == 0  # no word of it is known
    half = figures["robustness: half size: fracture", "FracAtlas"]
    assert half["accuracy before"]["value"] == half["accuracy after"]["value"] == 1 and half["another answer, of given"]["of"] == 0
    other, contradicts = "another answer, of given", "... that contradicts it"
    changes = [row for (part, _), row in figures.items() if part.startswith("robustness: ")]
    assert all(row[contradicts]["of"] <= row[other]["of"] for row in changes if contradicts in row)
    assert half[contradicts]["of"] == 0 and contradicts not in figures["robustness: half size: modality family", "FracAtlas"]
    wide = figures["robustness: black border of 60%: fracture", "FracAtlas"]  # so dark that all bones are whole
    assert wide["accuracy after"]["value"] == 0.5


def test_each_fold_is_asked_of_what_it_keeps_apart(data: Path, bundle: Path, tmp_path: Path) -> None:
    """The second bundle says no where the first says yes, and is asked of the groups of its file."""
    swapped = tiny_bundle(tmp_path / "swapped", answers=("axial", "coronal", "sagittal", "no", "yes"))
    (tmp_path / "a.txt").write_text("fracatlas g0\nfracatlas g1\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("fracatlas g4\n\n", encoding="utf-8")
    options = ["--bundle", bundle, "--apart", tmp_path / "a.txt", "--bundle", swapped, "--apart", tmp_path / "b.txt", "--only", "findings"]
    found = run(tmp_path, "--data", data, *options)
    fracture = found["findings: is there a fracture?", "FracAtlas, all"]
    assert (fracture["answered"]["n"], fracture["right of yes"]["of"], fracture["right of yes"]["n"]) == (6, 2, 3)
    assert found["findings: is there pneumonia?", "Kermany"]["answered"]["n"] == 12  # no file names it: all of them


def test_groups_are_those_that_training_names(data: Path, bundle: Path, tmp_path: Path) -> None:
    """Kermany's normal films are all of group "NIM" by their labels; training keeps tens of file numbers together."""
    home = tmp_path / "kermany-cxr"
    shutil.copytree(data / "kermany-cxr", home)
    rows = [json.loads(line) for line in (home / "labels.jsonl").read_text().splitlines()]
    for number, row in zip((115, 117, 121), rows[::2], strict=False):  # the normal ones
        old = row["image"]
        row |= {"image": f"images/IM-{number:04}-0001.jpg", "group": "NIM"}
        (home / old).rename(home / row["image"])
    (home / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.txt").write_text("kermany-cxr NIM11\nkermany-cxr g5\n")
    found = run(tmp_path, "--data", tmp_path, "--bundle", bundle, "--apart", tmp_path / "a.txt", "--only", "findings")
    assert found["findings: is there pneumonia?", "Kermany"]["answered"]["n"] == 2 + 2


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "--data"),
        (["--data", "nosuch"], 2, "--data"),
        (["--data", ".", "--limit", "1"], 2, "--limit"),
        (["--data", ".", "--bundle", "a", "--bundle", "b"], 2, "--apart"),
        (["--data", ".", "--apart", "nosuch.txt"], 3, "nosuch.txt"),
        (["--rows", "nosuch.jsonl"], 3, "nosuch.jsonl"),
    ],
)
def test_errors_are_one_line(arguments: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert trust.main(arguments) == code
    said = capsys.readouterr().err
    assert says in said and said.startswith("error: ") and said.count("\n") == 1


def test_a_file_of_groups_names_sets_that_are_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("fracatlas g0\nmimic p1\n", encoding="utf-8")
    assert trust.main(["--data", str(tmp_path), "--apart", str(tmp_path / "a.txt")]) == 3
    assert '"mimic p1" is no line "SET GROUP"' in capsys.readouterr().err


# --- the page -------------------------------------------------------------------------------------------------------------------


def row(sha256: str, time: str, limit: int | None = None, part: str = "findings: is there a fracture?", **figures: Any) -> results.Row:
    environment = {"bundle": {"name": "m", "version": "1", "sha256": sha256}, "limit": limit}
    return results.Run("command", environment, sha256, time).row("m", "s", part, "FracAtlas, all", figures, threads=None)


def test_a_table_has_a_column_for_each_bundle_the_oldest_first() -> None:
    auroc = {"value": 0.9, "n": 1000, "ci95": [0.88, 0.92]}
    rows = [row("b", "2026-02", AUROC=auroc), row("a", "2026-01", AUROC={**auroc, "value": 0.5}), row("c", "2026-03", limit=3, AUROC=auroc)]
    text = trust_table.markdown(rows)
    assert "| measured | m 1 a | m 1 b | required | aim |" in text
    assert '| "is there a fracture?": AUROC | 0.500 [0.880, 0.920], n 1,000 | 0.900 [0.880, 0.920], n 1,000 | 0.90 | 0.93 |' in text
    assert "m 1 c" not in text and "m 1 c" in trust_table.markdown(rows, limited=True)
    newer = row("a", "2026-04", AUROC={**auroc, "value": 0.7})
    assert "0.500" not in trust_table.markdown([*rows, newer]) and "0.700" in trust_table.markdown([*rows, newer])


def test_a_bundle_whose_answers_follow_other_rules_has_a_column_of_its_own() -> None:
    rows = [row("a", "2026-01", AUROC={"value": 0.5, "n": 9}), row("a", "2026-02", AUROC={"value": 0.7, "n": 9})]
    rows[1]["environment"]["answers"] = "pmclip-deploy/answers/2"
    assert "| measured | m 1 a | m 1 a, answers/2 | required | aim |" in trust_table.markdown(rows)


def test_what_was_not_measured_is_said() -> None:
    text = trust_table.markdown([row("a", "2026-01", AUROC={"value": None, "n": 0}, **{"right of no": {"value": None, "n": 0, "of": 0}})])
    assert "not measured: no score" in text and "| none |" in text
    assert re.search(r"radiology: turned away \| not measured \|", text)


def test_every_line_at_a_glance_is_a_figure_that_the_benchmark_makes() -> None:
    made = {(r["part"], r["scenario"], figure) for r in results.read(ROOT / "benchmarks/results/trust.jsonl.gz") for figure in r["figures"]}
    assert not [words for words, part, pictures, figure, _, _ in trust_table.GLANCE if (part, pictures, figure) not in made]


def test_the_pages_are_made_from_the_rows(tmp_path: Path) -> None:
    options = ["--rows", str(ROOT / "benchmarks/results/trust.jsonl.gz")]
    stored = {name: (ROOT / "docs/measured" / name).read_text(encoding="utf-8") for name in ("trust.md", "model.md")}
    for (name, text), mark in zip(stored.items(), (trust_table.START, trust_table.GLANCE_START), strict=True):
        before, _, rest = text.partition(mark)
        (tmp_path / name).write_text(f"{before}{mark}\nstale\n{trust_table.END}{rest.partition(trust_table.END)[2]}", encoding="utf-8")
        options += ["--markdown", str(tmp_path / name)]
    assert trust.main(options) == 0
    assert {name: (tmp_path / name).read_text(encoding="utf-8") for name in stored} == stored
    glance = stored["trust.md"].partition("## At a glance\n\n")[2].partition("\n\n")[0]
    assert glance.startswith("| measured |") and glance in stored["model.md"]


def test_a_page_without_marks_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("mine", encoding="utf-8")
    assert trust.main(["--rows", str(ROOT / "benchmarks/results/trust.jsonl.gz"), "--markdown", str(page)]) == 2
    assert page.read_text(encoding="utf-8") == "mine" and "the lines" in capsys.readouterr().err


def test_the_ece_of_perfect_confidences_is_that_of_chance() -> None:
    rng = np.random.default_rng(0)
    few, many = (trust_sections._ece_by_chance(rng.uniform(0.5, 1, n), np.ones(n, bool), 0) for n in (40, 20_000))
    assert 0.08 < few["value"] < 0.16 and many["value"] < 0.01 and (few["n"], many["n"]) == (40, 20_000)
    assert trust_sections._ece_by_chance(np.array([0.5]), np.zeros(1, bool), 0) == {"value": None, "n": 0}
