"""Both towers over many items: side by side, and several rows at a time where each row says what it says alone, bit for bit."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.beside import chunks, made, outcome, side_by_side
from pmclip_deploy.bundle.files import content_of_file
from pmclip_deploy.bundle.manifest import Manifest
from pmclip_deploy.bundle.names import TOKENIZER
from pmclip_deploy.decision.heads import Floats
from pmclip_deploy.errors import InputError
from pmclip_deploy.imaging.images import Image, picture_from_image
from pmclip_deploy.sessions import Session

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Inputs that a tower computes at a time, as measured on CPUs (docs/measured/batches.md). 1 computes each alone.
BATCH: Mapping[str, int] = {"image": 1, "text": 8}
ENOUGH = 1000  # numbers that were equal: a few may be equal by chance where sums are made in another order
KEPT = 1024  # texts whose embeddings are kept: the same questions are asked of many images
STEP = 16  # tokens: the texts of a tuned batch are filled up to a multiple of it, so that texts of nearly the same length make one


class Batches:
    """A graph that takes ``size`` inputs of one shape at a time. Safe for threads.

    The first inputs of each shape are computed alone and together, until ENOUGH numbers were compared. If a bit differs, all inputs are
    computed alone from then on. So are those of a graph that takes its scales from all rows (``quantises``): a sample may not show it.
    """

    def __init__(self, session: Session, size: int, quantises: bool) -> None:
        self.size = 1 if quantises else size
        self._session, self._equal, self._lock = session, dict[tuple[int, ...], int](), Lock()  # numbers that were equal, by shape

    def run(self, inputs: Sequence[NDArray[Any]]) -> list[Floats]:
        """``inputs`` of one shape, (1, ...) each -> the embeddings, (D,) each."""
        if self.size < 2 or len(inputs) != self.size:
            return [self._run(each)[0] for each in inputs]
        if (before := self._equal.get(shape := inputs[0].shape, 0)) >= ENOUGH:
            return list(self._run(np.concatenate(inputs)))
        alone = [self._run(each)[0] for each in inputs]
        if self._lock.acquire(blocking=False):  # another thread need not find out the same
            try:
                if np.array_equal(alone, self._run(np.concatenate(inputs))):
                    self._equal[shape] = before + sum(row.size for row in alone)
                else:
                    self.size = 1
            finally:
                self._lock.release()
        return alone

    def _run(self, inputs: NDArray[Any]) -> Floats:
        return self._session.run({self._session.inputs[0]: inputs})["embedding"]


class TunedBatches:
    """A graph that takes ``size`` inputs of one shape at a time, since `tune` found that rows do not see each other, and the gates passed.

    ``fills``: a smaller batch is filled up with its last input, so that a row has the same bits in every call. Safe for threads.
    """

    def __init__(self, session: Session, size: int, fills: bool) -> None:
        self.size, self._session, self._fills = size, session, fills
        self._idle = deque[NDArray[Any]]()  # batches that no thread uses: new memory takes longer than the copy into it

    def run(self, inputs: Sequence[NDArray[Any]]) -> list[Floats]:
        """As ``Batches.run``."""
        if not inputs:
            return []
        if not self._fills:
            return list(self._embeddings(np.concatenate(inputs)))
        try:
            batch = self._idle.pop()
        except IndexError:
            batch = np.empty((self.size, *inputs[0].shape[1:]), inputs[0].dtype)
        np.concatenate([*inputs, *[inputs[-1]] * (self.size - len(inputs))], out=batch)
        rows = list(self._embeddings(batch)[: len(inputs)])
        self._idle.append(batch)
        return rows

    def _embeddings(self, batch: NDArray[Any]) -> Floats:
        return self._session.run({self._session.inputs[0]: batch})["embedding"]


class Towers:
    """The image and the text tower of one bundle. Safe for threads."""

    def __init__(
        self, path: Path | None, manifest: Manifest, sessions: Mapping[str, Session], tokenizers: "Mapping[str, Tokenizer]"
    ) -> None:
        self._path, self._manifest, self._sessions, self._tokenizers = path, manifest, sessions, tokenizers
        self.sizes = dict(BATCH)  # whoever measured something else changes them before the first use
        self.tuned = dict[str, int]()  # sizes that `tune` chose, which come before those
        self._batches = cache(self._batches_of)
        self._kept, self._lock = dict[str, Floats](), Lock()

    def of_images(self, images: Iterable[Image]) -> Iterator[Floats | InputError]:
        """Of each in order (D,), or why it cannot be read. Images are taken as they are needed, a few ahead."""
        for part in side_by_side(self._of_batch, chunks(images, self._batches("image").size)):
            yield from made(part)

    def _of_batch(self, images: Sequence[Image]) -> list[Floats | InputError]:
        read = [outcome(self.tensor, image) for image in images]
        embeddings = iter(self._batches("image").run([tensor[None] for tensor in read if not isinstance(tensor, InputError)]))
        return [tensor if isinstance(tensor, InputError) else next(embeddings) for tensor in read]

    def tensor(self, image: Image) -> Floats:
        """(3, S, S), as preprocessed."""
        from pmclip_deploy.imaging.preprocess import tensor_from_pixels

        return tensor_from_pixels(picture_from_image(image).pixels, self._manifest.preprocess)

    def of_texts(self, texts: Sequence[str]) -> Floats:
        """(N, D). Only texts of equally many tokens make a batch: nothing is padded, so nothing has to be masked."""
        found = {text: row for text in texts if (row := self._kept.get(text)) is not None}
        new = [text for text in dict.fromkeys(texts) if text not in found]
        computed = dict(zip(new, self.of_tensors("text", [self.tokens(text) for text in new]), strict=True))
        self._keep(computed)
        found |= computed
        return np.stack([found[text] for text in texts])

    def of_tensors(self, name: str, tensors: Sequence[NDArray[Any]]) -> list[Floats]:
        """(1, ...) each -> (D,) each, in order. Those of one shape make batches, and batches run side by side."""
        batches, found = self._batches(name), dict[int, Floats]()
        by_shape = groupby(sorted(range(len(tensors)), key=lambda i: tensors[i].shape), key=lambda i: tensors[i].shape)
        parts = [part for _, same in by_shape for part in chunks(same, batches.size)]
        for part, rows in zip(parts, side_by_side(lambda part: batches.run([tensors[i] for i in part]), parts), strict=True):
            found |= zip(part, made(rows), strict=True)
        return [found[i] for i in range(len(tensors))]

    def of_text(self, text: str) -> Floats:
        """(D,), computed anew."""
        embedding: Floats = self._sessions["text"].run({"tokens": self.tokens(text)})["embedding"][0]
        return embedding

    def tokens(self, text: str) -> NDArray[np.int64]:
        """(1, T) of its own length; with a tuned batch of texts filled up to a multiple of STEP."""
        from pmclip_deploy.tokens import tokens_from_text

        manifest = self._manifest
        tokens = tokens_from_text(self._tokenizers[TOKENIZER], [text], manifest.context_length, manifest.pad_id)
        return filled_up(tokens, manifest.context_length, manifest.pad_id) if "text" in self.tuned else tokens

    def forget_texts(self) -> None:
        """For a benchmark that asks what was not asked before."""
        self._kept = {}

    def _keep(self, rows: Mapping[str, Floats]) -> None:
        with self._lock:
            self._kept.update(rows)
            for text in list(self._kept)[:-KEPT]:
                del self._kept[text]

    def _batches_of(self, name: str) -> Batches | TunedBatches:
        session, size = self._sessions[name], self.sizes[name]  # a session that opens otherwise than `tune` saw takes its batch away
        if name in self.tuned:
            return TunedBatches(session, self.tuned[name], fills=name == "image")
        return Batches(session, size, size > 1 and self.quantises(name))

    def quantises(self, name: str) -> bool:
        """Whether the graph takes scales from its activations: DynamicQuantizeLinear has one for a whole tensor. True if it is unknown."""
        return self._path is None or b"DynamicQuantize" in content_of_file(self._path, self._manifest, self._manifest.graphs[name].file)


def filled_up(tokens: NDArray[np.int64], most: int, pad_id: int) -> NDArray[np.int64]:
    """(1, T) -> (1, T up to a multiple of STEP, at most ``most``)."""
    length = min(-(-tokens.shape[1] // STEP) * STEP, most)
    return np.pad(tokens, ((0, 0), (0, length - tokens.shape[1])), constant_values=pad_id)
