"""An image and a question in, a calibrated answer or an abstention out: the flow itself, top-down."""

import hashlib
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.answer import Answer, Candidate, ModelInfo
from pmclip_deploy.bundle import MANIFEST, TOKENIZER, Manifest, verify_bundle
from pmclip_deploy.errors import BundleError, UsageError
from pmclip_deploy.models import DEFAULT_BUNDLE
from pmclip_deploy.sessions import Session, open_session
from pmclip_deploy.tokens import tokenizer_from_file, tokens_from_text

if TYPE_CHECKING:
    from pydicom import Dataset
    from tokenizers import Tokenizer

    from pmclip_deploy.pixels import Picture

Floats: TypeAlias = NDArray[np.float32]
Image: TypeAlias = Union[str, "os.PathLike[str]", "Dataset", NDArray[Any], "Picture"]

TOP = 5  # candidates an answer carries
CONTRACT = {  # inputs and outputs of each graph
    "image": (("pixels",), ("embedding",)),
    "text": (("tokens",), ("embedding",)),
    "head": (("image", "text"), ("answer", "kind", "radiograph")),
}
UNTRAINED = "the question is outside what this model was trained on"
NEVER_SURE = "too few answers to this kind of question were right on validation images"
NO_RADIOGRAPH = "the picture does not look like a radiology image"


def load(bundle: "str | os.PathLike[str] | None" = None, device: str = "auto") -> "Predictor":
    """Verifies a bundle and opens its graphs. ``device`` is "auto", "cpu" or "cuda"; "auto" keeps a CPU bundle on the CPU."""
    path = DEFAULT_BUNDLE if bundle is None else Path(bundle)
    manifest = verify_bundle(path)  # before anything of it is parsed; 14 ms for 25 MB
    if device == "auto" and manifest.target == "cpu":
        device = "cpu"
    with ThreadPoolExecutor(len(CONTRACT)) as pool:  # graphs are built outside the interpreter's lock
        sessions = {name: pool.submit(_session, path / graph.file, name, device) for name, graph in manifest.graphs.items()}
        tokenizer = tokenizer_from_file(path / TOKENIZER)
        return Predictor(path, manifest, {name: session.result() for name, session in sessions.items()}, tokenizer)


@dataclass(frozen=True)
class Heads:
    """What the head says about N pairs of an image and a question."""

    answer: Floats  # (N, A) logits
    kind: Floats  # (N, K) logits
    radiograph: Floats  # (N,) logits

    def __len__(self) -> int:
        return len(self.kind)


@dataclass(frozen=True)
class Decision:
    kind: int
    candidates: tuple[Candidate, ...]  # every answer of the kind, best first
    probability: float
    rule: str | None = None  # which rule abstained: "kind", "question", "radiograph" or "confidence"
    reason: str | None = None


class Predictor:
    """A loaded bundle. Its methods may be called from several threads."""

    def __init__(self, path: Path, manifest: Manifest, sessions: dict[str, Session], tokenizer: "Tokenizer") -> None:
        self.manifest = manifest
        self._sessions = sessions
        self._tokenizer = tokenizer
        self._text_embedding = lru_cache(1024)(self._embedding_from_text)  # the same questions are asked of many images
        self.model = ModelInfo(
            bundle=manifest.name,
            version=manifest.version,
            precision=manifest.precision,
            backend=sessions["image"].backend,
            device=sessions["image"].device,
            sha256=hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest(),
        )

    def ask(
        self, image: Image, question: str, *, frame: int | None = None, window: tuple[float, float] | None = None, top: int = TOP
    ) -> Answer:
        """``image`` is a path, a Dataset, a Picture, or an array: uint8 (H, W) or (H, W, 3) RGB, other numbers (H, W) only.

        ``frame`` counts from 0, ``window`` is (center, width) in modality units; both are for DICOM.
        """
        return self.ask_many(image, [question], frame=frame, window=window, top=top)[0]

    def ask_many(
        self,
        image: Image,
        questions: Sequence[str],
        *,
        frame: int | None = None,
        window: tuple[float, float] | None = None,
        top: int = TOP,
    ) -> list[Answer]:
        """One answer per question; the image is read and encoded once. All answers carry the timings of this call."""
        from pmclip_deploy.pixels import tensor_from_pixels

        _check_questions(questions)
        start = time.perf_counter()
        picture = picture_from_image(image, frame, window)
        read = time.perf_counter()
        tensor = tensor_from_pixels(picture.pixels, self.manifest.preprocess)  # (3, S, S) f32
        preprocessed = time.perf_counter()
        embedding = self.embedding_from_tensor(tensor)  # (D,) f32
        encoded = time.perf_counter()
        heads = self.heads(np.repeat(embedding[None], len(questions), 0), self.embed_texts(questions))
        decisions = [decision_from_heads(self.manifest, heads, row) for row in range(len(questions))]
        done = time.perf_counter()
        steps = {"read": read - start, "preprocess": preprocessed - read, "encode": encoded - preprocessed, "answer": done - encoded}
        timings = {name: round(1e3 * seconds, 2) for name, seconds in {**steps, "total": done - start}.items()}
        return [
            Answer(
                question=question,
                answer=d.candidates[0].answer if d.reason is None else None,
                probability=d.probability,
                abstained=d.reason is not None,
                reason=d.reason,
                candidates=d.candidates[:top],
                image=picture.info,
                model=self.model,
                timings_ms=dict(timings),
                note=self.manifest.kinds[d.kind].note if d.candidates else None,
            )
            for question, d in zip(questions, decisions, strict=True)
        ]

    def embed_image(self, image: Image, *, frame: int | None = None, window: tuple[float, float] | None = None) -> Floats:
        """(D,), not normalised."""
        from pmclip_deploy.pixels import tensor_from_pixels

        picture = picture_from_image(image, frame, window)
        return self.embedding_from_tensor(tensor_from_pixels(picture.pixels, self.manifest.preprocess))

    def embed_text(self, text: str) -> Floats:
        """(D,), not normalised."""
        embedding: Floats = self.embed_texts([text])[0]
        return embedding

    def embed_texts(self, texts: Sequence[str]) -> Floats:
        """(N, D), not normalised."""
        _check_questions(texts)
        return np.concatenate([self._text_embedding(text) for text in texts])

    def _embedding_from_text(self, text: str) -> Floats:
        """(1, D). Alone: a dynamically quantised tower takes its scales from the batch, and an answer must not depend on
        which other questions were asked beside it."""
        tokens = tokens_from_text(self._tokenizer, [text], self.manifest.context_length, self.manifest.pad_id)  # (1, T) i64
        return self._sessions["text"].run({"tokens": tokens})["embedding"]

    def embedding_from_tensor(self, tensor: Floats) -> Floats:
        """(3, S, S) -> (D,)."""
        embedding: Floats = self._sessions["image"].run({"pixels": tensor[None]})["embedding"][0]
        return embedding

    def heads(self, image: Floats, text: Floats) -> Heads:
        """(N, D) and (N, D)."""
        out = self._sessions["head"].run({"image": image, "text": text})
        answers, kinds = len(self.manifest.answers), len(self.manifest.kinds)
        if out["answer"].shape != (len(image), answers) or out["kind"].shape != (len(image), kinds) or len(out["radiograph"]) != len(image):
            raise BundleError(
                f"the head of bundle {self.manifest.name} does not fit its manifest; export it again with `pmclip-deploy export`"
            )
        if not all(np.isfinite(out[name]).all() for name in CONTRACT["head"][1]):
            raise BundleError(f"bundle {self.manifest.name} computes no numbers for this image; export it again in a higher precision")
        return Heads(out["answer"], out["kind"], out["radiograph"])


def picture_from_image(image: Image, frame: int | None = None, window: tuple[float, float] | None = None) -> "Picture":
    from pmclip_deploy import pixels

    if isinstance(image, (str, os.PathLike)):
        return pixels.picture_from_path(image, frame, window)
    if isinstance(image, np.ndarray):
        return pixels.picture_from_array(image)
    if isinstance(image, pixels.Picture):
        return image
    from pydicom import Dataset

    if not isinstance(image, Dataset):
        raise UsageError(f"an image is a path, an array or a pydicom Dataset, not a {type(image).__name__}")
    from pmclip_deploy.dicom import picture_from_dicom

    return picture_from_dicom(image, frame, window)


def decision_from_heads(manifest: Manifest, heads: Heads, row: int) -> Decision:
    """The rules in their order; a later rule never overrules an earlier one."""
    kinds = softmax(heads.kind[row])
    index = int(kinds.argmax())
    kind, limits = manifest.kinds[index], manifest.abstention
    if kind.reason is not None:
        return Decision(index, (), float(kinds[index]), "kind", kind.reason)
    probabilities = softmax(heads.answer[row, list(kind.answers)] / kind.temperature)
    best = np.argsort(-probabilities, kind="stable")
    candidates = tuple(Candidate(manifest.answers[kind.answers[i]], float(probabilities[i])) for i in best)
    decision = Decision(index, candidates, candidates[0].probability)
    if kinds[index] < limits.kind_threshold:
        return replace(decision, rule="question", reason=UNTRAINED)
    if heads.radiograph[row] < limits.radiograph_threshold:
        return replace(decision, rule="radiograph", reason=NO_RADIOGRAPH)
    if kind.threshold >= 1:
        return replace(decision, rule="confidence", reason=NEVER_SURE)
    if decision.probability < kind.threshold:
        reason = f"the confidence {decision.probability:.2f} is under the bundle's threshold {kind.threshold:.2f}"
        return replace(decision, rule="confidence", reason=reason)
    return decision


def softmax(logits: Floats) -> NDArray[np.float64]:
    shifted = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return np.asarray(shifted / shifted.sum())


def _session(path: Path, name: str, device: str) -> Session:
    session = open_session(path, device)
    inputs, outputs = CONTRACT[name]
    if set(session.inputs) != set(inputs) or not set(outputs) <= set(session.outputs):
        raise BundleError(f"{path}: takes {session.inputs} and gives {session.outputs}, not {inputs} and {outputs}; export it again")
    return session


def _check_questions(questions: Sequence[str]) -> None:
    if isinstance(questions, str) or not questions:
        raise UsageError("pass a list of one or more questions")
    for question in questions:
        if not question.strip():
            raise UsageError('the question is empty; ask something, for example "is there a fracture?"')
        try:
            question.encode()
        except UnicodeEncodeError as error:
            raise UsageError("the question is no valid Unicode text; check the terminal's encoding") from error
