"""Datasets: every layout on a small folder of its exact form, broken rows, answer vocabularies, splits by image, the report."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pmclip_deploy.console import decimal
from pmclip_deploy.errors import InputError
from pmclip_deploy.evaluation import rows
from pmclip_deploy.evaluation.counting import CONTRACTIONS, answer_as_mevf
from pmclip_deploy.train.datasets import Question, image_key, images_there, normalised, pairs_from_folder, questions_from_folder
from pmclip_deploy.train.datasets.schema import BROKEN_SHARE
from pmclip_deploy.train.datasets.vqa_med import category_of
from pmclip_deploy.train.report import report_from_folder
from pmclip_deploy.train.splits import image_disjoint_split, image_groups, without_pictures_of
from pmclip_deploy.train.vocabulary import vocabulary_as_mevf, vocabulary_as_qcr
from tests.command import Result, is_one_line

Told = tuple[str, str, str, str, bool]  # image below the folder, question, answer, category, closed


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.kron(np.random.default_rng(seed).integers(0, 256, (8, 8)), np.ones((8, 8))).astype(np.uint8)).save(path)


def vqa_rad(folder: Path) -> None:
    row = {"image": "synpic1.jpg", "question_type": "PRES, POS", "phrase_type": "freeform"}
    rows = [
        row | {"question": " Is there  air? ", "answer": "Yes.", "answer_type": "CLOSED", "official_split": "train"},
        row | {"question": "Left or right?", "answer": "Left", "answer_type": "CLOSED", "question_type": "POS", "official_split": "test"},
        row | {"question": "What plane?", "answer": "Axial", "answer_type": "OPEN", "question_type": "PLANE", "official_split": "train"},
    ]
    write(folder / "questions.jsonl", jsonl(rows))


def mevf(folder: Path) -> None:
    row = {"qid": 1, "image_name": "synpic1.jpg", "image_organ": "HEAD", "phrase_type": "freeform"}
    train = row | {"question": "How many?", "answer": 4, "answer_type": "OPEN", "question_type": "COUNT"}
    test = row | {"question": "Is it an MRI?", "answer": "yes", "answer_type": "CLOSED ", "question_type": "MODALITY"}
    write(folder / "trainset.json", json.dumps([train]))
    write(folder / "testset.json", json.dumps([test], indent=2))
    (folder / "VQA_RAD Image Folder").mkdir()


def osf(folder: Path) -> None:
    row = {
        "qid": "0",
        "image_name": "synpic1.jpg",
        "question_frame": "Is/Are there air?",
        "question_rephrase": "NULL",
        "question_type": "ABN",
    }
    rows = [
        row | {"phrase_type": "freeform", "question": "Is there air?", "answer": "No", "answer_type": "CLOSED"},
        row | {"phrase_type": "test_para", "question": "Is air seen?", "answer": "no ", "answer_type": "closed "},
        row | {"phrase_type": "para", "question": "What is it?", "answer": "a cyst", "answer_type": " OPEN", "question_type": "OTHER"},
    ]
    write(folder / "VQA_RAD Dataset Public.json", json.dumps(rows))


def slake(folder: Path) -> None:
    row = {"img_id": 1, "img_name": "xmlab1/source.jpg", "base_type": "vqa", "location": "Abdomen", "triple": ["vhead", "_", "_"], "qid": 0}
    english = row | {"question": "Is it liver or lung?", "answer": "Lung", "q_lang": "en", "answer_type": "CLOSED", "content_type": "Organ"}
    chinese = row | {"question": "图像?", "answer": "肺", "q_lang": "zh", "answer_type": "OPEN", "content_type": "Organ"}
    size = row | {"question": "How large?", "answer": "big", "q_lang": "en", "answer_type": "OPEN", "content_type": "Size"}
    write(folder / "train.json", json.dumps([english, chinese]))
    write(folder / "validate.json", json.dumps([size]))
    write(folder / "test.json", json.dumps([chinese, size]))


def vqa_med(folder: Path) -> None:
    rows = [
        {"image": "synpic1.jpg", "category": "modality", "question": "is this a ct scan?", "answer": "no"},
        {"image": "synpic1.jpg", "category": "plane", "question": "what plane?", "answer": "axial"},
    ]
    write(folder / "train.jsonl", jsonl(rows))
    write(folder / "val.jsonl", jsonl(rows[1:]))


def vqa_med_by_category(folder: Path) -> None:
    asked = {
        "C1_Modality": "is this a ct scan?|no",
        "C2_Plane": "what plane?|axial",
        "C3_Organ": "what?|lung",
        "C4_Abnormality": "what?|a|b",
    }
    for name, text in asked.items():
        write(folder / f"ImageClef-2019-VQA-Med-Training/QAPairsByCategory/{name}_train.txt", f"synpic1|{text}\r\n")
    (folder / "ImageClef-2019-VQA-Med-Training" / "Train_images").mkdir()


def vqa_med_all(folder: Path) -> None:
    write(folder / "All_QA_Pairs_val.txt", "synpic2|what plane is this?|axial\nsynpic2|what is abnormal in the ct scan?|cyst\n\n")
    write(folder / "VQAMed2019Test/VQAMed2019_Test_Questions_w_Ref_Answers.txt", "synpic3|organ|what is it?|lung\n")


IN_IMAGES = "images/synpic1.jpg"
LAYOUTS: dict[Callable[[Path], None], dict[str, list[Told]]] = {
    vqa_rad: {
        "train": [(IN_IMAGES, "is there air?", "yes", "abnormality", True), (IN_IMAGES, "what plane?", "axial", "plane", False)],
        "test": [(IN_IMAGES, "left or right?", "left", "other", True)],
        "all": [
            (IN_IMAGES, "is there air?", "yes", "abnormality", True),
            (IN_IMAGES, "left or right?", "left", "other", True),
            (IN_IMAGES, "what plane?", "axial", "plane", False),
        ],
    },
    mevf: {
        "train": [("VQA_RAD Image Folder/synpic1.jpg", "how many?", "4", "other", False)],
        "test": [("VQA_RAD Image Folder/synpic1.jpg", "is it an mri?", "yes", "modality", True)],
    },
    osf: {
        "train": [(IN_IMAGES, "is there air?", "no", "abnormality", True), (IN_IMAGES, "what is it?", "a cyst", "other", False)],
        "test": [(IN_IMAGES, "is air seen?", "no", "abnormality", True)],
    },
    slake: {
        "train": [("imgs/xmlab1/source.jpg", "is it liver or lung?", "lung", "organ", True)],
        "val": [("imgs/xmlab1/source.jpg", "how large?", "big", "other", False)],
        "test": [("imgs/xmlab1/source.jpg", "how large?", "big", "other", False)],
    },
    vqa_med: {
        "train": [(IN_IMAGES, "is this a ct scan?", "no", "modality", True), (IN_IMAGES, "what plane?", "axial", "plane", False)],
        "val": [(IN_IMAGES, "what plane?", "axial", "plane", False)],
    },
    vqa_med_by_category: {
        "train": [
            ("ImageClef-2019-VQA-Med-Training/Train_images/synpic1.jpg", question, answer, category, answer == "no")
            for question, answer, category in [
                ("is this a ct scan?", "no", "modality"),
                ("what plane?", "axial", "plane"),
                ("what?", "lung", "organ"),
                ("what?", "a|b", "abnormality"),
            ]
        ]
    },
    vqa_med_all: {
        "val": [
            ("Val_images/synpic2.jpg", "what plane is this?", "axial", "plane", False),
            ("Val_images/synpic2.jpg", "what is abnormal in the ct scan?", "cyst", "abnormality", False),
        ],
        "test": [("VQAMed2019Test/VQAMed2019_Test_Images/synpic3.jpg", "what is it?", "lung", "organ", False)],
    },
}


@pytest.mark.parametrize(("make", "split"), [(make, split) for make, splits in LAYOUTS.items() for split in splits])
def test_a_layout_is_recognised_and_read(make: Callable[[Path], None], split: str, tmp_path: Path) -> None:
    make(tmp_path)
    told = [
        (str(q.image.relative_to(tmp_path)), q.question, q.answer, q.category, q.closed) for q in questions_from_folder(tmp_path, split)
    ]
    assert told == LAYOUTS[make][split]


@pytest.mark.parametrize("make", LAYOUTS)
def test_a_split_that_is_not_there_is_refused(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path)
    there = set(LAYOUTS[make]) - {"all"}
    for split in {"train", "val", "test", "holdout"} - there:
        with pytest.raises(InputError, match=f"no split '{split}'.*holds {'.*'.join(sorted(there, key=['train', 'val', 'test'].index))}"):
            questions_from_folder(tmp_path, split)
    assert len(questions_from_folder(tmp_path, "all")) == sum(len(told) for split, told in LAYOUTS[make].items() if split != "all")


ROW = '{"image": "a.png", "category": "plane", "question": "?", "answer": "axial"}\n'
NO_CATEGORY = '{"image": "a.png", "question": "?", "answer": "axial"}\n'


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("train.jsonl", ROW + '{"image": "a.png"', "line 2: not a JSON object"),
        ("train.jsonl", ROW + "\n" + NO_CATEGORY, "line 3: no 'category'"),
        ("train.jsonl", ROW + "[" * 100_000, "line 2: not a JSON object"),
        ("train.jsonl", ROW + ROW.replace('"axial"', "null"), "line 2: no 'answer'"),
        ("train.jsonl", ROW.encode() + b"\xff\xfe\n", "line 2: not UTF-8"),
        ("train.jsonl", "", "split 'train' is empty"),
        ("questions.jsonl", "7\n", "line 1: not a JSON object"),
        ("trainset.json", "[{}", "line 1: not JSON"),
        ("trainset.json", '{"a": 1}', "not a list"),
        ("trainset.json", '[{"image_name": "a", "question": "?"}]', "entry 1: no 'answer'"),
        ("trainset.json", "[" * 100_000, "not JSON"),
        ("train.json", b'["\xff"]', "not JSON in UTF-8"),
        ("train.json", '[{"q_lang": "en"}, 3]', "entry 1: no 'img_name'"),
        ("train.json", '[{"q_lang": "zh"}, 3]', "entry 2: not a JSON object"),
        ("All_QA_Pairs_train.txt", "a|what plane?|axial\na|what plane?\n", "line 2: expected image|question|answer"),
        ("All_QA_Pairs_train.txt", "a||axial\n", "line 1: expected"),
    ],
)
def test_a_broken_row_is_named(name: str, text: str | bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as caught:
        questions_from_folder(tmp_path, "train")
    assert message in str(caught.value)
    assert str(tmp_path if "empty" in message else tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("read", [questions_from_folder, pairs_from_folder])
def test_a_folder_without_a_dataset_says_what_was_expected(read: Callable[[Path, str], Any], tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").mkdir()
    with pytest.raises(InputError, match=r"no known dataset here; expected one of .*\("):
        read(tmp_path, "train")
    with pytest.raises(InputError, match="no such folder"):
        read(tmp_path / "nowhere", "train")


@pytest.mark.parametrize(
    ("question", "category"),
    [
        ("in what plane is this mri?", "plane"),
        ("what part of the body is being imaged?", "organ"),
        ("what is most alarming about this ct scan?", "abnormality"),
        ("is this image normal?", "abnormality"),
        ("was gi contrast given to the patient?", "modality"),
    ],
)
def test_the_wording_of_vqa_med_tells_the_category(question: str, category: str) -> None:
    assert category_of(question) == category


def roco(folder: Path, rows: int = 3) -> Path:
    home = folder / "data" / "validation" / "radiology"
    write(home / "captions.txt", "".join(f"ROCO_{i:05}\t Axial CT, patient  {i}.\n" for i in range(rows)))
    link = "wget -r ftp://ftp.ncbi.nlm.nih.gov/pub/pmc/oa_package/8d/34/PMC{}.tar.gz -P /path/to/Dir"
    write(home / "dlinks.txt", "".join(f"ROCO_{i:05}\t{link.format(i)}\tfig-{i}.jpg\n" for i in range(rows)))
    licences = [f"ROCO_{i:05},PMC{i}_fig,{i}.jpg,{('CC BY', 'CC BY-NC')[i % 2]}\n" for i in range(rows)]
    write(home / "licences.txt", "ROCO_ID,PMC_ID,CC\n" + "".join(licences))
    return home


def test_roco_names_its_images_as_its_own_script_saves_them(tmp_path: Path) -> None:
    home = roco(tmp_path)
    picture(home / "images" / "PMC1_fig-1.jpg", 1)
    pairs = pairs_from_folder(tmp_path, "val")
    assert [(p.image.name, p.caption) for p in pairs] == [(f"PMC{i}_fig-{i}.jpg", f"Axial CT, patient {i}.") for i in range(3)]
    there, missing = images_there(pairs)
    assert ([p.image.parent for p in there], missing) == ([home / "images"], 2)


def test_roco_keeps_the_licences_that_are_asked_for(tmp_path: Path) -> None:
    home = roco(tmp_path)
    skipped = Counter[str]()
    assert [p.image.name for p in pairs_from_folder(tmp_path, "val", ["CC BY-NC"], skipped)] == ["PMC1_fig-1.jpg"]
    assert +skipped == {"other licence": 2}
    with pytest.raises(InputError, match=r"licences.txt: no row has the licence CC0; there are CC BY, CC BY-NC"):
        pairs_from_folder(tmp_path, "val", ["CC0"])
    (home / "licences.txt").unlink()
    assert len(pairs_from_folder(tmp_path, "val")) == 3
    with pytest.raises(InputError, match=r"licences.txt: cannot be read \(No such file"):
        pairs_from_folder(tmp_path, "val", ["CC BY"])


def captions_in_roco(folder: Path, rows: list[str | None]) -> Path:
    home = roco(folder, len(rows))
    write(home / "captions.txt", "".join(f"ROCO_{i:05}\tcaption {text}\n" if text else f"ROCO_{i:05}\t \n" for i, text in enumerate(rows)))
    return home / "captions.txt"


def captions_in_rows(folder: Path, rows: list[str | None]) -> Path:
    write(folder / "val.jsonl", "".join(json.dumps({"image": "a.png", "caption": text}) + "\n" for text in rows))
    return folder / "val.jsonl"


def rocov2(folder: Path, captions: list[str], images: str = "valid") -> Path:
    """The layout of Zenodo 10821435."""
    rows = "".join(f"ROCOv2_2023_valid_{i:06},{text}\n" for i, text in enumerate(captions))
    write(folder / "valid_captions.csv", f"ID,Caption\n{rows}")
    write(folder / "valid_concepts.csv", "ID,CUIs\nROCOv2_2023_valid_000000,C0040405;C0817096\n")
    licences = ("CC BY", "CC BY-NC")
    credits = [f"ROCOv2_2023_valid_{i:06},PMC{i},{licences[i % 2]} [Doe et al. (2020)],https://x\n" for i in range(len(captions))]
    write(folder / "license_information.csv", "ID,PMCID,Attribution,Link\n" + "".join(credits))
    picture(folder / images / "ROCOv2_2023_valid_000001.jpg", 1)
    return folder / "valid_captions.csv"


@pytest.mark.parametrize("images", ["valid", "valid_images", "valid_images/valid"])
def test_rocov2_lies_as_its_archives_unpack(tmp_path: Path, images: str) -> None:
    rocov2(tmp_path, ["CT", '" Chest X-ray, ""AP"" view\nof a  child."', "MR"], images)
    pairs = pairs_from_folder(tmp_path, "val")
    assert [p.caption for p in pairs] == ["CT", 'Chest X-ray, "AP" view of a child.', "MR"]
    assert [p.image for p in images_there(pairs)[0]] == [tmp_path / images / "ROCOv2_2023_valid_000001.jpg"]
    skipped = Counter[str]()
    assert [p.caption for p in pairs_from_folder(tmp_path, "val", ["CC BY"], skipped)] == ["CT", "MR"]
    assert +skipped == {"other licence": 1}
    with pytest.raises(InputError, match=r"license_information.csv: no row has the licence CC0; there are CC BY, CC BY-NC"):
        pairs_from_folder(tmp_path, "val", ["CC0"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,Caption\na,b\n", "line 1: no column ID; it needs ID, Caption"),
        ("", "line 1: no column Caption"),
        (b"ID,Caption\na,\xff\n", "line 2: not UTF-8"),
        ('ID,Caption\na,"' + "b" * 140_000, "not CSV (field larger than field limit"),
        ("ID,Caption\n", "split 'val' is empty"),
        ("ID,Caption\na,b,c\n", "line 2: not a row of image and caption (1 of 1 rows, more than 1%)"),
    ],
)
def test_a_broken_table_of_rocov2_is_one_line(text: str | bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "valid_captions.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as caught:
        pairs_from_folder(tmp_path, "val")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def captions_in_rocov2(folder: Path, rows: list[str | None]) -> Path:
    return rocov2(folder, [text or " " for text in rows])


SUBFIGURES = "caption_T060_filtered_top4_sep_v0_subfigures"


@pytest.mark.parametrize("home", [f"images/{SUBFIGURES}", SUBFIGURES, "images"])
def test_pmc_oa_is_read_as_it_is_published(tmp_path: Path, home: str) -> None:
    row = {"alignment_type": "OCR", "alignment_score": 0.9}
    every = [row | {"image": f"PMC1_Fig{i}_0.jpg", "caption": f" A.  Figure {i}"} for i in range(4)]
    picture(tmp_path / home / "PMC1_Fig1_0.jpg", 1)
    write(tmp_path / "pmc_oa_beta.jsonl", jsonl([every[0] | {"caption": "whole"}]))
    assert [p.caption for p in pairs_from_folder(tmp_path, "train")] == ["whole"]
    write(tmp_path / "pmc_oa.jsonl", jsonl(every))
    pairs = pairs_from_folder(tmp_path, "all")
    assert [p.caption for p in pairs] == [f"A. Figure {i}" for i in range(4)]
    assert [p.image for p in images_there(pairs)[0]] == [tmp_path / home / "PMC1_Fig1_0.jpg"]
    for name, some in (("train", every[:2]), ("valid", every[2:3]), ("test", every[3:])):  # an earlier release
        write(tmp_path / f"{name}.jsonl", jsonl(some))
    assert [len(pairs_from_folder(tmp_path, split)) for split in ("train", "val", "test", "all")] == [2, 1, 1, 4]
    assert report_from_folder(tmp_path)["dataset"] == "PMC-OA"


@pytest.mark.parametrize("make", [captions_in_roco, captions_in_rows, captions_in_rocov2])
def test_broken_captions_are_counted_up_to_a_share(make: Callable[[Path, list[str | None]], Path], tmp_path: Path) -> None:
    allowed = int(200 * BROKEN_SHARE)
    assert allowed == 2
    skipped = Counter[str]()
    make(tmp_path, [None] * allowed + ["x"] * (200 - allowed))
    assert len(pairs_from_folder(tmp_path, "val", skipped=skipped)) == 200 - allowed
    assert +skipped == {"broken row": allowed}
    path = make(tmp_path, ["x"] + [None] * (allowed + 1) + ["x"] * (198 - allowed))
    with pytest.raises(InputError, match=rf"line {2 + (path.suffix == '.csv')}: .*3 of 200 rows, more than 1%") as caught:
        pairs_from_folder(tmp_path, "val")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["a" * 300 + ".png", "nul\0.png", "", "../.."])
def test_a_name_that_no_file_has_is_a_missing_image(name: str, tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", jsonl([{"image": name, "category": "plane", "question": "?", "answer": "axial"}]))
    assert images_there(questions_from_folder(tmp_path, "train")) == ([], 1)
    assert image_groups([q.image for q in questions_from_folder(tmp_path, "train")]).keys() == {tmp_path / "images" / name}


def test_half_a_character_is_no_caption(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", '{"image": "a.png", "caption": "half \\ud800"}\n' + jsonl([{"image": "a.png", "caption": "CT"}] * 100))
    skipped = Counter[str]()
    assert len(pairs_from_folder(tmp_path, "train", skipped=skipped)) == 100 and +skipped == {"broken row": 1}


def test_image_caption_rows_find_their_images_beside_them_or_in_images(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", jsonl([{"image": "a.png", "caption": " A  CT. "}, {"image": "b.png", "caption": "B"}]))
    picture(tmp_path / "images" / "a.png", 0)
    picture(tmp_path / "b.png", 1)
    assert [(p.image, p.caption) for p in pairs_from_folder(tmp_path, "train")] == [
        (tmp_path / "images" / "a.png", "A CT."),
        (tmp_path / "b.png", "B"),
    ]
    with pytest.raises(InputError, match="no known dataset"):  # captions are no questions, though both may be called train.jsonl
        questions_from_folder(tmp_path, "train")


@pytest.mark.parametrize(
    ("written", "meant"), [("a..", "a"), (" A\tb . . ", "a b"), ("a.", "a"), ("5.6", "5.6"), ("e.g. this", "e.g. this")]
)
def test_data_sets_and_evaluate_normalise_the_same(written: str, meant: str) -> None:
    assert normalised is rows.normalised
    assert normalised(written) == normalised(meant) == meant


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("The left-lung.", "left lung"),
        ("well-defined - round", "welldefined round"),  # a mark beside a blank anywhere is dropped everywhere
        ("1,000 x-rays", "1000 xrays"),  # a comma between digits: all marks are dropped
        ("5.6 cm.", "5.6 cm"),
        ("Two", "2"),
        ("none", "0"),
        ("X ray", "xray"),
        ("an x-ray", "xray"),
        ("it isnt", "it isn't"),
        ("a", ""),
    ],
)
def test_answers_are_normalised_as_mevf_does(answer: str, label: str) -> None:
    assert answer_as_mevf(answer) == label


@pytest.mark.parametrize(
    ("written", "meant"),
    [("isnt", "isn't"), ("couldntve", None), ("couldn'tve", "couldn't've"), ("twas", "'twas"), ("its", None), ("well", None)],
)
def test_a_contraction_misses_one_mark(written: str, meant: str | None) -> None:
    assert CONTRACTIONS.get(written) == meant


def asked(*told: tuple[str, bool]) -> list[Question]:
    return [Question(Path(f"{i}.png"), "?", answer, "other", closed) for i, (answer, closed) in enumerate(told)]


def test_mevfs_labels_are_the_normalised_answers_by_first_appearance() -> None:
    training = asked(("the lung", False), ("yes", True), ("lung", True), ("two", False))
    vocabulary = vocabulary_as_mevf(training)
    assert vocabulary.answers == ("lung", "yes", "2")
    assert [vocabulary.label(q) for q in training] == [0, 1, 0, 2]
    assert [vocabulary.label(q) for q in asked(("a lung", False), ("liver", False))] == [0, -1]
    assert vocabulary_as_mevf(training, least=2).answers == ("lung",)


def test_qcrs_labels_are_closed_answers_then_open_ones_and_differ_for_one_text() -> None:
    training = asked(("lung", False), ("yes", True), ("lung", True), ("liver", False))
    vocabulary = vocabulary_as_qcr(training)
    assert (vocabulary.answers, vocabulary.closed) == (("yes", "lung", "lung", "liver"), 2)
    assert [vocabulary.label(q) for q in training] == [2, 0, 1, 3]
    assert [vocabulary.label(q) for q in asked(("yes", False), ("liver", True))] == [-1, -1]


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("vqa-rad/images/synpic1.jpg", "med/Train_images/synpic1.jpg", True),
        ("imgs/xmlab1/source.jpg", "imgs/xmlab2/source.jpg", False),
        ("imgs/xmlab1/source.jpg", "elsewhere/xmlab1/source.jpg", True),
        ("images/synpic1.jpg", "images/synpic11.jpg", False),
    ],
)
def test_one_image_has_one_name_wherever_it_lies(a: str, b: str, same: bool) -> None:
    assert (image_key(Path(a)) == image_key(Path(b))) == same


def pictured(folder: Path, count: int) -> list[Question]:
    """Two questions about each of ``count`` images; images 0 and 1 show one picture, and image 2 lies in a second folder too."""
    for i in range(count):
        picture(folder / "images" / f"synpic{i}.png", 0 if i == 1 else i)
    picture(folder / "more" / "synpic2.jpg", 99)
    images = [*(folder / "images" / f"synpic{i}.png" for i in range(count)), folder / "more" / "synpic2.jpg"]
    return [Question(image, question, "yes", "other", True) for image in images for question in ("one?", "two?")]


@pytest.mark.parametrize("seed", range(6))
def test_an_image_disjoint_split_keeps_each_picture_on_one_side(seed: int, tmp_path: Path) -> None:
    questions = pictured(tmp_path, 20)
    training, held_out = image_disjoint_split(questions, seed, 0.3)
    assert sorted(training + held_out, key=questions.index) == questions
    names = {image_key(q.image) for q in held_out}
    assert not names & {image_key(q.image) for q in training}
    assert ("synpic0" in names) == ("synpic1" in names)
    assert len(names) in (6, 7)  # three tenths of twenty, and the double that the last one may bring
    assert held_out == [q for q in questions if image_key(q.image) in names]


def test_an_image_disjoint_split_depends_on_the_seed_and_on_the_names_alone(tmp_path: Path) -> None:
    questions = pictured(tmp_path / "a", 20)
    moved = pictured(tmp_path / "b", 20)[::-1]
    held = [
        {image_key(q.image) for q in image_disjoint_split(some, seed, 0.3)[1]}
        for some, seed in ((questions, 1), (moved, 1), (questions, 2))
    ]
    assert held[0] == held[1] != held[2]


def test_without_images_names_alone_tell_doubles(tmp_path: Path) -> None:
    images = [tmp_path / name for name in ("a/synpic1.jpg", "b/synpic1.jpg", "a/synpic2.jpg")]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "synpic2.jpg").write_text("no image")
    groups = image_groups(images)
    assert groups[images[0]] == groups[images[1]] != groups[images[2]]


@pytest.mark.parametrize("doubles", [1, 3])
def test_an_image_disjoint_split_leaves_no_side_empty(doubles: int) -> None:
    images = [Path("a/synpic1.jpg"), *(Path(f"b{i}/synpic2.jpg") for i in range(doubles))]
    questions = [Question(image, "?", "yes", "other", True) for image in images]
    for seed in range(4):
        assert all(image_disjoint_split(questions, seed, 0.9))
    with pytest.raises(InputError, match="two pictures"):
        image_disjoint_split(questions[1:], 0)


def test_doubles_in_another_dataset_are_taken_out_by_name_and_by_picture(tmp_path: Path) -> None:
    questions = pictured(tmp_path, 4)
    others = [q for q in questions if q.image.name in ("synpic0.png", "synpic2.jpg")]
    assert {q.image.name for q in without_pictures_of(questions, others)} == {"synpic3.png"}
    assert without_pictures_of(questions, []) == questions


def test_slakes_images_train_as_different_ones_though_all_have_one_name_and_test_stays_out(tmp_path: Path) -> None:
    pytest.importorskip("open_clip", reason="training needs the extra `train`")
    from pmclip_deploy.train.questions import questions_for_training

    files = {"train.json": (1, 2, 3), "validate.json": (4,), "test.json": (5,)}
    for name, numbers in files.items():
        row = {"question": "?", "answer": "lung", "q_lang": "en", "answer_type": "OPEN", "content_type": "Organ"}
        write(tmp_path / name, json.dumps([row | {"img_name": f"xmlab{i}/source.jpg"} for i in numbers]))
        for i in numbers:
            picture(tmp_path / "imgs" / f"xmlab{i}" / "source.jpg", 4 if i == 3 else i)  # train's third picture is the validation one
    training, validation = questions_for_training([tmp_path])
    assert [image_key(q.image) for q in training] == ["xmlab1/source.jpg", "xmlab2/source.jpg"]
    assert [image_key(q.image) for q in validation] == ["xmlab4/source.jpg"]


def test_the_report_counts(tmp_path: Path) -> None:
    vqa_rad(tmp_path)
    report = report_from_folder(tmp_path)
    train = report["splits"]["train"]
    assert (train["questions"], train["images"], train["images_missing"], train["open"], train["closed"]) == (2, 1, 1, 1, 1)
    assert train["category"] == {"abnormality": 1, "plane": 1}
    assert train["answers"]["all"] | {"top": 0} == {"distinct": 2, "top": 0, "majority_share": 0.5, "entropy": 1.0}
    assert train["vocabulary"] == {"mevf": 2, "qcr_closed": 1, "qcr_open": 1}
    assert report["splits"]["test"]["answers"]["open"] is None
    (between,) = report["between"]
    assert (between["images_by_name"], between["images_by_picture"], between["questions"]) == (1, None, 0.0)
    assert between["answers_known"]["mevf"] == {"all": 0.0, "open": None, "closed": 0.0}
    json.dumps(report, allow_nan=False)


def test_one_answer_to_everything_has_no_entropy(tmp_path: Path, command: Callable[..., Result]) -> None:
    vqa_rad(tmp_path)
    closed = report_from_folder(tmp_path)["splits"]["train"]["answers"]["closed"]
    assert closed["distinct"] == 1 and str(closed["entropy"]) == "0.0"
    said = command("train", "report", "--data", tmp_path).out
    assert "entropy" in said and "-0.0" not in said


@pytest.mark.parametrize(
    ("value", "form", "said"),
    [
        (-0.0, ".3f", "0.000"),
        (-0.0004, ".3f", "0.000"),
        (-0.0006, ".3f", "-0.001"),
        (-0.0, "g", "0"),
        (-0.00004, ".2%", "0.00%"),
        (-0.0, "+.3f", "+0.000"),
        (-0.0004, "+.3f", "-0.000"),  # a difference, on its side of 0
        (float("-inf"), ".2f", "-inf"),
    ],
)
def test_a_figure_that_is_nothing_has_no_sign(value: float, form: str, said: str) -> None:
    assert decimal(value, form) == said


def test_the_report_compares_pictures_where_they_are(tmp_path: Path) -> None:
    rows = {"train": ["a.png", "b.png"], "val": ["c.png", "d.png", "a.png"]}
    for name, seed in {"a.png": 1, "b.png": 2, "c.png": 2, "d.png": 4}.items():
        picture(tmp_path / "images" / name, seed)
    for split, names in rows.items():
        write(tmp_path / f"{split}.jsonl", jsonl([{"image": n, "category": "plane", "question": "?", "answer": "axial"} for n in names]))
    report = report_from_folder(tmp_path)
    (between,) = report["between"]
    assert (between["images"], between["images_by_name"], between["images_by_picture"]) == (3, 1, 2)
    assert (between["questions"], between["questions_about_the_same_image"]) == (1.0, round(1 / 3, 4))
    assert between["answers_known"]["qcr"] == {"all": 1.0, "open": 1.0, "closed": None}
    assert "image_disjoint" not in report
    disjoint = report_from_folder(tmp_path, seed=3)["image_disjoint"]
    assert disjoint["by_picture"] and sum(split["questions"] for split in disjoint["splits"].values()) == 5
    assert [(b["images_by_name"], b["images_by_picture"], b["questions_about_the_same_image"]) for b in disjoint["between"]] == [
        (0, 0, 0.0)
    ]


@pytest.mark.parametrize("make", [*LAYOUTS, roco, lambda folder: captions_in_rows(folder, ["x"])])
def test_the_report_prints_any_dataset(
    make: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., Result]
) -> None:
    make(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    for arguments in ([], ["--json"]):
        code, out, err = command("train", "report", "--data", tmp_path, *arguments)
        assert not code and not err
        if arguments:
            document = json.loads(out)
            assert document["schema"] == "pmclip-deploy/report/1"
            assert document["splits"]
        else:
            assert "missing images" in out and "all" in out


def test_the_report_leaves_out_an_empty_split_and_refuses_an_empty_dataset(tmp_path: Path) -> None:
    vqa_med(tmp_path)
    write(tmp_path / "val.jsonl", "\n")
    report = report_from_folder(tmp_path)
    assert (list(report["splits"]), report["between"]) == (["train"], [])
    write(tmp_path / "train.jsonl", "")
    with pytest.raises(InputError, match="holds no rows"):
        report_from_folder(tmp_path)


@pytest.mark.parametrize(("arguments", "code"), [(["--seed", "1"], 3), (["--seed", "x"], 2)])
def test_the_report_refuses_in_one_line(arguments: list[str], code: int, tmp_path: Path, command: Callable[..., Result]) -> None:
    roco(tmp_path)
    done = command("train", "report", "--data", tmp_path, *arguments)
    assert done.code == code and not done.out and is_one_line(done.err)


def test_vqa_rads_official_split_shares_all_its_test_images(shared: Path) -> None:
    report = report_from_folder(shared / "vqa-rad", seed=1)
    train, test = report["splits"]["train"], report["splits"]["test"]
    assert (train["questions"], test["questions"], train["images"], test["images"]) == (2454, 370, 251, 164)
    assert (train["closed"], train["open"], test["closed"], test["open"]) == (1506, 948, 234, 136)
    (between,) = report["between"]
    assert between["images_by_name"] == between["images_by_picture"] == 164
    (disjoint,) = report["image_disjoint"]["between"]
    assert disjoint["images"] == 51 and disjoint["images_by_name"] == disjoint["images_by_picture"] == 0


def test_a_vqa_rad_question_about_a_fracture_is_nearly_always_answered_no(shared: Path) -> None:
    closed = [q for q in questions_from_folder(shared / "vqa-rad", "all") if q.closed and "fractur" in q.question]
    assert Counter(q.answer for q in closed) == {"no": 80, "yes": 3}


def test_vqa_med_and_vqa_rad_share_38_images(shared: Path) -> None:
    rad, med = (questions_from_folder(shared / name, "all") for name in ("vqa-rad", "vqa-med-2019"))
    assert len({image_key(q.image) for q in rad} & {image_key(q.image) for q in med}) == 38
    assert {q.category for q in med if category_of(q.question) != q.category} == set()
    named = {image_key(q.image): q.image for q in med if q.category == "abnormality" and "fractur" in q.answer}
    assert len(named) == 142 + 23


def test_slake_and_roco_are_read_without_images(shared: Path) -> None:
    assert [len(questions_from_folder(shared / "slake", split)) for split in ("train", "val", "test")] == [4919, 1053, 1061]
    report = report_from_folder(shared / "slake")
    assert [between["images_by_name"] for between in report["between"]] == [0, 0, 0]
    assert [between["images_by_picture"] for between in report["between"]] in ([None, None, None], [9, 6, 1])  # where the images are there
    assert report["splits"]["train"]["vocabulary"] == {"mevf": 218, "qcr_closed": 33, "qcr_open": 216}
    skipped = Counter[str]()
    pairs = pairs_from_folder(shared / "roco", "test", ["CC BY"], skipped)
    assert (len(pairs), skipped["other licence"], skipped["broken row"], images_there(pairs)[1]) == (130, 171, 0, 130)
