"""The similarity kernel against what else people search embeddings with, and against the machine's memory bandwidth.

    python -m pmclip_deploy.benchmarks.similarity [--rows 10 10000 1000000] [--repeats 7] [--output FILE.csv] [--data vqa-med-2019]

512 dimensions, the 10 best of rows of unit length, two threads, one query or 16. Every system finds the same rows before it is timed; runs
are interleaved, and medians are printed. Peers that are not installed (`pip install faiss-cpu usearch`) are left out, and said so.
With --data, also: how many of the 10 nearest pictures, by pmclip-lite, int8 finds with and without exact rescoring.
"""

import argparse
import csv
import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pmclip_deploy.kernels import contrastive_similarity, implementation

DIM, K, THREADS = 512, 10, 2
DTYPES = {"f32": np.float32, "f16": np.float16, "int8": np.int8}
Search = Callable[[], Any]  # -> (B, K) indices


def bank_of(rows: int, dtype: str) -> tuple[np.ndarray, np.ndarray | None]:
    """(bank, scales): directions around a thousand centres, as real embeddings cluster; int8 with a scale a row."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((1000, DIM), np.float32)
    bank = np.empty((rows, DIM), DTYPES[dtype])
    scales = np.empty(rows, np.float32)
    for start in range(0, rows, 1 << 16):
        part = centres[random.integers(0, 1000, min(1 << 16, rows - start))] + random.standard_normal(
            (min(1 << 16, rows - start), DIM), np.float32
        )
        part /= np.linalg.norm(part, axis=1, keepdims=True)
        bank[start : start + len(part)], scales[start : start + len(part)] = quantised(part) if dtype == "int8" else (part, 1)
    return bank, scales if dtype == "int8" else None


def quantised(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale = np.abs(x).max(1) / 127
    return np.round(x / scale[:, None]).astype(np.int8), scale.astype(np.float32)


def peers(bank: np.ndarray, query: np.ndarray, dtype: str) -> Iterator[tuple[str, Search]]:
    """What takes this dtype without widening all of it first."""
    if dtype == "f32":

        def with_numpy() -> Any:
            score = query @ bank.T
            best = np.argpartition(-score, K - 1, 1)[:, :K]
            return np.take_along_axis(best, np.argsort(-np.take_along_axis(score, best, 1), 1, kind="stable"), 1)

        yield "NumPy", with_numpy
        yield "onnxruntime", _onnxruntime(bank, query)
    if dtype != "int8":
        import torch

        torch.set_num_threads(THREADS)
        b, q = torch.from_numpy(bank), torch.from_numpy(query.astype(bank.dtype))
        yield "torch", lambda: (q @ b.T).topk(K, 1).indices.numpy()
    if faiss := _installed("faiss"):
        faiss.omp_set_num_threads(THREADS)
        kind = {"f16": faiss.ScalarQuantizer.QT_fp16, "int8": faiss.ScalarQuantizer.QT_8bit_direct_signed}.get(dtype)
        index = faiss.IndexFlatIP(DIM) if kind is None else faiss.IndexScalarQuantizer(DIM, kind, faiss.METRIC_INNER_PRODUCT)
        for start in range(0, len(bank), 1 << 16):
            index.add(bank[start : start + (1 << 16)].astype(np.float32))
        faiss_query = query if dtype != "int8" else np.round(query * (127 / np.abs(query).max(1, keepdims=True)))
        yield "faiss", lambda: index.search(faiss_query.astype(np.float32), K)[1]
    if usearch := _installed("usearch.index"):
        of = quantised(query)[0] if dtype == "int8" else query.astype(bank.dtype)
        metric = usearch.MetricKind.Cos
        yield "usearch", lambda: usearch.search(bank, of, K, metric, exact=True, threads=THREADS).keys.reshape(len(query), K)


def _onnxruntime(bank: np.ndarray, query: np.ndarray) -> Search:
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper

    f32, i64 = TensorProto.FLOAT, TensorProto.INT64
    nodes = [helper.make_node("MatMul", ["q", "b"], ["s"]), helper.make_node("TopK", ["s", "k"], ["v", "i"])]
    nodes.append(helper.make_node("ReduceLogSumExp", ["s", "axes"], ["l"], keepdims=0))
    constants = [helper.make_tensor("k", i64, [1], [K]), helper.make_tensor("axes", i64, [1], [1])]
    inputs = [helper.make_tensor_value_info("q", f32, ["B", DIM]), helper.make_tensor_value_info("b", f32, [DIM, len(bank)])]
    outputs = [helper.make_tensor_value_info("i", i64, ["B", K]), helper.make_tensor_value_info("l", f32, ["B"])]
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs, constants), opset_imports=[helper.make_opsetid("", 20)], ir_version=9
    )
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = THREADS, 1, 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    columns = np.ascontiguousarray(bank.T)
    return lambda: session.run(["i", "l"], {"q": query, "b": columns})[0]


def _installed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def bandwidth(gigabytes: int = 2) -> float:
    """GB/s at which two threads read what no cache holds: the best of ten."""
    x = np.ones(gigabytes << 27, np.int64)
    halves, best = np.split(x, THREADS), 0.0
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in range(10):
            start = time.perf_counter()
            list(pool.map(np.add.reduce, halves))
            best = max(best, x.nbytes / (time.perf_counter() - start) / 1e9)
    return best


def cosines(bank: np.ndarray, query: np.ndarray, found: np.ndarray) -> float:
    """Mean cosine of the queries with the rows they found."""
    rows = bank[np.maximum(found, 0).astype(np.int64)[:, : len(bank)]].astype(np.float32)  # (B, K, D)
    return float(np.mean(np.einsum("bkd,bd->bk", rows, query) / np.linalg.norm(rows, axis=2)))


def interleaved(systems: dict[str, Search], repeats: int) -> dict[str, float]:
    """Median seconds of a call; short calls are timed many at a time."""
    counts = {}
    for name, search in systems.items():
        search()
        start = time.perf_counter()
        search()
        counts[name] = max(1, int(0.02 / max(time.perf_counter() - start, 1e-9)))
    times: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(repeats):
        for name, search in systems.items():
            start = time.perf_counter()
            for _ in range(counts[name]):
                search()
            times[name].append((time.perf_counter() - start) / counts[name])
    return {name: statistics.median(of) for name, of in times.items()}


def recall_of_int8(data: Path) -> None:
    from pmclip_deploy.opening import load

    predictor, files = load(), sorted((data / "images").glob("*.jpg"))
    x = np.stack([predictor.embed_image(file) for file in files])
    small, scales = quantised(x / np.linalg.norm(x, axis=1, keepdims=True))
    exact = contrastive_similarity(x, x, k=K).index
    plain = contrastive_similarity(x, small, k=4 * K, scales=scales).index  # four times as many, scored again
    again = [near[contrastive_similarity(q[None], x[near], k=K).index[0]] for q, near in zip(x, plain, strict=True)]
    for name, found in (("int8 alone", plain[:, :K]), (f"int8, the best {4 * K} scored again in f32", again)):
        recall = np.mean([len(set(a) & set(b)) / K for a, b in zip(exact, found, strict=True)])
        print(f"recall@{K} among {len(x)} real embeddings, {name}: {recall:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10, 10_000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    print(f"kernel: {implementation()}; not installed: {', '.join(n for n in ('faiss', 'usearch') if not _installed(n)) or 'none'}")
    most = bandwidth()
    print(f"memory, read by two threads: {most:.1f} GB/s")
    table: list[dict[str, Any]] = []
    for rows in options.rows:
        reference: dict[int, float] = {}
        for dtype in DTYPES:
            bank, scales = bank_of(rows, dtype)
            for batch in (1, 16):
                query = np.random.default_rng(1).standard_normal((batch, DIM), np.float32) * 0.3
                query += bank[np.arange(batch) * (rows // batch or 1) % rows].astype(np.float32) * (1 if scales is None else 127)
                query /= np.linalg.norm(query, axis=1, keepdims=True)
                ours = lambda b=bank, q=query, s=scales: contrastive_similarity(q, b, 100.0, K, s, THREADS).index  # noqa: E731
                systems = {"kernel": ours, **dict(peers(bank, query, dtype))}
                expected = ours()
                for name, search in systems.items():
                    lost = cosines(bank, query, expected) - cosines(bank, query, search())
                    if not abs(lost) < (
                        0.02 if dtype == "int8" else 0.002
                    ):  # fp16 scores tie, and peers round the query of an int8 bank too
                        raise SystemExit(f"error: {name} finds rows whose cosine is {lost:.4f} less: {dtype}, {rows} rows, batch {batch}")
                medians = interleaved(systems, options.repeats)
                reference.setdefault(batch, medians.get("NumPy", medians["kernel"]))
                for name, seconds in medians.items():
                    share = bank.nbytes / seconds / 1e9 / most
                    line = {
                        "rows": rows, "dtype": dtype, "batch": batch, "system": name, "milliseconds": f"{1e3 * seconds:.4f}",
                        "NumPy f32 / it": f"{reference[batch] / seconds:.2f}", "it / kernel": f"{seconds / medians['kernel']:.2f}",
                        "of bandwidth": f"{share:.2f}",
                    }  # fmt: skip
                    if not table:
                        print("  ".join(key.rjust(14) for key in line))
                    table.append(line)
                    print("  ".join(str(value).rjust(14) for value in line.values()), flush=True)
    if options.output:
        with options.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, table[0])
            writer.writeheader()
            writer.writerows(table)
    if options.data:
        recall_of_int8(options.data)


if __name__ == "__main__":
    main()
