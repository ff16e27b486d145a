"""The GPU's kernels without a GPU: their numbers in Triton's interpreter, what is compiled ahead of time, and what a launch is given."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from pmclip_deploy.kernels.cuda import Array, Call, CudaSimilarity, array_from_view
from pmclip_deploy.kernels.manifest import Kernel, chosen, code, kernels_from_manifest
from pmclip_deploy.kernels.plan import Tile, plan_for, traffic
from pmclip_deploy.kernels.reference import Similarity, contrastive_similarity

NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs `pip install triton`")
TYPES = {"f32": np.float32, "f16": np.float16, "i8": np.int8}
SHAPES = [(1, 1, 1, 1), (3, 63, 7, 5), (16, 130, 64, 16), (17, 65, 100, 3), (1, 1000, 512, 10), (2, 63, 33, 100)]  # B, N, D, k
EDGES = ["ties", "no direction", "magnitudes", "none", "no scale", "negative scale", "scales"]
CASES = [(bank, *shape, "") for bank in TYPES for shape in SHAPES] + [(bank, 3, 150, 40, 12, edge) for bank in TYPES for edge in EDGES]
MULTIPROCESSORS = 1  # so that a slice has more than one tile


class Given(NamedTuple):
    image: NDArray[np.float32]
    bank: NDArray[Any]
    logit_scale: float
    k: int
    scales: NDArray[np.float32] | None


def given(bank: str, images: int, rows: int, width: int, k: int, edge: str) -> Given:
    rng = np.random.default_rng([images, rows, width])
    image = rng.normal(size=(images, width)).astype(np.float32)
    made = rng.normal(size=(rows, width))
    made = np.round(made * 40).clip(-127, 127).astype(np.int8) if bank == "i8" else made.astype(TYPES[bank])
    scales, logit_scale = None, 100.0
    with np.errstate(over="ignore"):
        if edge == "ties":
            made[[140, 70, 66, 5, 64, 149]] = made[3]
            made[100:130] = made[90]
            image[0], image[1] = made[3], made[90]
        elif edge == "no direction":
            made[::3] = 0
            image[1] = 0
            if bank != "i8":
                made[1], made[4, 5], made[7, 0], made[8, 39] = np.inf, np.nan, -np.inf, np.nan
                image[2, 3] = np.inf
        elif edge == "magnitudes" and bank != "i8":
            powers = [1e-42, 1e-30, 1e-19, 1e19, 1e37] if bank == "f32" else [1e-6, 1e-4, 1e3, 1e4, 1.0]
            for i, power in enumerate(powers):
                made[i::7] = (made[i::7] * power).astype(made.dtype)
            image *= np.array([[1e-41], [1e36], [1e-20]], np.float32)
            made[:2, 10:] = 0  # the largest of a row first, and last
            made[2:4, :35] = 0
        elif edge == "none":
            made[:] = 0
        elif edge == "no scale":
            logit_scale = 0.0
        elif edge == "negative scale":
            logit_scale = -3.5
        elif edge == "scales":
            scales = rng.normal(size=rows).astype(np.float32)
            scales[:5] = 0, np.inf, np.nan, -np.inf, 1e-42
    return Given(image, made, logit_scale, k, scales)


def compare(case: Given, found: Similarity, ties_exact: bool = False) -> None:
    """Rows whose scores differ by less than the tolerance may change places, unless they are equal."""
    atol = 1e-6 * max(1, abs(case.logit_scale)) + 1e-6
    expected = contrastive_similarity(*case)
    every = contrastive_similarity(case.image, case.bank, case.logit_scale, len(case.bank), case.scales)
    np.testing.assert_allclose(found.score, expected.score, rtol=0, atol=atol)
    np.testing.assert_allclose(found.log_sum_exp, expected.log_sum_exp, rtol=1e-6, atol=atol)
    for i, given_rows in enumerate(found.index):
        rows = given_rows[given_rows >= 0]
        assert len(set(rows)) == len(rows) == np.isfinite(expected.score[i]).sum()
        scores = dict(zip(every.index[i], every.score[i], strict=True))
        np.testing.assert_allclose([scores[row] for row in rows], found.score[i, : len(rows)], rtol=0, atol=atol)
        assert (given_rows[len(rows) :] == -1).all()
        score = found.score[i, : len(rows)]
        assert (np.diff(rows)[score[1:] == score[:-1]] > 0).all()  # of equal ones the lowest
    if ties_exact:
        np.testing.assert_array_equal(found.index, expected.index)


def kernels(bank: str, scaled: bool, size: int) -> list[Kernel]:
    """As the compiler writes them, less what it makes."""
    from pmclip_deploy.kernels.triton_similarity import similarity_merge, similarity_slices

    rows = []
    for function, of in ((similarity_slices, bank), (similarity_merge, "")):
        names = tuple(name for name in function.arg_names if not name.isupper() and (scaled or name != "scales"))
        rows.append(Kernel("", function.__name__, "sm_75", of, scaled and bool(of), False, size, Tile(columns=32), names, 0, 0, 0, 0, "", ""))
    return rows


def interpret(file: str) -> None:
    """Runs in a process of its own, since Triton chooses its interpreter when it is imported: launches as CudaSimilarity would, on the CPU."""
    import torch
    from triton.runtime.interpreter import interpreter_builder as builder

    from pmclip_deploy.kernels import triton_similarity

    read, load = [0], builder.create_masked_load

    def counted(pointers: Any, mask: Any, *rest: Any) -> Any:
        read[0] += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
        return load(pointers, mask, *rest)

    builder.create_masked_load = counted
    results: dict[str, Any] = {}
    for number, case in enumerate(CASES):
        one, read[0] = given(*case), 0
        (images, _), k = one.image.shape, one.k
        scale = np.array(one.logit_scale, np.float32)
        out = [np.zeros((images, k), np.float32), np.zeros((images, k), np.int64), np.zeros(images, np.float32)]
        named = {"image": one.image, "bank": one.bank, "logit_scale": scale, "scales": one.scales}
        named |= dict(zip(("score", "index", "log_sum_exp"), out, strict=True))
        arrays = {name: array for name, array in named.items() if array is not None}
        given_arrays = {name: Array(array.ctypes.data, array.shape, str(array.dtype)) for name, array in arrays.items()}
        size = 1 << (k - 1).bit_length()
        call = Call.of(given_arrays, kernels(case[0], one.scales is not None, size), 75, MULTIPROCESSORS)
        keys, sums = np.zeros(call.plan.keys, np.int64), np.zeros(call.plan.sums, np.float32)
        at = {array.ctypes.data: torch.from_numpy(array) for array in (*arrays.values(), keys, sums)}
        for kernel, grid, values in call.launches(keys.ctypes.data, sums.ctypes.data):
            arguments = [at[value] if type(value) is int else int(value) for value in values]
            if kernel.bank and not kernel.scaled:
                arguments.insert(2, None)
            constants = (kernel.size, *kernel.tile[:3]) if kernel.bank else (kernel.size, kernel.tile.slices)
            getattr(triton_similarity, kernel.entry)[grid](*arguments, *constants)
        results |= {f"{number} {i}": array for i, array in enumerate(out)} | {f"{number} read": read[0]}
    np.savez(file, **results)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    file = tmp_path_factory.mktemp("interpreted") / "results.npz"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, __file__, str(file)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return np.load(file)


@NEEDS_TRITON
@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: "-".join(map(str, CASES[number])).rstrip("-"))
def test_the_kernels_equal_the_reference(interpreted: Any, number: int) -> None:
    case = CASES[number]
    compare(given(*case), Similarity(*(interpreted[f"{number} {i}"] for i in range(3))), case[-1] in ("ties", "none", "no scale"))


@NEEDS_TRITON
@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: "-".join(map(str, CASES[number])).rstrip("-"))
def test_the_kernels_read_what_the_plan_counts(interpreted: Any, number: int) -> None:
    case = given(*CASES[number])
    (images, width), rows, tile = case.image.shape, len(case.bank), Tile(columns=32)
    plan = plan_for(images, rows, 1 << (case.k - 1).bit_length(), tile, 4 * MULTIPROCESSORS)
    bytes_ = traffic(images, rows, width, case.k, CASES[number][0], case.scales is not None, plan, tile)
    assert interpreted[f"{number} read"] == bytes_.bank + bytes_.images + bytes_.partial // 2


if __name__ == "__main__":
    interpret(sys.argv[1])
