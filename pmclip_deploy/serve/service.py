"""The parts of a running service, and what a request passes through."""

import secrets
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from fastapi import Request
from fastapi.responses import Response
from numpy.typing import NDArray

from pmclip_deploy.answer import Answer
from pmclip_deploy.decision.listed import questions_listed
from pmclip_deploy.errors import UsageError
from pmclip_deploy.header.read import ADULT
from pmclip_deploy.imaging.elements import Window
from pmclip_deploy.imaging.picture import Picture
from pmclip_deploy.predictor import Predictor
from pmclip_deploy.serve.documents import Asked, model_document
from pmclip_deploy.serve.guard import MOST_HELD, Places
from pmclip_deploy.serve.images import Images
from pmclip_deploy.serve.metrics import Metrics
from pmclip_deploy.serve.model import Model
from pmclip_deploy.serve.readers import Readers
from pmclip_deploy.serve.settings import Settings

if TYPE_CHECKING:
    from pmclip_deploy.search.index import Index

T = TypeVar("T")


class Service:
    """What the routes share."""

    def __init__(self, predictor: Predictor, settings: Settings, index: "Index | None" = None) -> None:
        self.settings, self.index = settings, index
        self.places, self.images = Places(settings.queue, MOST_HELD * settings.max_upload), Images()
        self.readers = Readers(settings.readers, settings.reader_memory, settings.timeout_s)
        self.model = Model(predictor, settings.threads, settings.readers, settings.timeout_s)
        self.metrics = Metrics(predictor.model, settings.tls_cert)
        self.document = model_document(predictor, settings, questions_listed(predictor.manifest), index is not None)
        self.salt = secrets.token_bytes(16)  # of the numbers of series
        self.is_warm = False

    async def open(self) -> None:
        self.model.open()
        await self.readers.open()
        await self.model.run(_blank, _warm_up, _never)
        self.is_warm = True

    def close(self) -> None:
        self.model.close()
        self.readers.close()

    def why_not_ready(self) -> list[str]:
        checks = {
            "the model is being loaded": not self.is_warm,
            "the service is ending": self.places.is_closing,
            "no decoding process runs": self.is_warm and not self.readers.are_ready,
        }
        return [why for why, holds in checks.items() if holds]

    async def answers(self, request: Request, data: bytes, asked: Asked) -> list[Answer]:
        child = None if asked.age is None else asked.age < ADULT
        work = partial(_ask, questions=asked.questions, ignore_header=asked.ignore_header, child=child)
        answers = await self.look(request, data, asked.frame, asked.window, work)
        self.metrics.count(answers)
        return answers

    async def report(self, data: bytes, answers: list[Answer]) -> Response:
        made = await self.readers.call("report", data, answers)
        return Response(made, media_type="application/dicom", headers={"Content-Disposition": 'attachment; filename="report.dcm"'})

    async def look(
        self, request: Request, data: bytes, frame: int | None, window: Window | None, work: Callable[[Predictor, Picture], T]
    ) -> T:
        """What ``work`` makes of the predictor and the picture of a file."""
        return await self.model.run(partial(self.readers.call, "picture", data, frame, window), work, request.is_disconnected)

    def seen(self, route: str, status: int, seconds: float) -> None:
        self.metrics.requests.labels(route, status).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        if status in (401, 403, 408, 413, 503, 504):
            self.metrics.rejected.labels({401: "token", 403: "host", 408: "slow", 413: "size", 503: "busy", 504: "timeout"}[status]).inc()

    def gauges(self) -> None:
        self.metrics.queue.labels("accepted").set(self.places.taken)
        self.metrics.queue.labels("model").set(self.model.waiting)
        self.metrics.images.set(len(self.images))
        self.metrics.restarts.set(self.readers.restarts)


def _ask(predictor: Predictor, picture: Picture, *, questions: list[str], ignore_header: bool, child: bool | None) -> list[Answer]:
    return predictor.ask_many(picture, questions, ignore_header=ignore_header, child=child)


async def _blank() -> NDArray[np.uint8]:
    return np.tile(np.arange(256, dtype=np.uint8), (256, 1))


def _warm_up(predictor: Predictor, blank: NDArray[np.uint8]) -> None:
    """One picture through every graph that answers, so that the first request waits for nothing."""
    with suppress(UsageError):  # a bundle that answers no question
        predictor.ask_many(blank, list(predictor.questions()[:8]) or ["what is shown?"])
    predictor.embed_image(blank)


async def _never() -> bool:
    return False
