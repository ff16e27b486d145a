"""Which of some labels an image shows: zero-shot from the labels' words, or from a few examples, on the towers' frozen embeddings."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.answer import Classification, Label, ModelInfo
from pmclip_deploy.beside import made
from pmclip_deploy.bundle.files import rows_from_bundle
from pmclip_deploy.bundle.manifest import Manifest
from pmclip_deploy.bundle.names import LABELS
from pmclip_deploy.decision.heads import Floats, sigmoid, softmax
from pmclip_deploy.errors import BundleError, InputError, UsageError
from pmclip_deploy.imaging.images import Image, picture_from_image
from pmclip_deploy.kernels import contrastive_similarity, implementation

METHODS = ("zero-shot", "cache", "probe")
TEMPLATES = ("{}", "an image showing {}", "a radiology image of {}")  # a label's embedding is their mean (CLIP, section 3.1.4)
SHARPNESS = 5.5  # beta of Tip-Adapter (Zhang et al., ECCV 2022, section 3.2); its alpha is 1
STEPS, DECAY = 500, 1e-3  # of the probe
NO_NUMBERS = ("the model computes NaN or infinity for these images and labels", "export it again in a higher precision")


class Embedder(Protocol):
    """What is needed of a Predictor."""

    path: Path | None
    manifest: Manifest
    model: ModelInfo

    def embed_image(self, image: Image) -> Floats: ...

    def embeddings_of_images(self, images: Iterable[Image]) -> Iterator[Floats | InputError]: ...

    def embed_texts(self, texts: Sequence[str]) -> Floats: ...

    def similarity(self, image: Floats, bank: Floats) -> dict[str, NDArray[Any]]: ...


class Classifier:
    """Predictor.classify, for any number of images: labels and examples are embedded once, when the first image needs them."""

    def __init__(
        self,
        predictor: Embedder,
        labels: Sequence[str] = (),
        examples: Mapping[str, Iterable[Image]] | None = None,
        method: str | None = None,
        templates: Sequence[str] | None = None,
    ) -> None:
        if any(isinstance(given, str) for given in (labels, templates, *(examples or {}).values())):
            raise UsageError("labels, templates and the examples of a label are lists, not a text", "put the text in a list")
        self.method = method or ("cache" if examples else "zero-shot")
        if self.method not in METHODS or (self.method == "zero-shot") == bool(examples):
            fits = "cache or probe with examples" if examples else "zero-shot without examples"
            raise UsageError(f"method {self.method[:60]!r} does not fit", f"choose {fits}")
        if examples and labels:
            raise UsageError("the examples name the labels", "leave out the list of labels")
        self.names = tuple(examples or labels or predictor.manifest.labels)
        if not self.names:
            raise UsageError("no labels given", "pass two or more, or export the bundle with `pmclip-deploy export --labels FILE`")
        check_labels(self.names)
        if templates is not None and self.method == "probe":
            raise UsageError("the probe reads no words", "leave out the templates")
        if templates is not None and not labels and not examples:
            raise UsageError(
                "the bundle's labels were embedded at export, so they take no templates", "leave out the templates, or pass the labels"
            )
        self.predictor, self.labels, self.examples = predictor, labels, examples
        self.prompts = templates_of(predictor.manifest) if templates is None else templates

    @cached_property
    def scores(self) -> Callable[[Floats], Floats]:
        """From an image's embedding, (D,), to the scores of the labels, (N,)."""
        predictor = self.predictor
        if not self.labels and not self.examples:
            return partial(scores_from_bundle, predictor)
        if self.examples:
            return _few_shot(predictor, self.examples, self.method, self.prompts)
        bank = bank_from_labels(predictor.embed_texts, self.names, self.prompts)
        return lambda seen: zero_shot_scores(seen, bank, predictor.manifest.logit_scale)

    @property
    def bias(self) -> float | None:
        """What makes a score a logit, of models with a sigmoid loss, and only of a picture and one text, as they were trained."""
        return self.predictor.manifest.logit_bias if self.method == "zero-shot" and len(self.prompts) == 1 else None

    def __call__(self, image: Image, frame: int | None = None, window: tuple[float, float] | None = None) -> Classification:
        start = time.perf_counter()
        picture = picture_from_image(image, frame, window)
        read = time.perf_counter()
        seen = _numbers(self.predictor.embed_image(picture))  # (D,)
        encoded = time.perf_counter()
        scores = self.scores(seen)
        bias = self.bias
        if bias is None:
            made = [
                Label(name, share, score) for name, share, score in zip(self.names, softmax(scores).tolist(), scores.tolist(), strict=True)
            ]
        else:
            logits = scores.astype(np.float64) + bias
            made = [Label(name, None, x, p) for name, x, p in zip(self.names, logits.tolist(), sigmoid(logits).tolist(), strict=True)]
        best = np.argsort(-scores, kind="stable")
        done = time.perf_counter()
        timings = {"read": read - start, "encode": encoded - read, "classify": done - encoded, "total": done - start}
        return Classification(
            method=self.method,
            labels=tuple(made[i] for i in best),
            image=picture.info,
            model=self.predictor.model,
            timings_ms={name: round(1e3 * seconds, 2) for name, seconds in timings.items()},
        )


def _few_shot(
    predictor: Embedder, examples: Mapping[str, Iterable[Image]], method: str, templates: Sequence[str]
) -> Callable[[Floats], Floats]:
    rows = {name: [made(row) for row in predictor.embeddings_of_images(images)] for name, images in examples.items()}
    if (empty := next((name for name in rows if not rows[name]), None)) is not None:
        raise UsageError(f"the label {empty[:60]!r} has no examples", "give one image or more of each label")
    x = _numbers(np.concatenate(list(rows.values())))
    of = np.repeat(np.arange(len(rows)), [len(each) for each in rows.values()])
    if method == "probe":
        probe = probe_from_examples(x, of, len(examples))
        return lambda seen: scores_from_probe(seen, probe)
    bank, scale = bank_from_labels(predictor.embed_texts, list(examples), templates), predictor.manifest.logit_scale
    return lambda seen: scores_from_cache(seen, x, of, zero_shot_scores(seen, bank, scale))


def bank_from_labels(embed: Callable[[Sequence[str]], Floats], labels: Sequence[str], templates: Sequence[str] = TEMPLATES) -> Floats:
    """(N, D) f32 of unit length: of each label the mean direction of its prompts. Raises UsageError for a template without {}."""
    for template in templates or ("",):
        if "{}" not in template:
            raise UsageError(f"the template {template[:60]!r} has no {{}}", 'write {} where the label goes, as in "an image showing {}"')
    prompts = [template.replace("{}", label) for label in labels for template in templates]
    return _unit(_unit(embed(prompts)).reshape(len(labels), len(templates), -1).mean(1))


def templates_of(manifest: Manifest) -> tuple[str, ...]:
    """TEMPLATES, or the label alone for a model with a sigmoid loss, whose probabilities are of one text and not of a mean of several."""
    return TEMPLATES if manifest.logit_bias is None else TEMPLATES[:1]


def check_labels(labels: Sequence[str]) -> None:
    if len(labels) < 2 or not all(label.strip() for label in labels):
        raise UsageError("pass two labels or more, none of them empty")
    if (twice := next((label for label in labels if list(labels).count(label) > 1), None)) is not None:
        raise UsageError(f"the label {twice[:60]!r} is given twice", "give it once")


def zero_shot_scores(seen: Floats, bank: Floats, logit_scale: float) -> Floats:
    """(D,), (N, D) -> (N,): the scaled cosines, in the labels' order."""
    found = contrastive_similarity(seen[None], bank, logit_scale, len(bank))
    return _in_order(found.score[0], found.index[0])


def scores_from_bundle(predictor: Embedder, seen: Floats) -> Floats:
    """(D,) -> (N,) for the labels of the bundle: by the compiled kernel, or by the graph, which says the same, where there is none."""
    manifest = predictor.manifest
    bank = rows_from_bundle(predictor.path, manifest, LABELS, len(manifest.labels), manifest.embed_dim)
    if implementation().startswith("C++"):
        return zero_shot_scores(seen, bank, manifest.logit_scale)
    found = predictor.similarity(seen[None], bank)
    return _in_order(found["score"][0], found["index"][0])


def _numbers(embeddings: Floats) -> Floats:
    if not np.isfinite(embeddings).all():
        raise BundleError(*NO_NUMBERS)
    return embeddings


def _in_order(score: Floats, index: NDArray[np.int64]) -> Floats:
    """The k = N best, to the bank's order; what has no direction scores -inf."""
    scores = np.full(len(score), -np.inf, np.float32)
    scores[index[index >= 0]] = score[index >= 0]
    if not np.isfinite(scores).any():
        raise BundleError(*NO_NUMBERS)
    return scores


def scores_from_cache(seen: Floats, examples: Floats, of: NDArray[np.int64], zero_shot: Floats) -> Floats:
    """Tip-Adapter: (D,), (M, D), (M,) the examples' labels, (N,) zero-shot scores -> (N,); each example votes for its own label.

    Votes are averaged, where the paper adds them up, so that a label does not win by having more examples.
    """
    near = np.exp(-SHARPNESS * (1 - _unit(examples) @ _unit(seen)))
    votes = np.bincount(of, near, len(zero_shot)) / np.bincount(of, minlength=len(zero_shot))
    return (zero_shot + votes).astype(np.float32)


def probe_from_examples(examples: Floats, of: NDArray[np.int64], labels: int) -> Floats:
    """(M, D), (M,) -> (D + 1, N): multinomial logistic regression on unit features, the last row the bias; every label weighs the same.

    Gradient steps with Nesterov's momentum: the loss is convex, and its curvature at most half the squared length of a row, which is 2.
    """
    x = np.hstack([_unit(examples).astype(np.float64), np.ones((len(examples), 1))])
    wanted, weight = np.eye(labels)[of], 1 / (labels * np.bincount(of, minlength=labels)[of])[:, None]
    weights = before = np.zeros((x.shape[1], labels))
    for i in range(STEPS):
        ahead = weights + i / (i + 3) * (weights - before)
        logits = x @ ahead
        e = np.exp(logits - logits.max(1, keepdims=True))
        gradient = x.T @ (weight * (e / e.sum(1, keepdims=True) - wanted)) + DECAY * ahead
        before, weights = weights, ahead - gradient / (1 + DECAY)
    return weights.astype(np.float32)


def scores_from_probe(seen: Floats, probe: Floats) -> Floats:
    return np.asarray(np.append(_unit(seen), np.float32(1)) @ probe)


def _unit(x: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), np.finfo(np.float32).tiny))
