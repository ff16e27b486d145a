"""Each system under test as a worker: one process, a line of JSON each way on stdin and stdout. `harness.Worker` starts it."""

import json
import os
import sys
import time

import numpy as np


def null(opened):
    """Does nothing: what is measured of it is the harness's own."""
    return {"image": len, "text": len, "infer": len}, {}


def ours(opened):
    """A bundle in the runtime. Its part "infer" takes rows (path of a picture, question)."""
    import onnxruntime
    from pmclip_deploy.opening import load
    from pmclip_deploy.sessions import open_session  # noqa: F401
    import pmclip_deploy.sessions.onnxruntime as backend

    backend.cpu_threads = lambda: opened["threads"]
    predictor = load(opened["weights"], opened["device"])

    def image(rows):
        return predictor._sessions["image"].run({"pixels": rows})["embedding"]

    def text(rows):
        return predictor._sessions["text"].run({"tokens": rows})["embedding"]

    def infer(rows):
        for path, question in rows:
            predictor._text_embedding.cache_clear()
            predictor.ask(str(path), str(question))

    return {"image": image, "text": text, "infer": infer}, {"onnxruntime": onnxruntime.__version__}


SYSTEMS = {"null": null, "pmclip-deploy": ours}


def main():
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    parts, inputs = {}, {}
    for line in sys.stdin:
        try:
            (what, asked), = json.loads(line).items()
            if what == "open":
                start = time.perf_counter()
                parts, versions = SYSTEMS[asked["system"]](asked)
                answer = {"ready": {"versions": versions, "open_seconds": time.perf_counter() - start}}
            elif what == "embed":
                np.save(asked["output"], parts[asked["part"]](np.load(asked["input"])))
                answer = {"embed": {}}
            elif what == "run":
                if asked["input"] not in inputs:
                    inputs = {asked["input"]: np.load(asked["input"])}
                answer = {"times": run(parts[asked["part"]], inputs[asked["input"]], asked)}
            else:
                answer = {"memory": peak_mib()}
        except Exception as error:
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
        out.write(json.dumps(answer) + "\n")


def run(part, rows, asked):
    batch, starts, times = asked["batch"], asked["starts"], []
    rows = np.concatenate([rows] * -(-batch // len(rows))) if len(rows) < batch else rows
    batches = [rows[i : i + batch] for i in range(0, len(rows) - batch + 1, batch)]
    zero = time.perf_counter()
    for i in range(asked["count"]):
        if starts is not None:
            wait = zero + starts[i] - time.perf_counter()
            if wait > 0:
                time.sleep(wait)
        begin = time.perf_counter()
        part(batches[i % len(batches)])
        times.append((begin - zero, time.perf_counter() - zero))
    return times


def peak_mib():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
