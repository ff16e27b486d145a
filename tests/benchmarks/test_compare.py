"""The comparison with peers: equal weights in every layout, equal outputs before any timing, and every gap said with its reason."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from pmclip_deploy.benchmarks import compare, environments
from pmclip_deploy.benchmarks.harness import SystemFailed, Worker
from pmclip_deploy.benchmarks.results import Run
from pmclip_deploy.bundle.files import write_bundle
from pmclip_deploy.errors import DeviceError, UsageError
from pmclip_deploy.machine import stamp
from pmclip_deploy.models import DEFAULT_CHECKPOINT
from pmclip_deploy.opening import load
from tests.tiny.bundle import SIZE, tiny_bundle, tiny_files, tiny_manifest

PEERS = Path(os.environ.get("PMCLIP_PEERS", "peers"))  # of environments.py


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """ "fp32" and "int8" are the same tiny bundle; "fp16" has another model's image tower."""
    folder = tmp_path / "weights"
    for name in ("fp32", "int8"):
        tiny_bundle(folder / name)
    files = tiny_files()
    model = onnx.load_from_string(files["image.onnx"])
    next(node for node in model.graph.node if node.output[0] == "mean").op_type = "ReduceMax"
    write_bundle(folder / "fp16", tiny_manifest(), {**files, "image.onnx": model.SerializeToString()})
    rng = np.random.default_rng(0)
    np.save(folder / "image.npy", rng.normal(size=(4, 3, SIZE, SIZE)).astype(np.float32))
    np.save(folder / "text.npy", np.array([[2, 4, 3, 0, 0], [2, 6, 7, 8, 5], [2, 5, 3, 0, 0]], np.int64))
    return folder


def comparison(weights: Path, peers: Path) -> compare.Comparison:
    return compare.Comparison("ViT-B/32", peers, weights, 2, "cpu", Run("command", stamp(2)))


def test_our_system_says_what_the_runtime_says_and_nothing_else_gets_onto_its_stdout(weights: Path) -> None:
    predictor, pixels = load(weights / "fp32"), np.load(weights / "image.npy")
    with Worker("pmclip-deploy fp32") as worker:
        worker.open("ViT-B/32", weights, 2)
        np.testing.assert_array_equal(worker.embed("image", weights / "image.npy"), [predictor.embedding_from_tensor(x) for x in pixels])
        assert worker.embed("text", weights / "text.npy").shape == (3, 8)
        times = worker.run("image", weights / "image.npy", 2, 3, np.array([0.0, 0.05, 0.1]))
        assert (times[:, 0] >= [0, 0.05, 0.1]).all() and (times[:, 1] > times[:, 0]).all()
        assert 10 < worker.memory() < 4096
        assert worker.ask({"prepare": {"system": "pmclip-deploy fp32"}}) == {"prepared": {}}


def test_a_text_is_cut_to_its_own_length_and_padded_as_open_clip_does() -> None:
    from pmclip_deploy.benchmarks import systems

    tokens = np.array([[7, 0, 9, 0, 0], [7, 9, 0, 0, 0]])
    np.testing.assert_array_equal(systems._own_length(tokens), [[7, 0, 9], [7, 9, 0]])
    assert systems._padded(tokens, 77).shape == (2, 77) and systems._padded(tokens, 77).sum() == tokens.sum()
    assert compare.tokens_computed("pmclip-deploy int8", "RN50", tokens, 1) == 2.5
    assert compare.tokens_computed("openvino-fp32", "RN50", tokens, 1) == 2.5
    assert compare.tokens_computed("openvino-fp32", "RN50", tokens, 2) == 3
    assert [compare.tokens_computed("open_clip-eager", model, tokens, 2) for model in ("RN50", "pmclip-lite")] == [77, 64]


@pytest.mark.parametrize("system", ["no-such-system", "pmclip-deploy int4"])
def test_what_cannot_be_opened_is_one_line(weights: Path, system: str) -> None:
    with Worker(system) as worker, pytest.raises(SystemFailed) as failed:
        worker.open("ViT-B/32", weights, 2)
    assert system in str(failed.value) and "\n" not in str(failed.value)


def test_the_inputs_that_all_are_given(tmp_path: Path) -> None:
    """Of the embedded checkpoint, whose calibration names pictures that are not here."""
    pytest.importorskip("torch", reason="training needs the extra `train`")
    from pmclip_deploy.benchmarks.towers import pictures_for_calibration
    from pmclip_deploy.benchmarks.weights import _inputs
    from pmclip_deploy.export.onnx_from_checkpoint import modules_from_checkpoint
    from pmclip_deploy.export.records import CALIBRATION

    (tmp_path / "checkpoint").mkdir()
    shutil.copy(DEFAULT_CHECKPOINT / CALIBRATION, tmp_path / "checkpoint")
    _inputs(modules_from_checkpoint(DEFAULT_CHECKPOINT), tmp_path, pictures_for_calibration(tmp_path))
    known, new, texts = (np.load(tmp_path / f"{name}.npy") for name in ("calibration-image", "image", "text"))
    assert known.shape[1:] == new.shape[1:] and len(new) == 30 and len(texts) == 16 and texts.any(1).all()


def test_what_is_not_equal_or_not_there_is_not_timed(weights: Path, tmp_path: Path) -> None:
    names = ["null", *compare.OURS, "openvino-fp32"]
    rows = list(compare.compare(comparison(weights, tmp_path / "peers"), names, seconds=0.01, repeats=1))
    by = {(row["system"], row["part"], row["scenario"]): row for row in rows}
    assert by["pmclip-deploy int8", "image", "parity"]["figures"]["cosine"] == pytest.approx(1)
    assert by["pmclip-deploy int8", "image", "single-stream"]["figures"]["p50_ms"] > 0
    assert by["null", "image", "offline"]["samples"] >= compare.BATCH

    wrong = by["pmclip-deploy fp16", "image", "parity"]
    assert wrong["figures"]["cosine"] < 0.999 and "not equal" in wrong["not_measured"]
    for scenario in compare.SCENARIOS:
        assert by["pmclip-deploy fp16", "image", scenario]["not_measured"] == wrong["not_measured"]
        assert by["pmclip-deploy fp16", "text", scenario]["not_measured"] is None  # its text tower is right
        for part in compare.PARTS:
            missing = by["openvino-fp32", part, scenario]
            assert missing["figures"] == {} and "environments --folder" in missing["not_measured"]
    assert by["pmclip-deploy fp32", "both", "cold"]["figures"]["peak_mib"] > 10
    files = sum(file.stat().st_size for file in (weights / "fp32").iterdir())
    sizes = by["pmclip-deploy fp32", "both", "size"]["figures"]
    assert sizes["model_bytes"] == files and sizes["environment_bytes"] > 50e6


def test_what_all_pictures_share_hides_no_difference() -> None:
    rng = np.random.default_rng(0)
    shared, own, other = 100 * rng.normal(size=(1, 64)), rng.normal(size=(8, 64)), rng.normal(size=(8, 64))
    figures = compare.difference(shared + own, shared + other)
    assert figures["cosine"] > 0.999 and figures["centred_cosine_mean"] < 0.5
    same = compare.difference(shared + own, 3 * (shared + own))
    assert same == {name: pytest.approx(1) for name in figures}


@pytest.mark.parametrize("model", ["RN50", "pmclip-lite"])
def test_a_peer_without_such_a_model_is_not_measured(weights: Path, tmp_path: Path, model: str) -> None:
    made = comparison(weights, tmp_path)
    made.model = model
    (system,) = made.systems(["fastembed"])
    assert system.worker is None and "ViT-B/32 alone" in system.why_not["image"]


def test_transformers_embeds_the_same_from_the_names_it_uses(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="training needs the extra `train`")
    transformers = pytest.importorskip("transformers", reason="training needs the extra `train`")
    tiny_clip = pytest.importorskip("tests.tiny.clip")
    from pmclip_deploy.benchmarks.weights import transformers_from_open_clip

    tiny_clip.add_tiny(tmp_path)
    try:
        ours = tiny_clip.lively("tiny")
    finally:
        tiny_clip.remove_tiny()
    text = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "quick_gelu"}
    vision = {**text, "hidden_size": 64, "intermediate_size": 256, "image_size": 32, "patch_size": 16}
    of_text = transformers.CLIPTextConfig(**text, vocab_size=49408, eos_token_id=49407, projection_dim=32)
    seen = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**vision, projection_dim=32)).eval()
    read = transformers.CLIPTextModelWithProjection(of_text).eval()
    tensors = transformers_from_open_clip(ours.state_dict())
    for model in (seen, read):
        left = model.load_state_dict({k: v for k, v in tensors.items() if k in model.state_dict()}, strict=False)
        assert [name for name in left.missing_keys if "position_ids" not in name] == []
    tokens = torch.tensor([[49406, 320, 1929, 49407, 0, 0], [49406, 320, 1929, 539, 320, 49407]])
    pixels = tiny_clip.pictures(32, 2)
    with torch.inference_mode():
        torch.testing.assert_close(seen(pixel_values=pixels).image_embeds, ours.encode_image(pixels), atol=1e-4, rtol=1e-4)
        found = read(input_ids=tokens, attention_mask=(tokens != 0).long()).text_embeds
        torch.testing.assert_close(found, ours.encode_text(tokens), atol=1e-4, rtol=1e-4)


# --- environments ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow("makes an environment with pip")
def test_what_pip_refuses_is_named_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    refused = environments.Environment(("no-such-peer-of-pmclip>=1",), ("no_such_peer",), 0.1)
    monkeypatch.setitem(environments.ENVIRONMENTS, "refused", refused)
    monkeypatch.setitem(environments.ENVIRONMENTS, "empty", environments.Environment(("pip",), ("pip",), 0.1))
    assert "no-such-peer-of-pmclip" in str(environments.build(tmp_path, "refused"))
    with pytest.raises(DeviceError, match=r"could not be built: .*no-such-peer-of-pmclip"):
        environments.python_of(tmp_path, "refused")

    with pytest.raises(DeviceError, match="no environment; build it with"):
        environments.python_of(tmp_path, "empty")
    assert environments.build(tmp_path, "empty") is None
    python = environments.python_of(tmp_path, "empty")
    begun = python.stat().st_ino
    assert environments.build(tmp_path, "empty") is None and python.stat().st_ino == begun  # it goes on from what is there


def test_an_environment_that_exists_is_taken_by_a_link(tmp_path: Path) -> None:
    if sys.prefix == sys.base_prefix:
        pytest.skip("the tests run in no virtual environment")
    environments.link(tmp_path, "openvino", Path(sys.prefix))
    python = environments.python_of(tmp_path, "openvino")
    told = subprocess.run([python, "-c", "import sys; print(sys.prefix != sys.base_prefix)"], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "True"
    with pytest.raises(UsageError, match="no virtual environment"):
        environments.link(tmp_path, "fastembed", tmp_path)


# --- peers, where their environments are --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(environments.OF))
def test_a_peer_embeds_what_we_do(name: str) -> None:
    weights = PEERS / "weights" / compare.MODELS["ViT-B/32"]
    if not (weights / "ready").is_file():
        pytest.skip(f"needs the weights in {weights}; PMCLIP_PEERS says where, `benchmarks.compare` writes them")
    made = comparison(weights.resolve(), PEERS.resolve())
    (system,) = made.systems([name])
    if system.why_not:
        pytest.skip(system.why_not["image"])
    with made.worker(name) as peer, Worker(compare.OURS[0]) as ours:
        for worker in (peer, ours):
            worker.ask({"open": made.asked(worker.system)})
        for part in compare.PARTS:
            file = made.singles(part)[0]
            figures = compare.difference(ours.embed(part, file), peer.embed(part, file))
            assert figures["cosine"] >= (0.9 if name.endswith("int8") else 0.9999)
