"""What one bundle does on this machine: cold start, the scenarios, every stage from file to answer, memory, size, energy, and whether it
still says what it should. Each function yields rows of results.py, or (part, scenario, figures, samples, why not) for one.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.benchmarks import harness
from pmclip_deploy.benchmarks.energy import Rapl, Sampled
from pmclip_deploy.benchmarks.harness import Measurement, Worker
from pmclip_deploy.bundle.manifest import Manifest
from pmclip_deploy.bundle.names import MANIFEST
from pmclip_deploy.spec import ACCURACY_LOSS

QUESTION = "is there a fracture?"
SHARES = {"single-stream": 1.0, "multi-stream": 1.0, "offline": 0.5, "server": 3.0}  # of the time, which both parts get equally
STAGES = 0.15  # the stages' share of the time; the scenarios get what cold start and checks leave
OURS = "pmclip-deploy"  # in systems.py
BATCH = 32  # of offline
COLD = 5  # new processes
NEW = 2000  # questions
ENERGY = 3.0  # seconds of work
CT = "CT_small.dcm"  # in pydicom's wheel, as are these: one of each transfer syntax, the largest there
PICTURES = {
    "Explicit VR Little Endian": CT,
    "Deflated Explicit VR Little Endian": "image_dfl.dcm",
    "RLE Lossless": "MR_small_RLE.dcm",
    "JPEG Baseline": "examples_ybr_color.dcm",
    "JPEG Extended, 12 bits": "JPGExtended.dcm",
    "JPEG Lossless": "SC_rgb_jpeg_gdcm.dcm",
    "JPEG-LS Lossless": "MR_small_jpeg_ls_lossless.dcm",
    "JPEG 2000 Lossless": "examples_jpeg2k.dcm",
    "JPEG 2000": "693_J2KI.dcm",
}
EMBED = """
import sys
import pmclip_deploy as pm
predictor = pm.load(sys.argv[1], sys.argv[4], single_use=True)
predictor.embed_image(sys.argv[2]), predictor.embed_text(sys.argv[3])
"""


@dataclass(frozen=True)
class Found:
    """One row, before it knows whose run it is."""

    part: str
    scenario: str
    figures: Mapping[str, Any]
    samples: int = 0
    not_measured: str | None = None
    system: str | None = None  # None: the bundle


def found(part: str, measured: Measurement, **figures: Any) -> Found:
    """The row of a measurement."""
    return Found(part, measured.scenario, {"batch": measured.batch, **measured.figures, **figures}, measured.samples, measured.not_measured)


# --- processes of their own ---------------------------------------------------------------------------------------------------


def cold_start(bundle: Path, manifest: Manifest, device: str, repeats: int = COLD) -> Iterator[Found]:
    """A new process from nothing to its first answer, the file cache warm. Raises the process's own error, exit code and all."""
    command = first_answer(bundle, manifest, device)
    runs = [harness.process(command) for _ in range(1 + repeats)][1:]
    seconds = [took for took, _, _ in runs]
    low, median, high = np.percentile(seconds, (25, 50, 75))
    memory = [peak for _, peak, _ in runs if peak is not None]
    yield Found("infer", "cold", {"p50_ms": 1e3 * median, "p25_ms": 1e3 * low, "p75_ms": 1e3 * high,
                                  "peak_mib": statistics.median(memory) if memory else None}, len(runs))  # fmt: skip


def first_answer(bundle: Path, manifest: Manifest, device: str) -> list[str]:
    """The command that answers once, or embeds a picture and a text where the bundle has no head."""
    picture = str(picture_file(CT))
    if manifest.head is None:
        return [sys.executable, "-c", EMBED, str(bundle), picture, QUESTION, device]
    return [*harness.CLI, "infer", picture, QUESTION, "--bundle", str(bundle), "--device", device, "--json"]


def scenarios(
    bundle: Path, manifest: Manifest, device: str, chosen: Sequence[str], seconds: float, bound: float, threads: int
) -> Iterator[Found]:
    """MLPerf Inference's, for the image tower and for whole answers, with the harness's own overhead, the memory and the energy."""
    share = seconds / (2 * sum(SHARES[name] for name in chosen))
    with tempfile.TemporaryDirectory() as scratch:
        size, rng = manifest.preprocess.size, np.random.default_rng(0)
        inputs = {"infer": Path(scratch) / "infer.npy", "image": Path(scratch) / "image.npy"}
        np.save(inputs["image"], rng.normal(size=(BATCH, 3, size, size)).astype(np.float32))
        asked = range(NEW)  # each question is new to the predictor, which remembers the last 1,024
        np.save(inputs["infer"], np.array([[str(picture_file(CT)), f"is there a fracture in picture {i}?"] for i in asked]))
        with Worker("null") as null:
            null.open(manifest.backbone, "", threads)
            yield found_of(null, "image", harness.single_stream(null, "image", inputs["image"], 0.2))
        for part, rows in inputs.items():
            if part == "infer" and manifest.head is None:
                yield from (Found(part, name, {}, 0, "the bundle has no head") for name in chosen)
                continue
            with Worker(OURS) as worker:
                worker.open(manifest.backbone, bundle, threads, device)
                alone = harness.single_stream(worker, part, rows, SHARES["single-stream"] * share)
                if "single-stream" in chosen:
                    yield found(part, alone)
                yield Found(part, "memory", {"peak_mib": worker.memory(), "open_ms": 1e3 * worker.open_seconds}, 1)
                count = max(1, int(ENERGY / float(np.median(alone.latencies))))
                yield energy(part, count, partial(worker.run, part, rows, 1, count))
                if "multi-stream" in chosen:
                    yield found(part, harness.multi_stream(worker, part, rows, SHARES["multi-stream"] * share))
                if "offline" in chosen:
                    yield found(part, harness.offline(worker, part, rows, SHARES["offline"] * share, batch=BATCH))
                if "server" in chosen:
                    yield found(part, harness.server(worker, part, rows, alone.latencies, bound, SHARES["server"] * share))


def found_of(worker: Worker, part: str, measured: Measurement) -> Found:
    """As `found`, of the worker's own system."""
    made = found(part, measured)
    return Found(made.part, made.scenario, made.figures, made.samples, made.not_measured, worker.system)


# --- stages, in this process --------------------------------------------------------------------------------------------------


def stages(predictor: Any, seconds: float) -> Iterator[Found]:
    """From file to answer, each stage alone and warm, and then all of them."""
    from pmclip_deploy.imaging.preprocess import tensor_from_pixels
    from pmclip_deploy.imaging.read import picture_from_path

    jobs: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {}
    stack, manifest, path = ExitStack(), predictor.manifest, picture_file(CT)
    with stack:
        for syntax, name in PICTURES.items():
            jobs[f"read {syntax}"] = reading(picture_file(name))
            jobs[f"decode {syntax}"] = decoding(picture_file(name), stack)
        picture = picture_from_path(path)
        tensor = tensor_from_pixels(picture.pixels, manifest.preprocess)
        radiograph = dataset_from_stored(radiograph_from_ct())
        jobs["window and preprocess, CT"] = rendering(path, manifest.preprocess)
        jobs["window and preprocess, radiograph"] = rendering(radiograph, manifest.preprocess)
        jobs["image tower"] = (lambda: predictor.embedding_from_tensor(tensor), {})
        jobs["text tower"] = (lambda: predictor.towers.of_text(QUESTION), {"tokens": predictor.tokens([QUESTION])[0].shape[1]})
        if manifest.head is not None:
            seen, asked = predictor.image_features(picture), predictor.question_features([QUESTION])
            jobs["head"] = (lambda: predictor.head_logits(seen[None], asked), {})

            def infer() -> None:
                predictor.towers.forget_texts()  # a question that was not asked before
                predictor.ask(path, QUESTION)

            jobs["infer"] = (infer, {})
        for part, (job, about) in jobs.items():
            yield timed(part, job, seconds / len(jobs), about)
    if manifest.head is None:
        yield from (Found(part, "stage", {}, 0, "the bundle has no head") for part in ("head", "infer"))


def timed(part: str, job: Callable[[], Any], seconds: float, about: Mapping[str, Any] | None = None) -> Found:
    """After one call that nobody counts, one after the other for ``seconds``, three at least."""
    job()
    taken: list[float] = []
    while len(taken) < 3 or (sum(taken) < seconds and len(taken) < harness.least_queries(0.99)):
        start = time.perf_counter()
        job()
        taken.append(time.perf_counter() - start)
    return found(part, harness.measurement("stage", 1, np.array(taken), sum(taken)), **(about or {}))


def reading(path: Path) -> tuple[Callable[[], Any], dict[str, Any]]:
    """The file to a dataset without pixels: inflated, where it is deflated."""
    from pmclip_deploy.imaging.dicom_file import image_from_file, reading

    def job() -> None:
        with reading(str(path)) as stack:
            image_from_file(str(path), stack)

    return job, {}


def decoding(path: Path, stack: ExitStack) -> tuple[Callable[[], Any], dict[str, Any]]:
    """One frame's stored values from an open file."""
    from pmclip_deploy.imaging.dicom_file import image_from_file
    from pmclip_deploy.imaging.elements import whole_number
    from pmclip_deploy.imaging.quiet import quiet
    from pmclip_deploy.imaging.stored import layout_from_dataset, stored_values

    stack.enter_context(quiet())
    image = image_from_file(str(path), stack)
    assert image.file
    start, layout = image.file.tell(), layout_from_dataset(image.dataset)
    frames = max(whole_number(image.dataset, "NumberOfFrames", 1), 1)

    def job() -> NDArray[Any]:
        assert image.file
        image.file.seek(start)
        return stored_values(image, layout, frames // 2, frames, [])[0]

    return job, {"pixels": layout.pixels}


def rendering(source: Any, preprocess: Any) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Stored values to the image tower's input: modality, window, polarity, resize, normalise."""
    from pmclip_deploy.imaging.dicom_file import image_from_dataset, image_from_file
    from pmclip_deploy.imaging.grayscale import gray_from_stored
    from pmclip_deploy.imaging.preprocess import tensor_from_pixels
    from pmclip_deploy.imaging.stored import layout_from_dataset, stored_values

    with ExitStack() as stack:
        image = image_from_file(str(source), stack) if isinstance(source, Path) else image_from_dataset(source)
        layout = layout_from_dataset(image.dataset)
        stored = np.array(stored_values(image, layout, 0, 1, [])[0])

    def job() -> NDArray[np.float32]:
        return tensor_from_pixels(gray_from_stored(image, layout, stored, 0, None, [])[0], preprocess)

    return job, {"pixels": layout.pixels}


def radiograph_from_ct(rows: int = 2500, columns: int = 2048) -> NDArray[np.uint16]:
    """A synthetic radiograph of 12 stored bits: the CT in pydicom's wheel, scaled up, with the noise of a detector."""
    from PIL import Image

    from pmclip_deploy.imaging.read import picture_from_path

    smooth = Image.fromarray(picture_from_path(picture_file(CT)).pixels).convert("F").resize((columns, rows), Image.Resampling.BICUBIC)
    noise = np.random.default_rng(0).normal(scale=8, size=(rows, columns))
    return np.clip(np.asarray(smooth) * 14 + 200 + noise, 0, 4095).astype(np.uint16)


def dataset_from_stored(stored: NDArray[np.uint16], bits: int = 12) -> Any:
    """A computed radiograph's dataset, native, with a window such as its modality writes."""
    from pydicom import Dataset
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.Modality, dataset.PhotometricInterpretation, dataset.SamplesPerPixel = "CR", "MONOCHROME2", 1
    dataset.Rows, dataset.Columns = stored.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, bits, bits - 1, 0
    dataset.WindowCenter, dataset.WindowWidth = 2 ** (bits - 1), 0.75 * 2**bits
    dataset.PixelData = stored.tobytes()
    dataset["PixelData"].VR = "OW"
    return dataset


# --- size and energy ----------------------------------------------------------------------------------------------------------


def size_on_disk(bundle: Path, manifest: Manifest) -> Found:
    """Bytes of all files that the manifest lists, and of the manifest."""
    size = sum(file.bytes for file in manifest.files.values()) + (bundle / MANIFEST).stat().st_size
    return Found("infer", "size", {"bundle_bytes": size}, len(manifest.files) + 1)


def energy(part: str, count: int, work: Callable[[], Any]) -> Found:
    """What counters here say of so many queries one after the other, the idle machine's share included."""
    counters: list[Rapl | Sampled] = [Rapl(), Sampled.nvidia_smi(), Sampled.tegrastats()]
    with ExitStack() as stack:
        running = [counter for counter in counters if stack.enter_context(counter)]
        start = time.perf_counter()
        if running:
            work()
        seconds = time.perf_counter() - start
    used = {name: joules / count for counter in running for name, joules in counter.joules(seconds).items()}
    why = None if used else "no counter can be read here: RAPL (/sys/class/powercap), nvidia-smi and tegrastats were looked for"
    return Found(part, "energy", {f"{name}_joules_per_query": joules for name, joules in used.items()}, count if used else 0, why)


def picture_file(name: str) -> Path:
    """A file of pydicom's wheel."""
    import pydicom

    return Path(pydicom.__file__).parent / "data" / "test_files" / name


# --- whether it is still right --------------------------------------------------------------------------------------------------


def agreement(predictor: Any) -> tuple[Found, list[str]]:
    """Against the fp32 reference on fixed pictures. -> the row, and what missed"""
    from pmclip_deploy.benchmarks import reference

    figures, why = reference.agreement(predictor) if predictor.manifest.head is not None else (None, "the bundle has no head")
    if figures is None:
        return Found("infer", "parity", {}, 0, why), []
    return Found("infer", "parity", figures, figures["best_answers"]), reference.misses(predictor.manifest.precision, figures)


def accuracy(predictor: Any, data: Path, images: Path) -> tuple[Found, list[str]]:
    """On questions with answers, by type or category; where the export measured the same rows, against what fp32 PyTorch got there."""
    from pmclip_deploy.evaluation.evaluate import evaluation
    from pmclip_deploy.evaluation.rows import rows_from_jsonl, sha256_of_rows

    rows, beside = rows_from_jsonl(data, images), data.with_name("train.jsonl")
    train = rows_from_jsonl(beside) if beside.is_file() and not beside.samefile(data) else None
    document = evaluation(predictor, rows, images, train)
    low, high = document["ci95"]
    figures = {"accuracy": document["accuracy"], "ci95_low": low, "ci95_high": high, "coverage": document["coverage"],
               "selective_accuracy": document["selective_accuracy"], "ece": document["ece"]}  # fmt: skip
    figures |= {f"accuracy_of_{name}": of["accuracy"] for name, of in (document["by"]["type"] or document["by"]["category"]).items()}
    figures |= {f"baseline_{name}": None if of is None else of["accuracy"] for name, of in document["baselines"].items()}
    known = predictor.manifest.parity.get("answers") or {}
    if known.get("data_sha256") != sha256_of_rows(rows):
        return Found("infer", "parity", figures, len(rows)), []
    figures |= {name: known.get(name) for name in ("accuracy_fp32", "agreement", "candidate_agreement")}
    figures |= dict(zip(("difference_ci95_low", "difference_ci95_high"), known.get("difference_ci95") or (), strict=False))
    lost = known["accuracy_fp32"] - document["accuracy"]
    missed = [f"accuracy {document['accuracy']:.4f}, {100 * lost:.2f} points below fp32's (limit {100 * ACCURACY_LOSS:g})"]
    return Found("infer", "parity", figures, len(rows)), missed if lost > ACCURACY_LOSS else []
