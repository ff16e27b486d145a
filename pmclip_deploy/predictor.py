"""An image and a question in, a calibrated answer or an abstention out: the flow itself, top-down.

Longer than other files, since the docstrings of its public methods are the reference.
"""

import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.answer import Answer, Candidate, Classification, Match, ModelInfo
from pmclip_deploy.beside import made, side_by_side
from pmclip_deploy.bundle.contract import contract_of
from pmclip_deploy.bundle.files import rows_from_bundle
from pmclip_deploy.bundle.manifest import Manifest
from pmclip_deploy.bundle.names import MANIFEST, QUESTION_EMBEDDINGS, WORDS
from pmclip_deploy.bundle.types import Head
from pmclip_deploy.decision.evidence import FACETS, Evidence, FindingScores, Reply, findings_of
from pmclip_deploy.decision.heads import Floats, HeadLogits, decision_from_heads, softmax
from pmclip_deploy.decision.needs import facet_kinds, graphs_of_ask
from pmclip_deploy.decision.rules import askable, facets_of, reply, taught_findings, why_not_validated
from pmclip_deploy.errors import BundleError, InputError, UsageError
from pmclip_deploy.header.read import Header
from pmclip_deploy.imaging.images import Image, picture_from_image
from pmclip_deploy.looking import PictureGraphs
from pmclip_deploy.questions import Intent, understood
from pmclip_deploy.sessions import Session
from pmclip_deploy.towers import Towers

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from pmclip_deploy.imaging.picture import Picture
    from pmclip_deploy.search.index import Index
    from pmclip_deploy.search.shards import Shards


TOP = 5  # candidates an answer carries
ROWS = 256  # pairs that the head answers at a time, which bounds its memory


class Predictor:
    """A loaded bundle. Its methods may be called from several threads.

    An ``image`` is given in any of these forms, and the same picture is answered the same in each:

    - a path to a DICOM, PNG or JPEG file;
    - what such a file holds, as bytes, bytearray or memoryview;
    - a file object, opened in binary mode. It is read from where it stands to its end, 1 GiB at most, and stays open. One that can seek is
      put back to where it stood; another one stays at its end;
    - a PIL image;
    - an array: uint8 (H, W), 0 = black, or (H, W, 3) RGB as it is; other numbers (H, W), spread from the smallest to the largest;
    - a pydicom Dataset.

    ``frame`` counts from 0; the default is the middle one. ``window`` is (center, width) in modality units, Hounsfield units of a CT; the
    default is the file's own. Both are for DICOM.

    Every method that takes an image raises InputError where it cannot be read, and NoPictureError, which is one, where the file holds no
    picture. None raises another error because of what a file holds.

    >>> import pmclip_deploy as pm
    >>> predictor = pm.load()
    >>> with open("scan.dcm", "rb") as file:
    ...     predictor.ask(file, "is this a CT?").answer, predictor.ask(file.read(), "is this a CT?").answer
    ('yes', 'yes')
    """

    def __init__(
        self,
        path: Path | None,
        manifest: Manifest,
        sessions: Mapping[str, Session],
        tokenizers: "Mapping[str, Tokenizer]",
        notes: Sequence[str] = (),
    ) -> None:
        """``tokenizers`` by the name of their file. ``path`` is None for a model that is no bundle."""
        self.path = path
        self.manifest = manifest
        self.notes = notes  # what a person should know of how the graphs run, one line each; graphs that open later add to it
        self._contract = contract_of(manifest)
        self._sessions = sessions
        self._tokenizers = tokenizers
        self._facets = facet_kinds(manifest)
        self._graphs = PictureGraphs(path, manifest, sessions)
        self.towers = Towers(path, manifest, sessions, tokenizers)
        first = sessions[graphs_of_ask(manifest)[0]]
        self.model = ModelInfo(
            bundle=manifest.name,
            version=manifest.version,
            precision=manifest.precision,
            backend=first.backend,
            device=first.device,
            sha256="" if path is None else hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest(),
        )

    def __repr__(self) -> str:
        return f"Predictor({self.model})"

    def ask(
        self,
        image: Image,
        question: str,
        *,
        frame: int | None = None,
        window: tuple[float, float] | None = None,
        top: int = TOP,
        ignore_header: bool = False,
        child: bool | None = None,
    ) -> Answer:
        """An answer, or an abstention and its reason. The class says what an ``image`` may be.

        ``top`` is how many candidates the answer carries. ``ignore_header`` answers from the picture alone. ``child`` says whether the
        patient is under 18 years, where the file does not.
        Raises UsageError where the bundle has no head and was taught no finding, or where the question is empty, and InputError where the
        image cannot be read.

        >>> import pmclip_deploy as pm
        >>> answer = pm.load().ask("scan.dcm", "what imaging modality is this?")
        >>> answer.answer, answer.source, answer.image.modality
        ('CT, with contrast', 'header', 'CT')
        """
        asked = self.ask_many(image, [question], frame=frame, window=window, top=top, ignore_header=ignore_header, child=child)
        return asked[0]

    def ask_many(
        self,
        image: Image,
        questions: Sequence[str],
        *,
        frame: int | None = None,
        window: tuple[float, float] | None = None,
        top: int = TOP,
        ignore_header: bool = False,
        child: bool | None = None,
    ) -> list[Answer]:
        """One answer per question; the image is read and encoded once. All answers carry the timings of this call. Raises as ``ask``.

        >>> import pmclip_deploy as pm
        >>> [a.answer for a in pm.load().ask_many("scan.dcm", ["is this a CT?", "is this an MRI?"])]
        ['yes', 'no']
        """
        if not self.manifest.probes:
            self._head()  # before the image is read
        _check_questions(questions)
        start = time.perf_counter()
        picture = picture_from_image(image, frame, window)
        read = time.perf_counter()
        inputs = self._graphs.inputs_of_head(picture, self.manifest.head) if self.manifest.head else {}
        preprocessed = time.perf_counter()
        seen = self._graphs.seen_from_inputs(inputs)  # (V,) f32
        encoded = time.perf_counter()
        intents = [understood(question, taught_findings(self.manifest)) for question in questions]
        header = Header() if ignore_header or picture.header is None else picture.header
        evidence = self._evidence(picture, seen, intents, header, header.child if child is None else child)
        by_rules = [bool(self._facets) or (intent.kind == "finding" and intent.finding in self._graphs.probed) for intent in intents]
        others = iter(self._replies_of_head(seen, [(q, x) for q, x, ruled in zip(questions, intents, by_rules, strict=True) if not ruled]))
        replies = [
            reply(self.manifest, intent, evidence, question) if ruled else next(others)
            for intent, question, ruled in zip(intents, questions, by_rules, strict=True)
        ]
        done = time.perf_counter()
        steps = {"read": read - start, "preprocess": preprocessed - read, "encode": encoded - preprocessed, "answer": done - encoded}
        timings = {name: round(1e3 * seconds, 2) for name, seconds in {**steps, "total": done - start}.items()}
        return [
            Answer(
                question=question,
                answer=said.answer,
                probability=said.probability,
                abstained=said.answer is None,
                reason=said.reason,
                candidates=said.candidates[:top],
                image=picture.info,
                model=self.model,
                timings_ms=dict(timings),
                note=said.note,
                source=said.source,
                understood_as=intent,
                worth=said.worth,
            )
            for question, intent, said in zip(questions, intents, replies, strict=True)
        ]

    def _replies_of_head(self, seen: Floats, asked: Sequence[tuple[str, Intent]]) -> list[Reply]:
        """Of a head whose kinds of question are not FACETS, as MEVF's and QCR's: it reads each question itself."""
        if self.manifest.head is None or not asked:
            names = ", ".join(finding.name for finding in findings_of(self.manifest))
            return [Reply(None, reason=f"this model has no head; it answers for {names} alone") for _ in asked]
        heads = self.head_logits(np.repeat(seen[None], len(asked), 0), self.question_features([question for question, _ in asked]))
        replies, reads_words = [], self.manifest.head.words is not None
        for row, (_, intent) in enumerate(asked):
            d = decision_from_heads(self.manifest, heads, row)
            reason = (why_not_validated(intent) if reads_words else None) or d.reason
            note = self.manifest.kinds[d.kind].note if d.candidates else None
            replies.append(
                Reply(d.candidates[0].answer if reason is None else None, d.probability, reason, "picture", d.candidates, note=note)
            )
        return replies

    def _evidence(self, picture: "Picture", seen: Floats, intents: Sequence[Intent], header: Header, child: bool | None) -> Evidence:
        """What the graphs say of a picture, as far as these questions need it."""
        asked = {x.finding for x in intents if x.kind == "finding" and x.answerable}
        if not self._facets:
            findings = self._graphs.of_findings(picture, seen, header, asked & self._graphs.probed)
            return Evidence(header=header, findings=findings, child=child)
        looked = self._graphs.of_findings(picture, seen, header, asked)
        facets = sorted(facets_of(intents)) or ["modality"]  # one at least, which says whether it is a radiology image
        heads = self.head_logits(np.repeat(seen[None], len(facets), 0), self.question_features([FACETS[facet][1] for facet in facets]))
        opinions = {}
        for row, facet in enumerate(facets):
            kind = self.manifest.kinds[self._facets[facet]]
            probabilities = softmax(heads.answer[row, list(kind.answers)].astype(np.float64) / kind.temperature)
            best = np.argsort(-probabilities, kind="stable")
            opinions[facet] = tuple(Candidate(self.manifest.answers[kind.answers[i]], float(probabilities[i])) for i in best)
        radiology = heads.radiograph is None or bool(heads.radiograph[0] >= self.manifest.abstention.radiograph_threshold)
        return Evidence(opinions, header, radiology, looked, child)

    def model_view(
        self, image: Image, finding: str | None = None, *, frame: int | None = None, window: tuple[float, float] | None = None
    ) -> NDArray[np.uint8]:
        """(S, S) or (S, S, 3) u8: the picture as the model saw it, windowed, cropped and scaled.

        With the name of a ``finding`` it is what the graph "findings" saw, (S, S, 3), with that finding's map in red where the map was
        found to point at findings in validation; without a map else. A finding that the bundle was taught is looked for by the image
        tower. Raises UsageError for a finding that the bundle has not.

        >>> import pmclip_deploy as pm
        >>> picture = pm.load().model_view("scan.dcm")
        >>> picture.shape, picture.dtype
        ((256, 256), dtype('uint8'))
        """
        return self._graphs.view(picture_from_image(image, frame, window), finding)

    def detect_findings(self, image: Image, *, frame: int | None = None, window: tuple[float, float] | None = None) -> FindingScores | None:
        """What the graph "findings" says, the mean over the picture and its mirror image; None where the bundle has no such graph."""
        return self._graphs.detect_findings(picture_from_image(image, frame, window))

    def probe_embedding(
        self, image: Image, image_embedding: Floats | None = None, *, frame: int | None = None, window: tuple[float, float] | None = None
    ) -> NDArray[np.float64]:
        """(D,) f64: the mean of the unit embeddings of a picture and of its mirror image, in which the logits of probes are linear.

        ``image_embedding`` is the picture's own embedding, (D,) f32, where it is known.
        Raises InputError where one of the two has no direction.
        """
        return self._graphs.probe_embedding(picture_from_image(image, frame, window), image_embedding)

    def questions(self) -> tuple[str, ...]:
        """Examples of what can be asked of this model; what it was taught alone where its head reads questions itself, as MEVF's does.

        >>> import pmclip_deploy as pm
        >>> pm.load().questions()[0]
        'what imaging modality is this?'
        """
        return askable(self.manifest) if self._facets or self.manifest.probes else ()

    def classify(
        self,
        image: Image,
        labels: Sequence[str] = (),
        *,
        examples: Mapping[str, Iterable[Image]] | None = None,
        method: str | None = None,
        templates: Sequence[str] | None = None,
        frame: int | None = None,
        window: tuple[float, float] | None = None,
    ) -> Classification:
        """Zero-shot among ``labels``, or among those the bundle was exported with; few-shot from ``examples``, images of each label.

        ``method`` is "zero-shot", and with examples "cache" (the default) or "probe"; ``templates`` are prompts with {} for the label,
        and for neither the probe nor the bundle's labels.
        Raises UsageError where labels, examples and method do not go together, and InputError where an image cannot be read.

        >>> import pmclip_deploy as pm
        >>> pm.load().classify("scan.dcm", ["ct", "mri"]).labels[0].label
        'ct'
        """
        from pmclip_deploy.classify import Classifier

        return Classifier(self, labels, examples, method, templates)(image, frame, window)

    def similarity(self, image: Floats, bank: Floats) -> dict[str, NDArray[Any]]:
        """(B, D) f32, (N, D) f32 -> score, index and log_sum_exp of the bundle's graph "labels", whose bank this is."""
        scale = np.array(self.manifest.logit_scale, np.float32)
        return self._sessions["labels"].run({"image": image, "bank": bank, "logit_scale": scale})

    def embed_image(self, image: Image, *, frame: int | None = None, window: tuple[float, float] | None = None) -> Floats:
        """The image tower's embedding, (D,) f32, not normalised.

        >>> import pmclip_deploy as pm
        >>> embedding = pm.load().embed_image("scan.dcm")
        >>> embedding.shape, embedding.dtype
        ((512,), dtype('float32'))
        """
        from pmclip_deploy.imaging.preprocess import tensor_from_pixels

        picture = picture_from_image(image, frame, window)
        return self.embedding_from_tensor(tensor_from_pixels(picture.pixels, self.manifest.preprocess))

    def embed_images(self, images: Iterable[Image]) -> Floats:
        """(N, D) f32, not normalised: ``embed_image`` of each, bit for bit. One image is read while another is computed.

        Where `tune` chose batches, each is ``embed_image``'s within the gates, and has the same bits whatever other images there are.

        Raises the InputError of the first image that cannot be read, and UsageError if there are no images.

        >>> import pmclip_deploy as pm
        >>> pm.load().embed_images(["scan.dcm", "scan.dcm"]).shape
        (2, 512)
        """
        rows = [made(row) for row in self.embeddings_of_images(images)]
        if not rows:
            raise UsageError("pass one or more images")
        return np.stack(rows)

    def embeddings_of_images(self, images: Iterable[Image]) -> Iterator[Floats | InputError]:
        """``embed_images``, one after another: (D,) of each image in order, or the InputError of one that cannot be read.

        >>> import pmclip_deploy as pm
        >>> [type(row).__name__ for row in pm.load().embeddings_of_images(["scan.dcm", "no-such-file"])]
        ['ndarray', 'InputError']
        """
        return self.towers.of_images(images)

    def embed_text(self, text: str) -> Floats:
        """The text tower's embedding, (D,) f32, not normalised. Raises UsageError for an empty text.

        >>> import pmclip_deploy as pm
        >>> pm.load().embed_text("a ct of the chest").shape
        (512,)
        """
        embedding: Floats = self.embed_texts([text])[0]
        return embedding

    def embed_texts(self, texts: Sequence[str]) -> Floats:
        """(N, D) f32, not normalised: ``embed_text`` of each, bit for bit. Raises UsageError where there are none, or an empty one."""
        _check_texts(texts)
        return self.towers.of_texts(texts)

    def search(
        self,
        index: "Index | Shards | str | os.PathLike[str]",
        *,
        image: Image | None = None,
        text: str | None = None,
        k: int = 10,
        frame: int | None = None,
        window: tuple[float, float] | None = None,
    ) -> list[Match]:
        """The k rows of an index that are nearest to an image or a text, the nearest first.

        ``index`` is what ``index_from_file`` opens, or a path, which is read and verified anew each time, or several indexes as ``shards``
        has them. Raises BundleError where another bundle made it or the file is broken, and UsageError unless it is searched for one thing.

        >>> import pmclip_deploy as pm
        >>> from pathlib import Path
        >>> from pmclip_deploy.search.indexing import build_index, captions_of_file
        >>> _ = Path("captions.txt").write_text("a ct of the chest\\na plain film of a hand\\n")
        >>> predictor = pm.load()
        >>> _ = build_index(Path("captions.index"), captions_of_file(predictor, Path("captions.txt")))
        >>> [match.id for match in predictor.search("captions.index", image="scan.dcm", k=1)]
        ['a ct of the chest']
        """
        from pmclip_deploy.search.index import index_from_file, unit

        if (image is None) == (text is None) or k < 1:
            raise UsageError("search for an image or for a text, one of them, and for 1 or more rows")
        opened = index_from_file(index) if isinstance(index, str | os.PathLike) else index
        opened.refuse_other_bundle(self.model.bundle, self.model.sha256)
        embedding = self.embed_text(text) if text is not None else self.embed_image(image, frame=frame, window=window)  # type: ignore[arg-type]
        return opened.matches(unit(embedding, "the query").astype(np.float32), k)

    def tokens(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """What the text tower reads of each, (1, T) i64 token ids of its own length."""
        return [self.towers.tokens(text) for text in texts]

    def embedding_from_tensor(self, tensor: Floats) -> Floats:
        """(3, S, S) f32, as preprocessed -> (D,) f32."""
        return self._graphs.embedding_from_tensor(tensor)

    def image_features(self, image: Image, *, frame: int | None = None, window: tuple[float, float] | None = None) -> Floats:
        """(V,) f32: all that the head sees of an image. The image tower's embedding where it looks through that, then its details or the
        features of ``manifest.head.grey``; a single 1 where it has none of them and answers from the question alone."""
        head = self._head()  # before the image is read
        return self._graphs.seen_from_inputs(self._graphs.inputs_of_head(picture_from_image(image, frame, window), head))

    def features_of_images(self, images: Iterable[Image]) -> Iterator[Floats | InputError]:
        """``image_features`` of each in order, or the InputError of one that cannot be read.

        Where the head looks through the image tower alone they are computed in batches, if `tune` chose them.
        """
        head = self._head()
        if "image" in self.towers.tuned and head.clip and not head.details and not head.grey:
            return self.towers.of_images(images)
        return side_by_side(self.image_features, images)

    def question_features(self, questions: Sequence[str]) -> NDArray[Any]:
        """(N, D) f32 or, where the head reads words, (N, T) i64: what it is given of each question."""
        words = self._head().words
        _check_questions(questions)
        if words is None:
            kept = self._kept
            others = [question for question in dict.fromkeys(questions) if question not in kept]
            rows = kept | dict(zip(others, self.embed_texts(others), strict=True)) if others else kept
            return np.stack([rows[question] for question in questions])
        from pmclip_deploy.tokens import tokens_from_text

        return tokens_from_text(self._tokenizers[WORDS], questions, words.length, words.pad_id, length=words.length)

    @cached_property
    def _kept(self) -> dict[str, Floats]:
        """The embeddings that the bundle keeps of questions, (D,) each."""
        if not self.manifest.asked or self.path is None:
            return {}
        rows = rows_from_bundle(self.path, self.manifest, QUESTION_EMBEDDINGS, len(self.manifest.asked), self.manifest.embed_dim)
        return dict(zip(self.manifest.asked, rows, strict=True))

    def head_logits(self, image: Floats, question: NDArray[Any]) -> HeadLogits:
        """(N, V) and (N, D) or (N, T), as ``image_features`` and ``question_features`` give them.

        Raises BundleError where the graph does not fit.
        """
        # A dynamically quantised head takes its scales from the batch, and an answer must not depend on what else was asked.
        rows, words = 1 if "int8" in self.manifest.graphs["head"].precision else ROWS, self._head().words
        parts = [self._logits(image[i : i + rows], question[i : i + rows]) for i in range(0, len(image), rows)]
        known = None if words is None else (question != words.pad_id).any(axis=1)
        return HeadLogits(**{name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, known=known)

    def _logits(self, seen: Floats, asked: NDArray[Any]) -> dict[str, Floats]:
        (image, question), names = self._contract["head"]
        given = self._sessions["head"].run({image: seen, question: asked})
        out = {name: given[name] for name in names}
        columns = {"answer": (len(self.manifest.answers),), "kind": (len(self.manifest.kinds),), "radiograph": ()}
        if any(x.shape != (len(seen), *columns[name]) for name, x in out.items()):
            raise BundleError(
                f"the head of bundle {self.manifest.name} does not fit its manifest", "export it again with `pmclip-deploy export`"
            )
        if not all(np.isfinite(x).all() for x in out.values()):
            raise BundleError(
                f"bundle {self.manifest.name} computes NaN or infinity for this image", "export it again in a higher precision"
            )
        return out

    def _head(self) -> Head:
        if self.manifest.head is None:
            raise UsageError(
                f"bundle {self.manifest.name} has no head, so it embeds images and texts and answers no question",
                "compare labels with `pmclip-deploy classify`, find images with `search`, or export a checkpoint that has a head from "
                "`pmclip-deploy train vqa`",
            )
        return self.manifest.head


def _check_questions(questions: Sequence[str]) -> None:
    _check_texts(questions, "question", 'ask something, for example "is there a fracture?"')


def _check_texts(texts: Sequence[str], noun: str = "text", step: str = 'give one, for example "chest x-ray"') -> None:
    if isinstance(texts, str) or not texts:
        raise UsageError(f"pass a list of one or more {noun}s")
    for text in texts:
        if not text.strip():
            raise UsageError(f"the {noun} is empty", step)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"the {noun} is no valid Unicode text", "check the terminal's encoding") from error
