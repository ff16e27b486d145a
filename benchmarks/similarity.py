"""How fast the similarity kernel runs beside what else people use, and beside this machine's memory, in one interleaved run.

    python -m pmclip_deploy.benchmarks.similarity [--rows 10,10000,1000000] [--repeats 7] [--warm] [--output FILE.csv]

Embeddings are random but clustered, 512 numbers each; all systems get 2 threads. "all" is the kernel's whole answer, "top-k"
and "product" are parts of it, which is all that some systems do; all but the kernel are spared normalising the bank. What a system answers
is compared with the double-precision reference before anything is timed; systems not installed are named and left out.
"""

import argparse
import csv
import ctypes
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

THREADS = 2
os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(THREADS)))

import numpy as np  # noqa: E402

from pmclip_deploy import kernels  # noqa: E402
from pmclip_deploy.kernels import reference  # noqa: E402

D, K, SCALE = 512, 10, 100.0
RECALL = {"float32": 0.99, "float16": 0.99, "int8": 0.9}  # of the best ten in the same bank; int8 systems round the image too
pool = ThreadPoolExecutor(THREADS)

Job = Callable[[], Any]  # returns the rows (B, K), or None where it gives none
READ = """
#include <cstdint>
extern "C" __attribute__((target_clones("avx2", "default"))) int64_t read(const int64_t *p, int64_t n) {
    int64_t s[16] = {};
    for (int64_t i = 0; i + 16 <= n; i += 16) for (int j = 0; j < 16; ++j) s[j] += p[i + j];
    for (int j = 1; j < 16; ++j) s[0] += s[j];
    return s[0];
}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="10,10000,1000000")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--warm", action="store_true", help="Call each system once, untimed, before it is timed: its bank is in cache.")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    print(f"kernel: {kernels.implementation()}")
    results: list[dict[str, Any]] = []
    for N in map(int, options.rows.split(",")):
        rng = np.random.default_rng(0)
        bank = clustered(rng, N)
        for dtype in RECALL:
            for B in (1, 16):
                image = bank[rng.integers(0, N, B)] + 0.02 * rng.standard_normal((B, D), np.float32)
                results += compare(image, bank, dtype, options.repeats, options.warm)
    if options.output:
        with options.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, results[0])
            writer.writeheader()
            writer.writerows(results)


def clustered(rng: np.random.Generator, N: int) -> Any:
    """(N, D) f32 of length 1, a thousand clusters"""
    centres = rng.standard_normal((1000, D), np.float32)
    bank = rng.standard_normal((N, D), np.float32)
    for start in range(0, N, 10000):  # in place: a million rows are 2 GB
        part = bank[start : start + 10000]
        part += 1.5 * centres[rng.integers(0, 1000, len(part))]
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return bank


def compare(image: Any, f32: Any, dtype: str, repeats: int, warm: bool) -> list[dict[str, Any]]:
    """Rows for one dtype of the bank: every system and step, interleaved."""
    scales = None
    if dtype == "int8":
        scales = np.abs(f32).max(1) / np.float32(127)
        bank = np.rint(f32 / scales[:, None]).astype(np.int8)
    else:
        bank = f32.astype(dtype, copy=False)
    jobs: dict[tuple[str, str], Job] = {
        ("kernel", "all"): lambda: kernels.contrastive_similarity(image, bank, SCALE, K, scales, THREADS).index
    }
    (B, _), N = image.shape, len(bank)
    for system in (read, numpy_f32, torch_f32, onnxruntime_f32, faiss, usearch, numkong):
        try:
            jobs |= dict(system(image, f32, bank))
        except ImportError as error:
            print(f"left out: {system.__name__} ({error})")
    if dtype == "int8":
        jobs["kernel, rescored", "top-k"] = lambda: rescored(
            image, f32, kernels.contrastive_similarity(image, bank, SCALE, 4 * K, scales).index
        )
    in_bank, in_f32 = exact(image, bank), exact(image, f32)
    recalls: dict[tuple[str, str], float | None] = {}
    for job, run in jobs.items():
        rows, best = run(), in_f32 if job[0].endswith(("f32", "rescored")) else in_bank
        found = None if rows is None else float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(rows, best, strict=True)]))
        assert found is None or found >= RECALL[dtype], (job, found)
        recalls[job] = found
    number = max(1, int(3e6 / (N * B * D)))  # calls that are timed as one, where one is too short
    times: dict[tuple[str, str], list[float]] = {job: [] for job in jobs}
    for _ in range(repeats):
        for job, run in jobs.items():
            time.sleep(0.05)  # until threads of the job before have stopped spinning
            if warm:
                run()
            start = time.perf_counter()
            for _ in range(number):
                run()
            times[job].append((time.perf_counter() - start) / number)
    kernel = np.array(times["kernel", "all"])
    print(f"\n{N:,} rows, {B} images, {dtype}")
    results = []
    for (name, gives), of in times.items():
        low, median, high = (float(np.percentile(of, p)) for p in (25, 50, 75))
        size = f32.nbytes if name == "read" or name.endswith("f32") else bank.nbytes
        share = size / f32.nbytes * float(np.median(np.array(times["read", "bank"]) / of)) if ("read", "bank") in times else None
        results.append({
            "rows": N, "images": B, "dtype": dtype, "system": name, "gives": gives,
            "median_ms": round(1e3 * median, 4), "p25_ms": round(1e3 * low, 4), "p75_ms": round(1e3 * high, 4),
            "times_kernel": round(float(np.median(np.array(of) / kernel)), 2),
            "gb_per_s": round(size / median / 1e9, 1), "share_of_read": "" if share is None else round(share, 2),
            "recall": "" if recalls[name, gives] is None else round(recalls[name, gives] or 0, 3), "repeats": repeats,
        })  # fmt: skip
        print("  {system:17} {gives:8} {median_ms:10.3f} ms ({p25_ms:.3f} to {p75_ms:.3f}), {times_kernel:6.2f} times the kernel's;"
              " {gb_per_s:5.1f} GB/s, of reading {share_of_read:4}; recall {recall}".format(**results[-1]))  # fmt: skip
    return results


def exact(image: Any, bank: Any) -> Any:
    """(B, K) in double precision, block by block"""
    best, index = np.full((len(image), K), -np.inf), np.full((len(image), K), -1)
    for start in range(0, len(bank), 20000):
        found = reference.contrastive_similarity(image, bank[start : start + 20000], 1.0, K)
        best, index = np.hstack([best, found.score]), np.hstack([index, np.where(found.index < 0, -1, start + found.index)])
        order = np.argsort(-best, 1, kind="stable")[:, :K]
        best, index = np.take_along_axis(best, order, 1), np.take_along_axis(index, order, 1)
    return index[:, : min(K, len(bank))]


def rescored(image: Any, f32: Any, candidates: Any) -> Any:
    """(B, K) of the candidates (B, more), by their f32 rows"""
    found = [kernels.contrastive_similarity(image[q : q + 1], f32[rows[rows >= 0]], SCALE, K).index[0] for q, rows in enumerate(candidates)]
    return [rows[best[best >= 0]] for rows, best in zip(candidates, found, strict=True)]


# Each system gets image (B, D) f32, the bank in f32 and in the dtype asked for, and yields ((its name, what it gives), job).


def read(image: Any, f32: Any, bank: Any) -> Iterator[tuple[tuple[str, str], Job]]:
    """The f32 bank summed as integers: what two threads can get from memory. Of a bank that the cache holds it would tell nothing."""
    if f32.nbytes < 1e9:
        return
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "read.cpp", Path(folder) / "read.so"
        source.write_text(READ)
        subprocess.run([os.environ.get("CXX", "c++"), "-O3", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
        function = ctypes.CDLL(str(library)).read
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_int64], ctypes.c_int64
    half = f32.nbytes // 8 // THREADS
    calls = [(f32.ctypes.data + 8 * half * i, half) for i in range(THREADS)]
    yield ("read", "bank"), lambda: [*pool.map(lambda call: function(*call), calls)] and None


def best_of(scores: Any) -> Any:
    """(B, K) rows by argpartition, and the log-sum-exp beside them"""
    k = min(K, scores.shape[1])
    index = np.argpartition(scores, -k, 1)[:, -k:]
    order = np.argsort(-np.take_along_axis(scores, index, 1), 1)
    largest = scores.max(1, keepdims=True)
    np.log(np.exp(scores - largest).sum(1)) + largest[:, 0]
    return np.take_along_axis(index, order, 1)


def unit(image: Any) -> Any:
    """(B, D) f32 of length 1."""
    return image / np.linalg.norm(image, axis=1, keepdims=True)


def numpy_f32(image: Any, f32: Any, bank: Any) -> Iterator[tuple[tuple[str, str], Job]]:
    """(system, what it gives) and its job; image (B, D) f32, f32 (N, D), and bank: the same rows in the dtype that is compared."""

    def product() -> None:
        unit(image) @ f32.T

    yield ("NumPy f32", "product"), product
    yield ("NumPy f32", "all"), lambda: best_of(np.float32(SCALE) * (unit(image) @ f32.T))


def torch_f32(image: Any, f32: Any, bank: Any) -> Iterator[tuple[tuple[str, str], Job]]:
    """As `numpy_f32`."""
    import torch

    torch.set_num_threads(THREADS)
    rows = torch.from_numpy(f32)

    @torch.inference_mode()
    def everything() -> Any:
        scores = SCALE * (torch.nn.functional.normalize(torch.from_numpy(image)) @ rows.T)
        scores.logsumexp(1)
        return scores.topk(min(K, len(rows))).indices.numpy()

    yield ("torch f32", "all"), everything


def onnxruntime_f32(image: Any, f32: Any, bank: Any) -> Iterator[tuple[tuple[str, str], Job]]:
    """As `numpy_f32`: one graph from the image to the best."""
    from onnx import TensorProto, helper

    from pmclip_deploy.sessions.onnxruntime import import_onnxruntime

    nodes = [
        helper.make_node("LpNormalization", ["image"], ["unit"], axis=1, p=2),
        helper.make_node("Gemm", ["unit", "bank"], ["scores"], transB=1, alpha=SCALE),
        helper.make_node("TopK", ["scores", "k"], ["score", "index"]),
        helper.make_node("ReduceLogSumExp", ["scores", "axes"], ["log_sum_exp"], keepdims=0),
    ]
    f, i64 = TensorProto.FLOAT, TensorProto.INT64
    graph = helper.make_graph(
        nodes, "similarity",
        [helper.make_tensor_value_info("image", f, ["B", D]), helper.make_tensor_value_info("bank", f, ["N", D])],
        [helper.make_tensor_value_info("index", i64, ["B", "k"]), helper.make_tensor_value_info("log_sum_exp", f, ["B"])],
        [helper.make_tensor("k", i64, [1], [min(K, len(f32))]), helper.make_tensor("axes", i64, [1], [1])],
    )  # fmt: skip
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = THREADS
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input("image", image)  # not copied
    binding.bind_cpu_input("bank", f32)
    binding.bind_output("index")
    binding.bind_output("log_sum_exp")

    def everything() -> Any:
        session.run_with_iobinding(binding)
        return binding.get_outputs()[0].numpy()

    yield ("onnxruntime f32", "all"), everything


def faiss(image: Any, f32: Any, bank: Any) -> Iterator[tuple[tuple[str, str], Job]]:
    """As `numpy_f32`: inner products of the bank in its dtype."""
    import faiss

    faiss.omp_set_num_threads(THREADS)
    quantizer = faiss.ScalarQuantizer
    kinds = {"float16": quantizer.QT_fp16, "int8": quantizer.QT_8bit_direct_signed}
    kind = kinds.get(str(bank.dtype))
    index = faiss.IndexFlatIP(D) if kind is None else faiss.IndexScalarQuantizer(D, kind, faiss.METRIC_INNER_PRODUCT)
    for start in range(0, len(bank), 100000):
        index.add(bank[start : start + 100000].astype(np.float32))
    # int8 rows differ in length, so that by their inner products others may be the best: timed, not compared
    yield ("faiss", "top-k"), lambda: _only(str(bank.dtype) != "int8", index.search(image, min(K, len(bank)))[1])


def usearch(image: Any, f32: Any, bank: Any) -> Iterator[tuple[tuple[str, str], Job]]:
    """As `numpy_f32`: exact search of the bank in its dtype."""
    from usearch.index import MetricKind, search

    def run() -> Any:
        query = unit(image)
        query = np.rint(query * (127 / np.abs(query).max())).astype(np.int8) if bank.dtype == np.int8 else query.astype(bank.dtype)
        return np.atleast_2d(search(bank, query, min(K, len(bank)), MetricKind.Cos, exact=True, threads=THREADS).keys).reshape(
            len(image), -1
        )

    yield ("usearch", "top-k"), run


def numkong(image: Any, f32: Any, bank: Any) -> Iterator[tuple[tuple[str, str], Job]]:
    """Its packed GEMM, the bank or the images packed: whichever is quicker here."""
    import numkong as nk

    query = unit(image)
    query = np.rint(query * (127 / np.abs(query).max())).astype(np.int8) if bank.dtype == np.int8 else query.astype(bank.dtype)
    halves = [bank[: len(bank) // 2], bank[len(bank) // 2 :]]
    out = {"float32": "float64", "float16": "float32", "int8": "int32"}[str(bank.dtype)]

    def one(job: tuple[Any, Any, Any]) -> None:
        nk.dots_packed(job[0], job[1], out=job[2])

    images = nk.dots_pack(query)
    first = [(half, images, nk.empty((len(half), len(query)), dtype=out)) for half in halves]
    yield ("NumKong, images", "product"), lambda: [*pool.map(one, first)] and None
    second = [(query, nk.dots_pack(half), nk.empty((len(query), len(half)), dtype=out)) for half in halves]
    yield ("NumKong, bank", "product"), lambda: [*pool.map(one, second)] and None


def _only(comparable: bool, rows: Any) -> Any:
    return rows if comparable else None


if __name__ == "__main__":
    main()
