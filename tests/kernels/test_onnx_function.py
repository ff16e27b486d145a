"""ContrastiveSimilarity as an ONNX function: onnxruntime says what the reference says, and TensorRT-RTX parses it as it is."""

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

onnx = pytest.importorskip("onnx")

from pmclip_deploy.kernels.onnx_function import DOMAIN, NAME, similarity_graph
from pmclip_deploy.kernels.reference import contrastive_similarity

RNG = np.random.default_rng(0)


def run(image: Any, bank: Any, scale: float, k: int) -> list[Any]:
    model = similarity_graph(*bank.shape, k=k)
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, {"image": image, "bank": bank, "logit_scale": np.array(scale, np.float32)}))


@pytest.mark.parametrize("scale", [100.0, 1.0, -5.0, 0.0])
@pytest.mark.parametrize(("batch", "rows", "dim", "k"), [(1, 1, 1, 1), (3, 10, 512, 10), (2, 7, 5, 3), (16, 33, 64, 40), (1, 4, 8, 0)])
def test_it_says_what_the_reference_says(batch: int, rows: int, dim: int, k: int, scale: float) -> None:
    image, bank = RNG.normal(size=(batch, dim)).astype(np.float32), RNG.normal(size=(rows, dim)).astype(np.float32)
    score, index, log_sum_exp = run(image, bank, scale, k)
    expected = contrastive_similarity(image, bank, scale, k)
    np.testing.assert_allclose(score, expected.score, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(log_sum_exp, expected.log_sum_exp, rtol=1e-5, atol=1e-4)
    assert index.dtype == np.int64
    if dim > 1:  # cosines of one dimension are all 1 or -1
        np.testing.assert_array_equal(index, expected.index)


def test_rows_without_a_direction_never_win_and_equal_ones_come_in_order() -> None:
    image, bank = RNG.normal(size=(4, 8)).astype(np.float32), RNG.normal(size=(9, 8)).astype(np.float32)
    bank[0], bank[1, 3], bank[2, 0], bank[3, 1] = 0, np.nan, np.inf, -np.inf
    bank[4] *= 1e30
    bank[5] *= 1e-35
    bank[7] = bank[6] = image[0]
    image[1], image[2, 0] = 0, np.inf
    score, index, log_sum_exp = run(image, bank, 100.0, 11)
    expected = contrastive_similarity(image, bank, 100.0, 11)
    np.testing.assert_array_equal(index, expected.index)
    np.testing.assert_allclose(score, expected.score, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(log_sum_exp, expected.log_sum_exp, rtol=1e-5, atol=1e-4)
    assert index[0, :2].tolist() == [6, 7] and not np.isnan(score).any() and log_sum_exp[1] == -np.inf


def test_one_node_of_our_domain_stands_in_the_graph() -> None:
    (node,) = similarity_graph(5, 8, 3).graph.node
    assert (node.domain, node.op_type) == (DOMAIN, NAME)


def test_tensorrt_rtx_builds_it_as_it_is() -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs `pip install tensorrt_rtx`")
    from pmclip_deploy.export.engine_from_onnx import engine_from_onnx

    engine = engine_from_onnx(similarity_graph(5, 64, 5).SerializeToString(), "tensorrt_rtx", compute_capabilities=("8.9",))
    assert len(engine.plan) > 1000
