"""MEVF's and QCR's heads: attention blocks against plain loops, words against scikit-learn, gradients, shapes, losses, round trips."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs the extra `train`")
pytest.importorskip("open_clip", reason="training needs the extra `train`")

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pmclip_deploy.errors import InputError
from pmclip_deploy.train.heads import mevf, qcr
from pmclip_deploy.train.heads.bilinear import BAN, SAN, BilinearAttention, BilinearPooling
from pmclip_deploy.train.heads.mevf import MEVF, mevf_loss, schedule
from pmclip_deploy.train.heads.qcr import QCR, ConditionedQuestion, qcr_loss
from pmclip_deploy.train.heads.vision import AutoEncoder, ImageFeatures, MamlNetwork
from pmclip_deploy.train.heads.words import (
    LENGTH,
    Dictionary,
    QuestionEmbedding,
    neighbours_from_questions,
    tables_from_glove,
    vectors_from_glove,
    words_from_question,
)

B, V, T, D, Q = 2, 3, 4, 5, 6  # rows, objects, words, and the widths of an object and a word
QUESTIONS = [
    "Is there evidence of a pneumothorax?",
    "What is the patient's diagnosis, based on the X ray? -Open",
    "Is the heart enlarged?",
    "is is the heart the heart",
    "Pneumothorax?",
    "Which side of the heart border is obscured in this chest x-ray of the patient?",
]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def objects_and_words() -> tuple[Tensor, Tensor]:
    objects = torch.randn(B, V, D)
    objects[1, 2] = 0  # padding
    return objects, torch.randn(B, T, Q)


def matrix(layer: nn.Module) -> np.ndarray:
    """A layer's matrix, weight-normalised by hand."""
    if not hasattr(layer, "parametrizations"):
        return layer.weight.detach().double().numpy()
    norm, direction = (t.detach().double() for t in (layer.parametrizations.weight.original0, layer.parametrizations.weight.original1))
    return (norm * direction / math.sqrt(sum(x * x for x in direction.flatten().tolist()))).numpy()


def mapped(layers: nn.Sequential, x: Tensor) -> np.ndarray:
    """max(0, Wx + b) of every row."""
    return np.maximum(x.double().numpy() @ matrix(layers[1]).T + layers[1].bias.detach().double().numpy(), 0)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


@torch.no_grad()
def test_bilinear_attention_is_the_sum_over_its_rank() -> None:
    attention = BilinearAttention(D, Q, hidden=7, glimpses=2).eval()
    objects, words = objects_and_words()
    u, w, h = mapped(attention.image, objects), mapped(attention.question, words), matrix(attention.glimpse)
    assert h.shape == (2, 21)
    got = attention(objects, words)
    for b in range(B):
        for g in range(2):
            scores = np.full((V, T), -np.inf)
            for v in range(V):
                for t in range(T):
                    if objects[b, v].any():
                        scores[v, t] = sum(h[g, r] * u[b, v, r] * w[b, t, r] for r in range(21))
            np.testing.assert_allclose(got[b, g].numpy(), softmax(scores), atol=1e-5)
    assert torch.allclose(got.sum((2, 3)), torch.ones(B, 2))
    assert (got[1, :, 2] == 0).all() and (got[1, :, :2] > 0).all()


@torch.no_grad()
def test_bilinear_pooling_is_the_weighted_sum_over_all_pairs() -> None:
    pooling = BilinearPooling(D, Q, rank=7).eval()
    objects, words = objects_and_words()
    weights = torch.rand(B, V, T)
    u, w, expected = mapped(pooling.image, objects), mapped(pooling.question, words), np.zeros((B, 7))
    for b in range(B):
        for v in range(V):
            for t in range(T):
                for r in range(7):
                    expected[b, r] += float(weights[b, v, t]) * u[b, v, r] * w[b, t, r]
    np.testing.assert_allclose(pooling(objects, words, weights).numpy(), expected, atol=1e-5)


@torch.no_grad()
def test_ban_adds_each_glimpse_to_every_word() -> None:
    ban = BAN(D, Q, glimpses=3).eval()
    objects, words = objects_and_words()
    weights = ban.attention(objects, words)
    state = words.clone()
    for g in range(3):
        pooled = ban.pooling[g](objects, state, weights[:, g]).double().numpy()
        added = pooled @ matrix(ban.residual[g][1]).T + ban.residual[g][1].bias.double().numpy()
        for t in range(T):
            state[:, t] += torch.from_numpy(added).float()
    np.testing.assert_allclose(ban(objects, words).numpy(), sum(state[:, t].numpy() for t in range(T)), atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("stacks", [1, 2, 3])
def test_san_is_attention_stack_by_stack(stacks: int) -> None:
    san = SAN(D, Q, stacks).eval()
    objects, words = objects_and_words()
    for b in range(B):
        state = words[b, -1].double().numpy()  # the last word's
        for i, stack in enumerate(san.stacks):
            asked = matrix(stack.question) @ state + stack.question.bias.double().numpy()
            seen = [matrix(stack.image) @ objects[b, v].double().numpy() for v in range(V)]
            scores = np.full(V, -np.inf)
            for v in range(V):
                if objects[b, v].any():
                    scores[v] = (matrix(stack.score) @ np.tanh(asked + seen[v]))[0]
            attended = sum(p * s for p, s in zip(softmax(scores), seen, strict=True))
            state = (asked if i == 0 else state) + attended
        np.testing.assert_allclose(san(objects, words)[b].numpy(), state, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("block", [BAN(D, Q, 2), SAN(D, Q, 2)], ids=["BAN", "SAN"])
def test_rows_of_padding_alone_stay_finite(block: nn.Module) -> None:
    assert block.eval()(torch.zeros(B, V, D), torch.randn(B, T, Q)).isfinite().all()


# Words


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("What is the patient's age?", "what is the patient 's age"),
        ("Is this an X ray, or a CT...?", "is this an x-ray or a ct"),
        ("Is there free air? -Yes/No", "is there free air"),
        ("Where is it? - Open", "where is it"),
        ("T2.weighted  MRI .", "t2weighted mri"),
        ("", ""),
    ],
)
def test_questions_are_split_as_the_authors_split_them(question: str, words: str) -> None:
    assert words_from_question(question) == words.split()


def test_tokens_are_padded_behind_and_cut_at_twelve() -> None:
    dictionary = Dictionary.from_questions(["is the heart big?", "the lungs"])
    assert dictionary.words == ("is", "the", "heart", "big", "lungs") and dictionary.padding == 5
    tokens = dictionary.tokens(["The lungs, is", "big unheard heart", " ".join(["is"] * 11 + ["the", "heart"]), ""])
    assert tokens.dtype == torch.int64 and tokens.shape == (4, LENGTH)
    assert tokens[0].tolist() == [1, 4, 0] + [5] * 9
    assert tokens[1].tolist() == [3, 5, 2] + [5] * 9  # a word that was never heard is padding in its place
    assert tokens[2].tolist() == [0] * 11 + [1]
    assert tokens[3].tolist() == [5] * 12


def neighbours_by_sklearn(questions: list[str], dictionary: Dictionary) -> np.ndarray:
    """scikit-learn counts and normalises; its smoothed logarithm of the document frequency gives way to 1 / (how often a word stands)."""
    text = pytest.importorskip("sklearn.feature_extraction.text")
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    counter = text.TfidfVectorizer(analyzer=words_from_question, vocabulary=dictionary.number, use_idf=False, norm=None)
    counts = counter.fit_transform(questions).toarray()
    frequency = counts.sum(0)
    pairs = counts.T @ counts - np.diag(frequency)  # ordered pairs of places; a word is no neighbour of itself in its own place
    return preprocessing.normalize(pairs / np.maximum(frequency, 1), norm="l1")


def test_neighbours_equal_those_by_scikit_learn() -> None:
    dictionary = Dictionary.from_questions(QUESTIONS)
    got = neighbours_from_questions([*QUESTIONS, "words that nobody knows"], dictionary).numpy()
    expected = neighbours_by_sklearn(QUESTIONS, dictionary)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    the = dictionary.number["the"]
    assert got[the, the] > 0  # twice in one question
    assert not neighbours_from_questions(["pneumothorax"], dictionary).any()


def test_real_questions_find_their_words_in_glove(shared: Path) -> None:
    import json

    lines = (shared / "vqa-rad" / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [str(json.loads(line)["question"]) for line in lines]
    dictionary = Dictionary.from_questions(questions)
    path = next((shared / "glove").iterdir())
    glove, second = tables_from_glove(path, dictionary, questions)
    assert glove.shape == second.shape == (len(dictionary.words), 300)
    rows = {line.split(" ")[0]: line.rstrip().split(" ")[1:] for line in path.read_text(encoding="utf-8").splitlines()}
    known = [word in rows for word in dictionary.words]
    assert glove.any(1).tolist() == known and np.mean(known) > 0.7
    assert glove[dictionary.number["heart"]].tolist() == pytest.approx([float(x) for x in rows["heart"]])
    np.testing.assert_allclose(second.numpy(), neighbours_by_sklearn(questions, dictionary) @ glove.double().numpy(), atol=1e-5)


@pytest.mark.parametrize(
    "content",
    [
        "heart 0.1 0.2\nlung 0.3 0.4\n",
        "2 2\nheart 0.1 0.2 \nlung 0.3 0.4 \n",  # word2vec's program: a header, and a blank at each end
        "heart\t0.1\t0.2\r\nlung\t0.3\t0.4\r\n",
        ". . . 5 6\nheart 0.1 0.2\nat name@domain.com 7 8\nlung 0.3 0.4\n\n",  # glove.840B has such
        "\x85 5 6\n\xa0 5 6\n  5 6\nheart 0.1 0.2\nlung 0.3 0.4",  # fastText's words are blanks of all kinds
        "4 2\n1 2 5 6\n2 7 8\nheart 0.1 0.2\nlung 0.3 0.4",
    ],
)
def test_word_vectors_in_every_form(content: str, tmp_path: Path) -> None:
    (tmp_path / "vectors.txt").write_bytes(content.encode())
    vectors = vectors_from_glove(tmp_path / "vectors.txt", Dictionary(("lung", "heart", "liver")))
    assert vectors.tolist() == torch.tensor([[0.3, 0.4], [0.1, 0.2], [0, 0]]).tolist()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"heart 0.1 0.2\nlung 0.3\n", "line 2 has 1 numbers"),
        (b"heart 0.1 0.2\nheart 0.1 x\n", "not in GloVe's text format"),
        (b"\xff\xfe\x00heart", "is UTF-16"),
        (b"heart 0.1 nan\n", "line 1 is not in GloVe's text format"),
        (b"cat 0.1 0.2\nheart 0.1 nan\n", "line 2 is not in GloVe's text format"),
        (b"2 300\nheart 0.1 0.2\n", "line 2 has 2 numbers in place of 300"),
        (b"3000000 300\nheart \x01\x80\x9a\xbf", "line 2: not UTF-8"),
        (b"", "no word of the questions"),
        (b"cat 0.1 0.2\n", "no word of the questions"),
        (None, "cannot be read"),
    ],
)
def test_what_is_no_glove_file_is_one_clear_line(content: bytes | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "glove.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=says) as error:
        vectors_from_glove(path, Dictionary(("heart",)))
    assert "\n" not in str(error.value)


@torch.no_grad()
@pytest.mark.parametrize("recurrent", ["GRU", "LSTM"])
def test_the_question_is_read_word_by_word_and_then_its_padding(recurrent: str) -> None:
    tables = torch.randn(7, 4), torch.randn(7, 3)
    question = QuestionEmbedding(tables, 8, recurrent)
    tokens = torch.tensor([[3, 1, 7, 7], [0, 2, 5, 6]])
    words, states = question(tokens)
    assert words.shape == (2, 4, 7) and states.shape == (2, 4, 8)
    assert torch.equal(words[0, 0], torch.cat([tables[0][3], tables[1][3]])) and not words[0, 2:].any()
    cell = {"GRU": nn.GRUCell, "LSTM": nn.LSTMCell}[recurrent](7, 8)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in question.recurrent.state_dict().items()})
    for row in range(2):
        state = None
        for t in range(4):
            state = cell(words[row, t][None], state)
            hidden = state[0] if recurrent == "LSTM" else state
            assert torch.allclose(hidden[0], states[row, t], atol=1e-6)


@torch.no_grad()
def test_the_conditioned_question_weighs_its_words() -> None:
    model = ConditionedQuestion(torch.randn(7, 4), 8, (5, 6, 2)).eval()
    tokens = torch.randint(0, 8, (3, LENGTH))
    words, states = (x.double().numpy() for x in model.question(tokens))
    for row in range(3):
        scores = []
        for t in range(LENGTH):
            both = np.concatenate([words[row, t], states[row, t]])
            value = np.tanh(matrix(model.value) @ both + model.value.bias.double().numpy())
            gate = 1 / (1 + np.exp(-(matrix(model.gate) @ both + model.gate.bias.double().numpy())))
            scores.append((matrix(model.score) @ (value * gate))[0])
        pooled = sum(p * s for p, s in zip(softmax(np.array(scores)), states[row], strict=True))
        expected = model.layers(torch.from_numpy(pooled).float()[None])
        assert torch.allclose(model(tokens)[row], expected[0], atol=1e-5)


# Whole heads

SETS = {
    "clip": (True, False, False),
    "autoencoder": (False, True, False),
    "maml": (False, False, True),
    "clip and autoencoder": (True, True, False),
    "maml and autoencoder": (False, True, True),
    "all": (True, True, True),
}
Inputs = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]


def features(names: str, clip_dim: int = 512) -> ImageFeatures:
    clip, autoencoder, maml = SETS[names]
    return ImageFeatures(clip_dim * clip, AutoEncoder() if autoencoder else None, MamlNetwork() if maml else None)


def inputs(names: str, clip_dim: int = 512, rows: int = 3) -> Inputs:
    clip, autoencoder, maml = SETS[names]
    return (
        torch.randn(rows, clip_dim) if clip else None,
        torch.rand(rows, 1, 128, 128) if autoencoder else None,
        torch.rand(rows, 1, 84, 84) if maml else None,
        torch.randint(0, 11, (rows, LENGTH)),
    )


def tables() -> tuple[Tensor, Tensor]:
    return torch.randn(10, 6), torch.randn(10, 6)


HEADS: dict[str, Callable[[ImageFeatures], nn.Module]] = {
    "MEVF with BAN": lambda f: MEVF(f, tables(), 5, hidden=16),
    "MEVF with SAN": lambda f: MEVF(f, tables(), 5, "SAN", hidden=16),
    "MEVF with an LSTM": lambda f: MEVF(f, tables(), 5, depth=3, hidden=16, recurrent="LSTM"),
    "QCR": lambda f: QCR(f, tables(), 5, 4, glimpses=3, hidden=16),
}


@torch.no_grad()
@pytest.mark.parametrize("clip_dim", [512, 640, 1024])
@pytest.mark.parametrize("names", SETS)
def test_widths_follow_from_the_features(names: str, clip_dim: int) -> None:
    given = features(names, clip_dim)
    clip, autoencoder, maml = SETS[names]
    assert given.dim == clip_dim * clip + 64 * (autoencoder + maml)
    logits, reconstruction = MEVF(given, tables(), 5, hidden=16).eval()(*inputs(names, clip_dim))
    assert logits.shape == (3, 5) and logits.dtype == torch.float32
    assert (reconstruction is not None) == autoencoder
    if reconstruction is not None:
        assert reconstruction.shape == (3, 1, 128, 128) and 0 <= reconstruction.min() <= reconstruction.max() <= 1


def test_the_objects_are_clip_then_maml_then_autoencoder() -> None:
    given, x = features("all").eval(), inputs("all")
    objects, _ = given(*x[:3])
    clip, maml, code = objects[:, 0].split([512, 64, 64], dim=1)
    assert torch.equal(clip, x[0]) and torch.allclose(maml, given.maml(x[2]))
    assert torch.allclose(code, given.convert(given.autoencoder.encode(x[1]).reshape(3, -1)))


@torch.no_grad()
@pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)
def test_a_head_survives_safetensors(make: Callable[[ImageFeatures], nn.Module], tmp_path: Path) -> None:
    for names in ("clip and autoencoder", "maml"):
        head = make(features(names)).eval()
        save_file(head.state_dict(), tmp_path / "head.safetensors")
        again = type(head).from_tensors(load_file(tmp_path / "head.safetensors"))
        x = inputs(names)
        for before, after in zip(head(*x), again(*x), strict=True):
            assert (before is None and after is None) or torch.equal(before, after)


@pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)
def test_every_weight_learns_unless_it_is_frozen(make: Callable[[ImageFeatures], nn.Module]) -> None:
    head = make(features("all")).train()
    head.features.maml.requires_grad_(False)
    x = inputs("all", rows=6)
    if isinstance(head, QCR):
        head.kind.requires_grad_(False)
        is_open = torch.tensor([True, False] * 3)
        opened, closed, reconstruction = head.by_type(*x, is_open)
        loss = qcr_loss(opened, torch.rand(3, 5), closed, torch.rand(3, 4), reconstruction, x[1])
    else:
        logits, reconstruction = head(*x)
        loss = mevf_loss(logits, torch.rand(6, 5), reconstruction, x[1])
    loss.backward()
    for name, p in head.named_parameters():
        if not p.requires_grad:
            assert p.grad is None, name
        elif name.startswith("attention.stacks") and ("score" in name or "stacks.1.question" in name):
            assert not p.grad.any(), name  # SAN has but one object to choose from
        else:
            assert p.grad.any() and p.grad.isfinite().all(), name
    assert not head.question.tables[0].weight.grad[10].any()  # the padding stays zero


def test_with_several_objects_all_of_san_learns() -> None:
    san = SAN(D, Q, 2)
    san(*objects_and_words()).square().sum().backward()
    assert all(p.grad.any() for p in san.parameters())


@torch.no_grad()
def test_training_rows_by_type_gives_what_all_rows_give() -> None:
    head, x = HEADS["QCR"](features("clip and autoencoder")).eval(), inputs("clip and autoencoder", rows=5)
    opened, closed, kind, reconstruction = head(*x)
    assert opened.shape == (5, 5) and closed.shape == (5, 4) and kind.shape == (5, 2)
    is_open = torch.tensor([True, False, False, True, False])
    rows = head.by_type(*x, is_open)
    for got, expected in zip(rows, (opened[is_open], closed[~is_open], reconstruction), strict=True):
        assert torch.allclose(got, expected, atol=1e-6)


# Losses and rates


def bce(logits: Tensor, scores: Tensor) -> Tensor:
    p = torch.sigmoid(logits.double())
    return -(scores * p.log() + (1 - scores) * (1 - p).log())


def test_losses_are_the_papers() -> None:
    logits, scores = torch.randn(4, 5), torch.rand(4, 5)
    picture, made = torch.rand(4, 1, 8, 8), torch.rand(4, 1, 8, 8)
    squared = ((picture - made) ** 2).mean()
    assert mevf_loss(logits, scores).item() == pytest.approx(bce(logits, scores).sum().item() / 4, rel=1e-5)
    expected = (bce(logits, scores).sum() + 0.001 * squared) / 4
    assert mevf_loss(logits, scores, made, picture).item() == pytest.approx(expected.item(), rel=1e-6)

    closed, closed_scores = torch.randn(3, 2), torch.rand(3, 2)
    both = bce(logits, scores).mean() + bce(closed, closed_scores).mean()
    assert qcr_loss(logits, scores, closed, closed_scores).item() == pytest.approx(both.item(), rel=1e-5)
    assert qcr_loss(logits, scores, closed, closed_scores, made, picture).item() == pytest.approx((both + 0.001 * squared).item(), rel=1e-5)
    alone = qcr_loss(logits, scores, closed[:0], closed_scores[:0]).item()
    assert alone == pytest.approx(bce(logits, scores).mean().item(), rel=1e-5)


def test_the_losses_of_uneven_parts_sum_to_that_of_the_batch() -> None:
    logits, scores = torch.randn(5, 3), torch.rand(5, 3)
    picture, made = torch.rand(5, 1, 8, 8), 50 * torch.rand(5, 1, 8, 8)
    one, rest = slice(1), slice(1, 5)
    parts = [mevf_loss(logits[i], scores[i], made[i], picture[i], 5).item() for i in (one, rest)]
    assert sum(parts) == pytest.approx(mevf_loss(logits, scores, made, picture).item(), rel=1e-6)

    closed, closed_scores = torch.randn(2, 4), torch.rand(2, 4)  # all of them in the second part
    picture, made = torch.rand(7, 1, 8, 8), 50 * torch.rand(7, 1, 8, 8)
    of = [(closed[:0], closed_scores[:0], made[one], picture[one]), (closed, closed_scores, made[1:], picture[1:])]
    rows = torch.tensor(5), torch.tensor(2)
    parts = [qcr_loss(logits[i], scores[i], *more, rows).item() for i, more in zip((one, rest), of, strict=True)]
    assert sum(parts) == pytest.approx(qcr_loss(logits, scores, closed, closed_scores, made, picture).item(), rel=1e-6)


def test_the_rate_warms_up_and_falls_by_a_quarter_every_second_epoch() -> None:
    rate, expected = 2.0, [0.5, 1.0, 1.5, 2.0]
    for epoch in range(4, 24):
        rate *= 0.75 if epoch in (10, 12, 14, 16, 18) else 1
        expected.append(rate)
    assert [schedule(epoch) for epoch in range(24)] == pytest.approx(expected)
    assert (mevf.Recipe().epochs, mevf.Recipe().learning_rate, mevf.Recipe().clip_norm) == (20, 0.002, 0.25)
    assert (qcr.Recipe().epochs, qcr.Recipe().learning_rate, qcr.TypeRecipe().learning_rate) == (200, 1e-3, 1e-4)


# Export


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)
def test_a_head_runs_as_an_onnx_graph(make: Callable[[ImageFeatures], nn.Module], tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="needs the extra `export`")
    import onnxruntime

    head = make(features("all")).eval()
    names = ["clip", "autoencoder_pixels", "maml_pixels", "tokens"]
    torch.onnx.export(
        head,
        inputs("all", rows=2),
        str(tmp_path / "head.onnx"),
        input_names=names,
        dynamic_axes={name: {0: "batch"} for name in names},
        dynamo=False,
        opset_version=17,
    )
    session = onnxruntime.InferenceSession(str(tmp_path / "head.onnx"), providers=["CPUExecutionProvider"])
    x = inputs("all", rows=3)
    with torch.no_grad():
        expected = head(*x)
    got = session.run(None, {name: value.numpy() for name, value in zip(names, x, strict=True)})
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b.numpy(), atol=1e-4)
