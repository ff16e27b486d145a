"""The graphs of MEVF and QCR against PyTorch, with all image features and planted faults, and what feeds them: words, tokens, pixels."""

import copy
import json
import random
import unicodedata
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("open_clip")

from onnx import numpy_helper
from tokenizers import Tokenizer
from torch import nn

from pmclip_deploy.export.head_graphs import features_graph, head_graph
from pmclip_deploy.imaging.preprocess import grey_from_pixels
from pmclip_deploy.tokens import tokenizer_from_file, tokens_from_text
from pmclip_deploy.train.heads.mevf import MEVF
from pmclip_deploy.train.heads.qcr import QCR
from pmclip_deploy.train.heads.vision import AutoEncoder, ImageFeatures, MamlNetwork, grey_from_path
from pmclip_deploy.train.heads.words import LENGTH, Dictionary, words_tokenizer_json

WORDS, CLIP = 30, 10
FEATURES = {"clip": (CLIP, 0, 0), "clip+ae": (CLIP, 1, 0), "clip+maml": (CLIP, 0, 1), "clip+ae+maml": (CLIP, 1, 1), "none": (1, 0, 0)}
KINDS = ("mevf-ban-gru", "mevf-ban-lstm", "mevf-san-gru", "mevf-san-lstm", "qcr")
TOLERANCE = 1e-4
LEVEL = {True: ort.GraphOptimizationLevel.ORT_ENABLE_ALL, False: ort.GraphOptimizationLevel.ORT_DISABLE_ALL}  # the latter opens in a third
Head = MEVF | QCR
Values = dict[str, Any]


def features_of(name: str) -> ImageFeatures:
    clip, autoencoder, maml = FEATURES[name]
    return ImageFeatures(clip, AutoEncoder() if autoencoder else None, MamlNetwork() if maml else None)


def head_of(kind: str, features: ImageFeatures, hidden: int = 16, depth: int = 3, width: int = 5) -> Head:
    tables = [torch.zeros(WORDS, width)] * 2
    if kind == "qcr":
        head: Head = lively(QCR(features, tables, 7, 4, depth, hidden))
    else:
        _, attention, recurrent = kind.upper().split("-")
        head = lively(MEVF(features, tables, 9, attention, depth, hidden, recurrent))
    spread = {name: float(x.std(0).mean()) for name, x in reference(head, inputs_of(features, 3), tokens_of(3)).items()}
    with torch.no_grad():
        for name, module in head.named_modules():  # so that answers and kinds of different rows are about 1 apart
            if name.endswith("answer.3"):
                module.parametrizations.weight.original0 /= spread["answer"]
            elif name == "kind.layers.5":
                module.weight /= spread["kind"]
    return head


@torch.no_grad()
def lively(head: Head) -> Head:
    """Weights under which every layer matters: the usual ones leave attention flat and answers near zero."""
    torch.manual_seed(0)
    for module in head.modules():
        if isinstance(module, nn.Linear):
            outputs, inputs = module.weight.shape
            if hasattr(module, "parametrizations"):  # weight norm: the matrix's own norm, then its direction
                module.parametrizations.weight.original1.normal_()
                module.parametrizations.weight.original0.fill_(1.4 * outputs**0.5)
            else:
                module.weight.normal_(0, 1.4 * inputs**-0.5)
            if module.bias is not None:
                module.bias.normal_(0, 0.3)
        elif isinstance(module, nn.GRU | nn.LSTM):
            for name, parameter in module.named_parameters():
                parameter.normal_(0, 0.3 if "bias" in name else 1.4 * parameter.shape[1] ** -0.5)
        elif isinstance(module, nn.Embedding):
            module.weight[:-1].normal_()
        elif isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(-1.5, 1.5), module.bias.normal_(0, 0.5)
            module.running_mean.normal_(0.2, 0.2), module.running_var.uniform_(0.2, 1)
        elif isinstance(module, nn.Conv2d):
            module.weight.normal_(0, 2 * module.weight[0].numel() ** -0.5), module.bias.normal_(0, 0.2)
    for name, module in head.named_modules():
        if name.endswith("glimpse"):
            module.parametrizations.weight.original0 *= 3
    return head.eval()


def inputs_of(features: ImageFeatures, rows: int) -> tuple[Any, Any, Any]:
    """(clip, autoencoder, maml): pictures in blocks, each of its own brightness."""
    generator = torch.Generator().manual_seed(rows)

    def pictures(side: int) -> Any:
        coarse = torch.rand(rows, 1, side // 4, side // 4, generator=generator) * torch.linspace(0.3, 1, rows).view(-1, 1, 1, 1)
        return coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)

    clip = torch.ones(rows, 1) if features.clip_dim == 1 else torch.randn(rows, features.clip_dim, generator=generator)
    return clip, pictures(128) if features.autoencoder else None, pictures(84) if features.maml else None


def tokens_of(rows: int) -> Any:
    """Questions of several lengths, with an unknown word among them."""
    tokens = torch.randint(0, WORDS, (rows, LENGTH), generator=torch.Generator().manual_seed(rows))
    for row, length in zip(tokens, (7, 12, 3), strict=False):
        row[length:] = WORDS
    tokens[:, 1] = WORDS
    return tokens


def run(proto: Any, feed: Values, optimised: bool = True) -> Values:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = LEVEL[optimised]
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_outputs()]
    return dict(zip(names, session.run(names, {x.name: feed[x.name] for x in session.get_inputs()}), strict=True))


def encoded(features: ImageFeatures, inputs: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
    """With the auto-encoder's code for its pixels: the features are the same, and nothing is reconstructed."""
    clip, pixels, maml = inputs
    return clip, features.autoencoder.encode(pixels) if features.autoencoder else None, maml


@torch.inference_mode()
def seen_by(features: ImageFeatures, inputs: tuple[Any, Any, Any]) -> Any:
    return features(*encoded(features, inputs))[0][:, 0].numpy()


@torch.inference_mode()
def reference(head: Head, inputs: tuple[Any, Any, Any], tokens: Any) -> Values:
    inputs = encoded(head.features, inputs)
    if isinstance(head, MEVF):
        answer = head(*inputs, tokens)[0]
        return {"answer": answer.numpy(), "kind": np.zeros((len(answer), 1), np.float32)}
    opened, closed, kind, _ = head(*inputs, tokens)
    return {"answer": torch.cat([closed, opened], 1).numpy(), "kind": kind.numpy()}


def distance(expected: Values, got: Values) -> float:
    assert expected.keys() == got.keys()
    assert all(got[name].shape == x.shape and got[name].dtype == np.float32 for name, x in expected.items())
    return max(float(np.abs(x - got[name]).max()) for name, x in expected.items())


def is_lively(values: Values) -> bool:
    """Rows that differ, in a range where a tolerance of 1e-4 says something."""
    return all(not x.any() or (x.std(0).mean() > 0.1 and np.abs(x).max() < 50) for x in values.values() if len(x) > 1)


# The graphs


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("kind", KINDS)
def test_heads_equal_pytorch(kind: str, features: str) -> None:
    head = head_of(kind, features_of(features))
    graph, networks = head_graph(head), features_graph(head.features)
    assert (networks is None) == (features in ("clip", "none"))
    for rows in (1, 3):
        inputs, tokens = inputs_of(head.features, rows), tokens_of(rows)
        image = inputs[0].numpy()
        if networks is not None:
            given = {name: x.numpy() for name, x in zip(("autoencoder", "maml"), inputs[1:], strict=True) if x is not None}
            assert [x.name for x in networks.graph.input] == list(given)
            features_got = run(networks, given)["features"]
            np.testing.assert_allclose(features_got, seen_by(head.features, inputs)[:, head.features.clip_dim :], rtol=0, atol=TOLERANCE)
            assert rows == 1 or features_got.std(0).mean() > 0.05
            image = np.concatenate([image, features_got], 1)
        expected = reference(head, inputs, tokens)
        assert is_lively(expected)
        assert distance(expected, run(graph, {"image": image, "tokens": tokens.numpy()})) < TOLERANCE


@pytest.mark.parametrize("depth", [1, 2, 10])
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_glimpses_or_stacks(kind: str, depth: int) -> None:
    head = head_of(kind, features_of("clip"), depth=depth)
    inputs, tokens = inputs_of(head.features, 3), tokens_of(3)
    got = run(head_graph(head), {"image": inputs[0].numpy(), "tokens": tokens.numpy()})
    assert distance(reference(head, inputs, tokens), got) < TOLERANCE


@pytest.mark.parametrize(("kind", "depth"), [("mevf-ban-gru", 2), ("qcr", 10)])
def test_the_published_sizes_equal_pytorch(kind: str, depth: int) -> None:
    head = head_of(kind, ImageFeatures(512), 1024, depth, 300)
    inputs, tokens = inputs_of(head.features, 3), tokens_of(3)
    expected = reference(head, inputs, tokens)
    assert is_lively(expected)
    assert distance(expected, run(head_graph(head), {"image": inputs[0].numpy(), "tokens": tokens.numpy()})) < TOLERANCE


class Case:
    """A small head with its graph, three rows and what PyTorch answers."""

    def __init__(self, kind: str) -> None:
        self.head = head_of(kind, features_of("clip"), depth=2)
        self.inputs, self.tokens = inputs_of(self.head.features, 3), tokens_of(3)
        self.graph = head_graph(self.head)
        self.expected = reference(self.head, self.inputs, self.tokens)

    def misses(self, graph: Any) -> bool:
        got = run(graph, {"image": self.inputs[0].numpy(), "tokens": self.tokens.numpy()}, optimised=False)
        return distance(self.expected, got) > TOLERANCE


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def changed(graph: Any, change: Callable[[Any], Any]) -> Iterator[tuple[str, Any]]:
    """The graph with one of its weights changed, for each of which ``change`` gives something."""
    for i, weight in enumerate(graph.graph.initializer):
        array = numpy_helper.to_array(weight)
        new = change(array) if array.dtype == np.float32 else None
        if new is not None:
            faulty = copy.deepcopy(graph)
            faulty.graph.initializer[i].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(new), weight.name))
            yield weight.name, faulty


def forgotten(array: Any) -> Any:
    return np.zeros_like(array) if array.any() else None


def transposed(array: Any) -> Any:
    return array.T if array.ndim == 2 and array.shape[0] == array.shape[1] else None


@pytest.mark.parametrize("change", [forgotten, transposed])
def test_a_weight_forgotten_or_transposed_misses(case: Case, change: Any) -> None:
    assert not case.misses(case.graph)
    faults = dict(changed(case.graph, change))
    assert faults
    assert [name for name, faulty in faults.items() if not case.misses(faulty)] == []


@torch.no_grad()
def test_gates_in_another_order_miss(case: Case) -> None:
    gates = 4 if isinstance(case.head.question.recurrent, nn.LSTM) else 3
    for pair in combinations(range(gates), 2):
        order = list(range(gates))
        order[pair[0]], order[pair[1]] = pair[1], pair[0]
        faulty = copy.deepcopy(case.head)
        for parameter in faulty.question.recurrent.parameters():
            parts = parameter.clone().chunk(gates)
            parameter.copy_(torch.cat([parts[i] for i in order]))
        assert case.misses(head_graph(faulty)), pair


def with_operator(graph: Any, name: str, op: str) -> Any:
    faulty = copy.deepcopy(graph)
    next(n for n in faulty.graph.node if n.output[0] == name).op_type = op
    return faulty


def test_an_image_of_zeros_is_padding(case: Case) -> None:
    """BAN's words then count alike, which is more than no image: its maps have biases."""
    zeros = torch.zeros(3, CLIP)
    feed = {"image": zeros.numpy(), "tokens": case.tokens.numpy()}
    expected = reference(case.head, (zeros, None, None), case.tokens)
    assert distance(expected, run(case.graph, feed)) < TOLERANCE
    if any(n.output[0] == "object.there" for n in case.graph.graph.node):
        assert distance(expected, run(with_operator(case.graph, "object.there", "Exp"), feed)) > TOLERANCE  # 1 where it should be 0


def test_closed_answers_come_first() -> None:
    case = Case("qcr")
    faulty = copy.deepcopy(case.graph)
    node = next(n for n in faulty.graph.node if n.output[0] == "answer")
    node.input[0], node.input[1] = node.input[1], node.input[0]
    assert case.misses(faulty)


@pytest.fixture(scope="module")
def networks() -> tuple[Any, Values, Any]:
    """(graph, its inputs, what PyTorch gives for them)"""
    features = head_of("mevf-san-gru", features_of("clip+ae+maml")).features
    inputs = inputs_of(features, 3)
    given = {name: x.numpy() for name, x in zip(("autoencoder", "maml"), inputs[1:], strict=True)}
    return features_graph(features), given, {"features": seen_by(features, inputs)[:, CLIP:]}


def only_inside(array: Any) -> Any:
    """A norm's shift as if it went on beyond the border."""
    middle = array.shape[-1] // 2
    return np.broadcast_to(array[:, middle, middle, None, None], array.shape) if array.ndim == 3 else None


@pytest.mark.parametrize(("change", "count"), [(forgotten, 21), (only_inside, 3)])
def test_a_fault_in_the_features_misses(networks: tuple[Any, Values, Any], change: Any, count: int) -> None:
    graph, feed, expected = networks
    assert distance(expected, run(graph, feed)) < TOLERANCE
    faults = dict(changed(graph, change))
    assert len(faults) == count
    assert [name for name, faulty in faults.items() if distance(expected, run(faulty, feed)) < TOLERANCE] == []


SHAPED = {"Reshape": 1, "Split": 1, "Squeeze": 1, "Unsqueeze": 1, "ReduceSum": 1, "ReduceMax": 1, "Expand": 1, "Concat": 1}
PLAIN = {*SHAPED, "Abs", "Add", "Gather", "MatMul", "Mul", "Relu", "Shape", "Sigmoid", "Sign", "Softmax", "Sub", "Tanh", "Transpose"}
PLAIN |= {"Conv", "Flatten", "GlobalAveragePool", "MaxPool"}


def test_graphs_are_plain_small_and_the_same_twice(case: Case, networks: tuple[Any, Values, Any]) -> None:
    assert head_graph(copy.deepcopy(case.head)).SerializeToString() == case.graph.SerializeToString()
    for proto in (case.graph, networks[0]):
        onnx.checker.check_model(proto, full_check=True)
        nodes, weights = proto.graph.node, proto.graph.initializer
        assert proto.ir_version == 9 and [(x.domain, x.version) for x in proto.opset_import] == [("", 20)]
        assert {n.op_type for n in nodes} <= PLAIN and {n.domain for n in nodes} == {""}
        assert {w.name for w in weights} <= {x for n in nodes for x in n.input}
        assert all(x.type.tensor_type.shape.dim[0].dim_param == "B" for x in (*proto.graph.input, *proto.graph.output))
        whole = {w.name for w in weights if w.data_type == onnx.TensorProto.INT64}
        assert {w.data_type for w in weights} <= {onnx.TensorProto.INT64, onnx.TensorProto.FLOAT}
        readers = [(n.op_type, i) for n in nodes for i, x in enumerate(n.input) if x in whole]
        assert all(SHAPED[op] == i for op, i in readers)
        assert {n.op_type for n in nodes if "tokens" in n.input} <= {"Gather"}


def test_words_meet_their_matrix_once_and_states_share_theirs(case: Case) -> None:
    """So that int8 reaches both, and the file holds one."""
    products = [n.input[1] for n in case.graph.graph.node if n.op_type == "MatMul"]
    assert products.count("question.input.weight") == 1 and products.count("question.state.weight") == LENGTH - 1


@pytest.mark.parametrize("kind", ["mevf-ban-gru", "mevf-san-lstm", "qcr"])
def test_tensorrt_rtx_builds_the_heads(kind: str) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    head = head_of(kind, features_of("clip+ae+maml"), depth=2)
    sides = {"image": [CLIP + 128], "tokens": [LENGTH], "autoencoder": [1, 128, 128], "maml": [1, 84, 84]}
    for proto in (head_graph(head), features_graph(head.features)):
        log = trt.Logger(trt.Logger.ERROR)
        builder = trt.Builder(log)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, log)
        assert parser.parse(proto.SerializeToString()), [parser.get_error(i).desc() for i in range(parser.num_errors)]
        config, profile = builder.create_builder_config(), builder.create_optimization_profile()
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.SM89, 0)
        for x in proto.graph.input:
            profile.set_shape(x.name, *([rows, *sides[x.name]] for rows in (1, 1, 8)))
        config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
        assert plan is not None and plan.nbytes > 0


# What feeds them

NASTY = [
    *("", " ", "?", "...", ",,,", "'s", "'S'S", "?,? -yes/no", "x ray", "X, ray", "x  ray", "xx rays", "X-RAY", "x.ray", "x ?ray"),
    *("is this the patient's x ray? -yes/no", "Is this THE patient's x ray? -Open", "the x ray? - open", "? - open ? -open"),
    *("is. this. the", "is...this", "is\tthis\nthe\r\nheart", "is\u00a0this\u2003the\u3000heart", "is\x1cthis\x1fthe\x85heart\u2028x"),
    *("is\u200bthis", "the\x00heart", "unknown words, is this", "[PAD] [pad] [UNK]", "ΟΔΟΣ οδος ΟΔΟΣ.", "İstanbul ISTANBUL ıi"),
    *("STRASSE straße ẞ", "cœur ŒUVRE Ç", "心臓は 大きい", "❤️ heart ❤️", "e\u0301 é É", "ﬁne ﬀ", "is " * 40, "a " * 11 + "heart heart"),
    *("heart" * 5000, "-yes/no", "this'sthe", "’s heart’s", "x\u00a0ray", "T1,T2", "T1.5"),
]


def same_numbers(dictionary: Dictionary, questions: list[str]) -> None:
    """From the file alone, and through the runtime, which asks for its own length and padding."""
    expected = dictionary.tokens(questions).numpy()
    tokenizer = Tokenizer.from_str(words_tokenizer_json(dictionary))
    numbers = np.array([encoding.ids for encoding in tokenizer.encode_batch(questions)])
    tokenizer.no_padding()
    for got in (numbers, tokens_from_text(tokenizer, questions, LENGTH, len(dictionary.words), length=LENGTH)):
        wrong = [questions[i] for i in np.flatnonzero((got != expected).any(1))]
        assert not wrong, wrong[:5]


def questions_of(shared: Path, name: str) -> list[str]:
    if name == "slake":
        rows = [row for part in ("train", "validate", "test") for row in json.loads((shared / name / f"{part}.json").read_text("utf-8"))]
        return [row["question"] for row in rows if row["q_lang"] == "en"]
    files = ["questions.jsonl"] if name == "vqa-rad" else ["train.jsonl", "val.jsonl"]
    return [json.loads(line)["question"] for file in files for line in (shared / name / file).read_text("utf-8").splitlines()]


@pytest.mark.parametrize("name", ["vqa-rad", "vqa-med-2019", "slake"])
def test_words_of_real_questions_have_the_dictionarys_numbers(shared: Path, name: str) -> None:
    """Of a dictionary of a half of them, so that some words are unknown."""
    questions = questions_of(shared, name)
    dictionary = Dictionary.from_questions(questions[::2])
    assert len(questions) > 2000 and len(dictionary.words) > 30
    same_numbers(dictionary, questions)


def test_words_of_nasty_questions_have_the_dictionarys_numbers() -> None:
    generator = random.Random(0)
    pieces = [*"sxaσςΣß.?,'-/ \t", "...", "? -yes/no", "? - open", "? -open", "x ray", "'s", "\u2003", "\x1d", "heart", "İ"]
    made = ["".join(generator.choices(pieces, k=generator.randrange(30))) for _ in range(3000)]
    same_numbers(Dictionary.from_questions(NASTY), [*NASTY, *made])
    same_numbers(Dictionary.from_questions(made[:500]), made)
    same_numbers(Dictionary(()), NASTY)


def test_every_character_is_the_same_to_both() -> None:
    """Of Unicode 3.2, since what came later the two need not know alike; letters without case are all alike."""
    known = [chr(c) for c in range(0x110000) if unicodedata.ucd_3_2_0.category(chr(c)) not in ("Cn", "Co", "Cs", "Lo")]
    questions = [f"a{c}b {c} ab{c}" for c in known]
    assert len(known) > 5_000
    same_numbers(Dictionary.from_questions(questions), questions)


def test_another_dictionary_gives_other_numbers() -> None:
    dictionary = Dictionary.from_questions(NASTY)
    tokenizer = Tokenizer.from_str(words_tokenizer_json(Dictionary(dictionary.words[::-1])))
    assert tokenizer.encode("is this the heart").ids != dictionary.tokens(["is this the heart"])[0].tolist()
    assert words_tokenizer_json(dictionary) == words_tokenizer_json(Dictionary(dictionary.words))


def test_tokens_of_one_length(tmp_path: Path) -> None:
    dictionary = Dictionary(("is", "this", "the", "heart"))
    (tmp_path / "words.json").write_text(words_tokenizer_json(dictionary), encoding="utf-8")
    tokenizer = tokenizer_from_file(tmp_path / "words.json")
    texts = ["is this", "the heart " * 10, ""]
    assert tokens_from_text(tokenizer, texts, 16, 4, length=5).tolist() == [[0, 1, 4, 4, 4], [2, 3, 2, 3, 2], [4] * 5]
    assert tokens_from_text(tokenizer, [], 16, 4, length=5).shape == (0, 5)
    assert tokens_from_text(tokenizer, texts[:1], 16, 4).tolist() == [[0, 1]]  # its own length where none is asked for


@pytest.mark.parametrize("size", [84, 128])
@pytest.mark.parametrize("shape", [(200, 301), (50, 40, 3), (7, 900, 3), (84, 84)])
def test_grey_pixels_are_pillows(shape: tuple[int, ...], size: int, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    expected = np.asarray(Image.fromarray(pixels).convert("L").resize((size, size), Image.Resampling.BICUBIC)) / np.float32(255)
    got = grey_from_pixels(pixels, size)
    assert got.dtype == np.float32 and got.shape == (1, size, size)
    np.testing.assert_array_equal(got[0], expected)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    np.testing.assert_array_equal(grey_from_path(tmp_path / "picture.png", size).numpy(), got)
