"""Every implementation of the similarity kernel against the reference: odd shapes, dtypes, ties, and numbers that f32 cannot square."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmclip_deploy import kernels
from pmclip_deploy.kernels import Similarity, cpu, numpy_path, reference
from tests.cores import ALLOWED

# How far a score may be from the reference's, in parts of logit_scale. Images, products and sums are f32, and every f16 and int8 is an f32;
# but four images or more may meet int8 rows rounded to 16 bits. Long sums of products of one sign lose more.
TOLERANCE = {"float32": 1e-6, "float16": 1e-6, "int8": 1e-6}
ROUNDED, A_NUMBER = 5e-5, 4e-9

ISAS = ("plain", "AVX2", "AVX-512", "AVX-512 VNNI", "NEON")

Kernel = Callable[..., Similarity]


@pytest.fixture(params=["NumPy", *ISAS])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    if request.param == "NumPy":
        monkeypatch.setattr(cpu, "library", None)
        yield kernels.contrastive_similarity
    else:
        if not cpu.library:
            pytest.skip("needs the compiled kernel")
        if not cpu.use(request.param):
            pytest.skip(f"this processor has no {request.param}")
        assert cpu.isa() == request.param
        yield kernels.contrastive_similarity
        cpu.use(None)


def embeddings(rng: np.random.Generator, rows: int, D: int, dtype: str = "float32") -> Any:
    values = rng.normal(size=(rows, D)) * (40 if dtype == "int8" else 1)
    return np.clip(np.rint(values), -128, 127).astype(np.int8) if dtype == "int8" else values.astype(dtype)


def check(kernel: Kernel, image: Any, bank: Any, logit_scale: float = 1.0, k: int = 10, scales: Any = None, threads: int = 0) -> Similarity:
    """Runs the kernel, and compares all that it says with the reference."""
    got = kernel(image, bank, logit_scale, k, scales, threads)
    want = reference.contrastive_similarity(image, bank, logit_scale, k, scales)
    every = reference.contrastive_similarity(image, bank, logit_scale, len(bank), scales)
    rounded = bank.dtype == np.int8 and len(image) >= 4
    lost = (ROUNDED if rounded else TOLERANCE[str(bank.dtype)]) + A_NUMBER * bank.shape[1]
    tolerance = lost * abs(logit_scale) + 1e-30
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
    np.testing.assert_array_equal(np.isneginf(got.score), np.isneginf(want.score))
    np.testing.assert_array_equal(got.index == -1, np.isneginf(got.score))
    finite = np.isfinite(want.score)
    np.testing.assert_allclose(got.score[finite], want.score[finite], rtol=0, atol=tolerance)
    np.testing.assert_allclose(got.log_sum_exp, want.log_sum_exp, rtol=1e-6, atol=tolerance + 1e-5)
    for q in range(len(image)):
        given = got.index[q][got.index[q] >= 0]
        assert len(set(given)) == len(given)
        true = np.empty(len(bank), np.float32)
        true[every.index[q][every.index[q] >= 0]] = every.score[q][every.index[q] >= 0]
        np.testing.assert_allclose(got.score[q][: len(given)], true[given], rtol=0, atol=tolerance)
        pairs = list(zip(-got.score[q], got.index[q], strict=True))[: len(given)]
        assert pairs == sorted(pairs)  # of equal ones the lowest first
    return got


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("B", [0, 1, 2, 3, 5, 16, 17])
def test_odd_shapes(kernel: Kernel, B: int, dtype: str) -> None:
    rng = np.random.default_rng(B)
    for N in (0, 1, 2, 63, 64, 65, 1000):
        for D in (1, 3, 7, 8, 31, 64, 100, 512, 513):
            if N < 1000 or D in (7, 100, 512):
                check(kernel, embeddings(rng, B, D), embeddings(rng, N, D, dtype), 100.0, k=min(7, N) + (N % 2))


@pytest.mark.parametrize("k", [0, 1, 10, 64, 200, 1001])
def test_any_k(kernel: Kernel, k: int) -> None:
    rng = np.random.default_rng(k)
    check(kernel, embeddings(rng, 5, 20), embeddings(rng, 1000, 20), 10.0, k)
    check(kernel, embeddings(rng, 1, 20), embeddings(rng, 64, 20), 10.0, k)


def test_no_dimensions_means_no_direction(kernel: Kernel) -> None:
    got = check(kernel, np.zeros((2, 0), np.float32), np.zeros((3, 0), np.float32), k=2)
    assert (got.index == -1).all() and np.isneginf(got.log_sum_exp).all()


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("B", [1, 17])
def test_threads_change_nothing(kernel: Kernel, threads: int, B: int) -> None:
    rng = np.random.default_rng(0)
    image, bank = embeddings(rng, B, 257), embeddings(rng, 3001, 257).repeat(8 if B == 1 else 2, 0)  # work enough for 5
    alone = kernel(image, bank, 50.0, 30, threads=1)
    got = check(kernel, image, bank, 50.0, 30, threads=threads)
    np.testing.assert_array_equal(got.index, alone.index)
    np.testing.assert_array_equal(got.score, alone.score)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("D", [768, 8192, 262144])
def test_long_sums_of_one_sign(kernel: Kernel, D: int, dtype: str) -> None:
    rng = np.random.default_rng(D)
    bank = np.ones((6, D), np.float32) * np.float32([[0.3], [-0.3], [77], [-77], [0.1], [5]])
    bank[2:4] += np.abs(rng.normal(size=(2, D)))
    for B in (1, 4):
        check(kernel, np.full((B, D), 0.1, np.float32), np.rint(bank).astype(dtype) if dtype == "int8" else bank.astype(dtype), 1.0, 6)


@pytest.mark.parametrize("D", [4096, 4097])
def test_the_largest_integers_overflow_nothing(kernel: Kernel, D: int) -> None:
    bank = np.full((7, D), -128, np.int8)
    bank[1::2] = 127
    got = check(kernel, np.tile(np.array([[3.0], [-1e-20]], np.float32), (2, D)), bank, 1.0, 7)
    np.testing.assert_allclose(np.abs(got.score), 1, rtol=1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("logit_scale", [100.0, -100.0, 0.0])
def test_of_equal_rows_the_lowest_comes_first(kernel: Kernel, logit_scale: float, dtype: str) -> None:
    rng = np.random.default_rng(1)
    few = embeddings(rng, 7, 65, dtype)
    copies = rng.permutation(np.repeat(np.arange(7), 150))
    for B in (1, 2, 4, 7):
        image = embeddings(rng, B, 65)
        got = check(kernel, image, few[copies], logit_scale, 150)
        for q in range(B):
            best = copies[got.index[q, 0]] if logit_scale else slice(None)
            expected = np.flatnonzero(copies == best) if logit_scale else np.arange(150)
            np.testing.assert_array_equal(got.index[q], expected)
            assert len(set(got.score[q])) == 1


@pytest.mark.parametrize("B", [1, 3, 4])
def test_what_has_no_direction_is_never_given(kernel: Kernel, B: int) -> None:
    rng = np.random.default_rng(2)
    image, bank = embeddings(rng, B, 33), embeddings(rng, 100, 33)
    bank[[0, 50, 99]] = 0
    bank[3, 4], bank[60, 0], bank[61, 32], bank[62] = np.inf, -np.inf, np.nan, np.nan
    got = check(kernel, image, bank, 100.0, 100)
    assert (got.index[:, -7:] == -1).all() and (got.index[:, :-7] >= 0).all()
    image[0] = 0
    image[-1, 5] = np.nan if B > 1 else np.inf
    got = check(kernel, image, bank, 100.0, 5)
    assert (got.index[[0, -1]] == -1).all() and np.isneginf(got.log_sum_exp[[0, -1]]).all()
    check(kernel, image, np.zeros_like(bank), 100.0, 5)


@pytest.mark.parametrize("B", [1, 3, 4])
def test_lengths_that_f32_cannot_square(kernel: Kernel, B: int) -> None:
    rng = np.random.default_rng(3)
    image, bank = embeddings(rng, B, 50), embeddings(rng, 90, 50)
    exponents = np.resize([-149, -140, -126, -100, -63, -40, 0, 40, 62, 63, 64, 100, 120, 125], 90)
    bank = np.ldexp(bank, exponents[:, None].astype(np.int32)).astype(np.float32)
    bank[7] = 0
    bank[7, 3] = np.float32(1e-45)  # a single denormal
    bank[8] = np.finfo(np.float32).max
    check(kernel, image, bank, 100.0, 90)
    check(kernel, np.ldexp(image, -130).astype(np.float32), bank, 100.0, 90)
    check(kernel, np.ldexp(image, 120).astype(np.float32), bank, 100.0, 90)
    half = np.resize(np.array([6e-8, 65504, 1e-5, -1], np.float16), (20, 50))
    half[3, 3], half[4, 4] = np.inf, np.nan
    check(kernel, image, half, 100.0, 20)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_scales_count_by_their_sign(kernel: Kernel, dtype: str) -> None:
    rng = np.random.default_rng(4)
    image, bank = embeddings(rng, 4, 40), embeddings(rng, 80, 40, dtype)
    scales = rng.uniform(1e-3, 1, 80).astype(np.float32)
    np.testing.assert_array_equal(kernel(image, bank, 9.0, 80, scales).index, kernel(image, bank, 9.0, 80).index)
    scales[:6] = 0, -1, np.nan, np.inf, 1e-45, -3e38
    for B in (1, 4):
        check(kernel, image[:B], bank, 100.0, 80, scales)


def test_scales_of_any_size(kernel: Kernel) -> None:
    rng = np.random.default_rng(5)
    for logit_scale in (1e-30, 1e-3, 1.0, 3e38, -3e38):
        check(kernel, embeddings(rng, 2, 9), embeddings(rng, 70, 9), logit_scale, 5)


def test_the_smallest_terms_of_the_sum_do_not_vanish(kernel: Kernel) -> None:
    bank = np.tile(np.array([[1.0, 0.0]], np.float32), (50000, 1))
    bank[77] = 0, 1  # best by 10, and the others weigh 50000 exp(-10) = 2.27
    got = check(kernel, np.array([[0, 1.0]], np.float32), bank, 10.0, 1)
    assert got.index.item() == 77 and got.log_sum_exp.item() == pytest.approx(10 + np.log(1 + 49999 * np.exp(-10)), abs=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_any_address_read_only_and_mapped(kernel: Kernel, dtype: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    image, bank = embeddings(rng, 3, 70), embeddings(rng, 101, 70, dtype)
    want = kernel(image, bank, 100.0, 4)

    def moved(array: Any) -> Any:
        return np.frombuffer(b"\1" + array.tobytes(), array.dtype, offset=1, count=array.size).reshape(array.shape)

    np.save(tmp_path / "bank.npy", bank)
    for b in (moved(bank), np.load(tmp_path / "bank.npy", mmap_mode="r")):
        got = kernel(moved(image), b, 100.0, 4, moved(np.ones(101, np.float32)))
        np.testing.assert_array_equal(got.index, want.index)
        np.testing.assert_array_equal(got.score, want.score)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_anything(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(sorted(TOLERANCE)))
    B, N, D, k = (data.draw(st.integers(0, n)) for n in (6, 120, 80, 130))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    image, bank = embeddings(rng, B, D), embeddings(rng, N, D, dtype)
    if dtype == "float32":
        bank = np.ldexp(bank, rng.integers(-140, 120, (N, 1)).astype(np.int32)).astype(np.float32)
    bank[rng.random(bank.shape) < data.draw(st.sampled_from([0, 0.02, 0.9]))] = data.draw(st.sampled_from([0, 1, -100]))
    logit_scale = data.draw(st.floats(-200, 200, width=32))
    for kernel in (numpy_path.contrastive_similarity, *([cpu.contrastive_similarity] if cpu.library else [])):
        check(kernel, image, bank, logit_scale, k, threads=data.draw(st.integers(0, 3)))


def test_callers_on_several_threads_do_not_disturb_each_other(kernel: Kernel) -> None:
    rng = np.random.default_rng(7)
    banks = [embeddings(rng, n, 96) for n in (500, 3000, 7000)]
    images = [embeddings(rng, b, 96) for b in (1, 3, 8)]
    jobs = [(i, b) for i in images for b in banks] * 4
    want = [kernel(i, b, 30.0, 5, threads=1).index for i, b in jobs]
    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(lambda job: kernel(*job, 30.0, 5).index, jobs))
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other)


THREADS = """
import os, threading, numpy as np
from pmclip_deploy.kernels import cpu
os.sched_setaffinity(0, map(int, input().split()))
bank, image, done, most = np.ones((60000, 512), np.float32), np.ones((64, 512), np.float32), threading.Event(), 0
before = len(os.listdir("/proc/self/task"))
call = threading.Thread(target=lambda: (cpu.contrastive_similarity(image, bank, 1.0, 1, None, 0), done.set()))
call.start()
while not done.is_set():
    most = max(most, len(os.listdir("/proc/self/task")))
print(most - before - 1)
"""


@pytest.mark.skipif(not cpu.library or not Path("/proc/self/task").exists(), reason="needs the compiled kernel and Linux's /proc")
@pytest.mark.parametrize("processors", range(1, 1 + min(4, len(ALLOWED))))
def test_no_more_threads_than_the_process_may_use(processors: int) -> None:
    cores = " ".join(map(str, ALLOWED[:processors]))
    done = subprocess.run([sys.executable, "-c", THREADS], input=cores, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == str(processors - 1), done.stderr  # beside the calling thread


@pytest.mark.skipif(not cpu.library, reason="needs the compiled kernel")
def test_other_python_threads_run_meanwhile() -> None:
    bank, image = np.ones((60000, 512), np.float32), np.ones((64, 512), np.float32)
    counts, done = [0], threading.Event()

    def count() -> None:
        while not done.is_set():
            counts[0] += 1

    thread = threading.Thread(target=count)
    thread.start()
    before = counts[0]
    cpu.contrastive_similarity(image, bank, 1.0, 1, None, 1)
    during = counts[0] - before
    done.set()
    thread.join()
    assert during > 1000  # with the lock held it is at most the few between two switches


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image": np.zeros((1, 8))}, "image: 2-dimensional float64"),
        ({"image": np.zeros(8, np.float32)}, "image: 1-dimensional"),
        ({"image": [[1.0]]}, "image: list"),
        ({"bank": np.zeros((5, 8), np.int16)}, "float32 or float16 or int8"),
        ({"bank": np.zeros((5, 8), ">f4")}, "bank"),
        ({"bank": np.zeros((5, 7), np.float32)}, "7 numbers a row and the images have 8"),
        ({"bank": np.zeros((8, 5), np.float32).T}, r"numpy\.ascontiguousarray\(bank\)"),
        ({"bank": np.zeros((5, 16), np.float32)[:, ::2]}, "bank"),
        ({"scales": np.zeros(4, np.float32)}, "4 of them for a bank of 5"),
        ({"scales": np.zeros(5)}, "scales"),
        ({"logit_scale": float("nan")}, "logit_scale"),
        ({"logit_scale": float("inf")}, "logit_scale"),
        ({"logit_scale": 1e39}, "logit_scale"),
        ({"k": -1}, "negative"),
        ({"threads": -1}, "negative"),
    ],
)
def test_wrong_arguments_are_named(kernel: Kernel, change: dict[str, Any], words: str) -> None:
    right: dict[str, Any] = {"image": np.ones((1, 8), np.float32), "bank": np.ones((5, 8), np.float32)}
    assert kernel(**right).score.shape == (1, 10)
    with pytest.raises(ValueError, match=words):
        kernel(**{**right, **change})


@pytest.mark.skipif(not cpu.library, reason="needs the compiled kernel")
def test_the_library_refuses_what_it_does_not_know() -> None:
    assert cpu.library
    a = np.ones((1, 8), np.float32).ctypes.data
    for dtype, B, logit_scale in ((3, 1, 1.0), (0, -1, 1.0), (0, 1, float("nan"))):
        assert cpu.library.pmclip_similarity(a, B, a, dtype, None, 1, 8, logit_scale, 1, 0, a, a, a) == 2
    assert not cpu.use("no such")


def test_int8_finds_the_best_ten_when_rescored() -> None:
    rng = np.random.default_rng(8)
    centres = rng.normal(size=(50, 256))
    bank = (centres[rng.integers(0, 50, 20000)] + 0.7 * rng.normal(size=(20000, 256))).astype(np.float32)
    image = (centres[rng.integers(0, 50, 20)] + 0.7 * rng.normal(size=(20, 256))).astype(np.float32)
    scales = np.abs(bank).max(1) / 127
    quantised = np.rint(bank / scales[:, None]).astype(np.int8)
    exact = kernels.contrastive_similarity(image, bank, 1.0, 10)
    found = kernels.contrastive_similarity(image, quantised, 1.0, 40, scales.astype(np.float32))
    for q in range(20):
        again = kernels.contrastive_similarity(image[q : q + 1], bank[found.index[q]], 1.0, 10)
        assert set(found.index[q][again.index[0]]) == set(exact.index[q])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("logit_scale", [100.0, -100.0, 1.0])
@pytest.mark.parametrize(("B", "N", "D"), [(4, 4000, 192), (17, 3001, 100), (6, 2999, 65)])
def test_rows_far_from_the_best_change_nothing(kernel: Kernel, B: int, N: int, D: int, logit_scale: float, threads: int) -> None:
    """Clustered int8 rows: most cannot be among the best nor change the sum, and equal rows come in pairs."""
    rng = np.random.default_rng(N)
    centres = rng.normal(size=(40, D))
    bank = np.clip(np.rint(20 * (centres[rng.integers(0, 40, N)] + 0.3 * rng.normal(size=(N, D)))), -128, 127).astype(np.int8)
    bank[N // 2 :] = bank[: N - N // 2]
    image = (centres[rng.integers(0, 40, B)] + 0.3 * rng.normal(size=(B, D))).astype(np.float32)
    image[1], image[-1] = image[0], 0
    got = check(kernel, image, bank, logit_scale, 12, threads=threads)
    np.testing.assert_array_equal(got.index[0], got.index[1])
    np.testing.assert_array_equal(got.index[0, ::2] + N // 2, got.index[0, 1::2])  # each best row, then its copy
