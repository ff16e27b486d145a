"""Many inputs of a tower, as `tune` tries them: what they are, whether a batch may be used, and how it runs."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pmclip_deploy.decision.heads import Floats
from pmclip_deploy.errors import PmclipError
from pmclip_deploy.export.gates import misses
from pmclip_deploy.export.parity import tensor_difference
from pmclip_deploy.export.probes import QUESTIONS, TEXTS, sample_pictures
from pmclip_deploy.imaging.preprocess import tensor_from_pixels
from pmclip_deploy.imaging.read import picture_from_path
from pmclip_deploy.predictor import Predictor
from pmclip_deploy.sessions import Session
from pmclip_deploy.towers import Towers, TunedBatches

MANY = 16  # inputs of a batch, and of what is timed
SHORT = 9  # of TEXTS, where those begin that are about as long as a question

Inputs = Sequence[NDArray[Any]]


def many(towers: Towers, known: Predictor, name: str) -> list[NDArray[Any]]:
    """MANY inputs of a tower, (1, ...) each: the sample pictures, each turned by quarters, or texts."""
    if name == "text":
        return [towers.tokens(text) for text in [*QUESTIONS, *TEXTS[SHORT:]][:MANY]]
    read = [picture_from_path(path).pixels for path in sample_pictures()]
    views = [np.ascontiguousarray(np.rot90(pixels, turns)) for turns in range(4) for pixels in read]
    return [tensor_from_pixels(view, known.manifest.preprocess)[None] for view in views[:MANY]]


def towers_of(known: Predictor, name: str, session: Session, batch: int | None) -> Towers:
    """As the runtime has them, with a tuned batch or without one."""
    towers = Towers(known.path, known.manifest, {**known._sessions, name: session}, known._tokenizers)
    towers.tuned = {} if batch is None else {name: batch}
    return towers


def way(known: Predictor, name: str, session: Session, batch: int | None) -> Callable[[], list[Floats]]:
    """What computes ``many``."""
    towers = towers_of(known, name, session, batch)
    return partial(towers.of_tensors, name, many(towers, known, name))


def why_not(known: Predictor, name: str, session: Session, batch: int) -> str | None:
    """Why this session must not have batches; None where each row keeps the gates and has the same bits whatever is beside it."""
    if known.towers.quantises(name):
        return "a batch shares its scales: it quantises its activations as a whole"
    inputs = many(towers_of(known, name, session, batch), known, name)
    try:
        alone, together = (way(known, name, of, size)() for of, size in ((known._sessions[name], None), (session, batch)))
        figures = {"tensors": {name: tensor_difference(np.stack(alone), np.stack(together))}, "answers": None}
        if missed := [text for part in misses(known.manifest.precision, figures).values() for text in part]:
            return f"in batches {'; '.join(missed)}"
        return "a row of a batch changes with the others" if sees_others(name, session, batch, inputs) else None
    except PmclipError as error:  # an engine or a graph that takes no batch
        return error.message


def sees_others(name: str, session: Session, batch: int, inputs: Inputs) -> bool:
    """Whether a bit of a row changes with the rows beside it, or with their number."""
    batches = TunedBatches(session, batch, fills=name == "image")
    for _, group in groupby(sorted(inputs, key=np.shape), key=np.shape):
        same = list(group)
        rows = {id(x): row for x, row in zip(same, batches.run(same), strict=True)}
        for others in (same[::-1], same[:1], same[-1:], [*same[3:], *same[:3]], same[1:9]):
            if not all(np.array_equal(rows[id(x)], row) for x, row in zip(others, batches.run(others), strict=True)):
                return True
    return False
