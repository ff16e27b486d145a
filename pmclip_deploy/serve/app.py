"""The routes."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib import resources
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import FastAPI, File, Form, Query, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from pmclip_deploy.answer import Answer
from pmclip_deploy.decision.evidence import findings_of
from pmclip_deploy.errors import InputError, PmclipError, UsageError
from pmclip_deploy.files import JPEG, PNG
from pmclip_deploy.imaging.elements import Window
from pmclip_deploy.imaging.values import ColorFrame
from pmclip_deploy.serve.documents import (
    LONGEST_QUESTION,
    MOST_LABELS,
    MOST_QUESTIONS,
    Asked,
    Number,
    Similar,
    Width,
    described_document,
    values_response,
)
from pmclip_deploy.serve.guard import LOG, Guard
from pmclip_deploy.serve.problems import DESCRIPTION, Problem, of_error
from pmclip_deploy.serve.service import Service
from pmclip_deploy.spec import ANSWERS_SCHEMA, CLASSIFICATIONS_SCHEMA, SEARCH_SCHEMA

PAGE = FilePath(str(resources.files("pmclip_deploy.serve") / "page"))
THUMBNAIL = 96  # pixels

Questions = Annotated[
    list[Annotated[str, Form(min_length=1, max_length=LONGEST_QUESTION)]],
    Form(min_length=1, max_length=MOST_QUESTIONS, description="One or more questions."),
]
Labels = Annotated[
    list[Annotated[str, Form(min_length=1, max_length=LONGEST_QUESTION)]],
    Form(min_length=2, max_length=MOST_LABELS, description="The labels to choose among."),
]
Image = Annotated[UploadFile, File(description="A DICOM, PNG or JPEG file.")]
FrameField = Annotated[int | None, Form(ge=0, lt=1 << 31, description="Frame of a multi-frame file, from 0. Default: the middle one.")]
CenterField = Annotated[Number | None, Form(description="Window center, in modality units.")]
WidthField = Annotated[Width | None, Form(description="Window width, in modality units.")]
AgeField = Annotated[int | None, Form(ge=0, le=150, description="Age of the patient in years, if the file does not give it.")]


def app_of(service: Service) -> Guard:
    """The service as an ASGI application."""
    from importlib.metadata import version

    from starlette.formparsers import MultiPartParser

    MultiPartParser.spool_max_size = service.settings.max_upload + 1  # an upload is never written to a temporary file

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            await service.open()
        except Exception as error:
            LOG.error("not started", extra={"facts": {"why": of_error(error).detail}})
            raise
        yield
        service.close()

    app = FastAPI(
        title="pmclip-deploy",
        version=version("pmclip-deploy"),
        description="Questions about radiology images, answered on this machine. Research use only; not a medical device.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        responses={"4XX": DESCRIPTION, "5XX": DESCRIPTION},
    )
    for error in (PmclipError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(error, _raise)
    _health(app, service)
    _answers(app, service)
    _images(app, service)
    _page(app)
    return Guard(app, service.settings, service.places, service.seen)


def _health(app: FastAPI, service: Service) -> None:
    @app.get("/health/live", tags=["health"])
    async def live() -> dict[str, str]:
        """200 as long as the service runs."""
        return {"status": "ok"}

    @app.get("/health/ready", tags=["health"])
    async def ready() -> JSONResponse:
        """200 if questions can be asked now, else 503 with the reasons."""
        why = service.why_not_ready()
        return JSONResponse({"ready": not why, "why": why}, 503 if why else 200)

    @app.get("/metrics", tags=["health"], response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counters in Prometheus' text format."""
        service.gauges()
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/model", tags=["model"])
    async def model() -> dict[str, Any]:
        """The model, what can be asked of it, what each answer is worth, and the service's limits."""
        return service.document


def _answers(app: FastAPI, service: Service) -> None:
    @app.post("/v1/answers", tags=["questions"], responses={200: {"content": {"application/dicom": {}}}})
    async def answers(
        request: Request,
        image: Image,
        questions: Questions,
        frame: FrameField = None,
        window_center: CenterField = None,
        window_width: WidthField = None,
        age: AgeField = None,
        ignore_header: Annotated[bool, Form(description="Answer from the picture alone.")] = False,
        format: Annotated[Literal["json", "sr"], Form(description="sr gives a Structured Report, as `infer --sr`.")] = "json",
    ) -> Response:
        """Answers questions about one picture, as `pmclip-deploy infer --json` does."""
        window, data = _window(window_center, window_width), await _file(request, image)
        asked = Asked(questions=questions, frame=frame, window=window, age=age, ignore_header=ignore_header)
        made = await service.answers(request, data, asked)
        return await service.report(data, made) if format == "sr" else _answers_document(made)

    @app.post("/v1/classify", tags=["questions"])
    async def classify(
        request: Request,
        image: Image,
        labels: Labels,
        frame: FrameField = None,
        window_center: CenterField = None,
        window_width: WidthField = None,
    ) -> JSONResponse:
        """Compares one picture with labels, as `pmclip-deploy classify --json` does."""
        window, data = _window(window_center, window_width), await _file(request, image)
        made = await service.look(request, data, frame, window, lambda p, picture: p.classify(picture, labels))
        return JSONResponse({"schema": CLASSIFICATIONS_SCHEMA, "classifications": [made.to_json()], "unreadable": [], "no_pictures": []})


def _images(app: FastAPI, service: Service) -> None:
    @app.post("/v1/images", status_code=201, tags=["pictures"])
    async def add(request: Request, image: Image) -> JSONResponse:
        """Keeps a picture in memory for a while, for the calls below."""
        data = await _file(request, image)
        described = await service.readers.call("described", data, service.salt)
        return JSONResponse(described_document(service.images.add(data), *described), 201)

    @app.get("/v1/images/{image_id}/frames/{frame}", tags=["pictures"], response_class=Response)
    async def values(request: Request, image_id: str, frame: int) -> Response:
        """A frame: 16-bit samples of a grayscale picture (`application/octet-stream`), or a PNG file of a colour picture."""
        shown = await service.readers.call("frame_values", service.images.get(image_id), _index(frame))
        if isinstance(shown, ColorFrame):
            return Response(await service.readers.call("png", service.images.get(image_id), _index(frame), None), media_type="image/png")
        gzipped = "gzip" in request.headers.get("accept-encoding", "") and shown.samples.size < 1 << 20
        return await asyncio.to_thread(values_response, shown, gzipped)

    @app.get("/v1/images/{image_id}/frames/{frame}/table", tags=["pictures"], response_class=Response)
    async def table(
        image_id: str,
        frame: int,
        center: Annotated[Number | None, Query()] = None,
        width: Annotated[Width | None, Query()] = None,
    ) -> Response:
        """The gray level of each of the 65,536 samples: as the file is shown, or through a window."""
        data, window = service.images.get(image_id), _window(center, width)
        made: Any = await service.readers.call("table", data, _index(frame), window)
        if not made.size:
            raise UsageError("this picture takes no window, and has no table", "show its frame as it is")
        return Response(made.astype(np.uint8).tobytes(), media_type="application/octet-stream")

    @app.get("/v1/images/{image_id}/thumbnail", tags=["pictures"], response_class=Response)
    async def thumbnail(image_id: str) -> Response:
        """A small PNG file of the middle frame."""
        return Response(await service.readers.call("png", service.images.get(image_id), None, None, THUMBNAIL), media_type="image/png")

    @app.post("/v1/images/{image_id}/answers", tags=["pictures"])
    async def ask(request: Request, image_id: str, asked: Asked) -> JSONResponse:
        """Answers questions about a picture that is kept."""
        return _answers_document(await service.answers(request, service.images.get(image_id), asked))

    @app.post("/v1/images/{image_id}/report", tags=["pictures"], response_class=Response)
    async def report(request: Request, image_id: str, asked: Asked) -> Response:
        """Answers questions about a picture that is kept, as a Structured Report (DICOM)."""
        data = service.images.get(image_id)
        return await service.report(data, await service.answers(request, data, asked))

    @app.get("/v1/images/{image_id}/patient", tags=["pictures"])
    async def patient(image_id: str) -> JSONResponse:
        """The patient's name and id and the date of the study, for a page whose user asked to see them."""
        data = service.images.get(image_id)
        return JSONResponse({} if data.startswith((PNG, JPEG)) else await service.readers.call("patient", data))

    @app.post("/v1/images/{image_id}/similar", tags=["pictures"])
    async def similar(request: Request, image_id: str, wanted: Similar) -> JSONResponse:
        """The ids of the pictures of the index that are most alike. No picture of it is served."""
        data, index = service.images.get(image_id), service.index
        if index is None:
            raise Problem(409, "no_index", "the service was started without --index")
        found = await service.look(request, data, wanted.frame, wanted.window, lambda p, image: p.search(index, image=image, k=wanted.k))
        return JSONResponse({"schema": SEARCH_SCHEMA, "matches": [match.to_json() for match in found]})

    @app.get("/v1/images/{image_id}/view", tags=["pictures"], response_class=Response)
    async def view(
        request: Request,
        image_id: str,
        finding: Annotated[str | None, Query(max_length=60)] = None,
        frame: Annotated[int | None, Query(ge=0, lt=1 << 31)] = None,
        center: Annotated[Number | None, Query()] = None,
        width: Annotated[Width | None, Query()] = None,
    ) -> Response:
        """A PNG file of the picture as the model saw it; with a finding, of where it looked, if its map passed validation."""
        known = [found.name for found in findings_of(service.model.predictor.manifest)]
        if finding is not None and finding not in known:
            raise UsageError("the bundle has no such finding", f"it has {', '.join(known) or 'none'}")
        data, window = service.images.get(image_id), _window(center, width)
        pixels = await service.look(request, data, frame, window, lambda p, picture: p.model_view(picture, finding))
        return Response(await asyncio.to_thread(_png, pixels), media_type="image/png")

    @app.delete("/v1/images/{image_id}", status_code=204, tags=["pictures"])
    async def remove(image_id: str) -> Response:
        """Forgets a picture."""
        service.images.remove(image_id)
        return Response(status_code=204)

    @app.delete("/v1/images", status_code=204, tags=["pictures"])
    async def remove_all() -> Response:
        """Forgets all pictures."""
        service.images.clear()
        return Response(status_code=204)


def _page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def index() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> FileResponse:
        return FileResponse(PAGE / "docs.html")

    with suppress(ModuleNotFoundError):
        swagger = FilePath(str(resources.files("fastapi_offline") / "static"))
        app.mount("/page/swagger", StaticFiles(directory=swagger))
    app.mount("/page", StaticFiles(directory=PAGE))


async def _raise(request: Request, error: Exception) -> Response:
    """The guard answers: it knows the request's id."""
    if isinstance(error, RequestValidationError):
        raise Problem(400, "usage", _what_is_wrong(error)) from None
    if isinstance(error, HTTPException) and error.status_code == 405:  # the router names the methods of one route, and a path may have two
        path, routes = request.url.path, [route for route in request.app.routes if isinstance(route, APIRoute)]
        methods = {method for route in routes if route.path_regex.match(path) for method in route.methods or ()}
        raise HTTPException(405, headers={"Allow": ", ".join(sorted(methods))})
    raise error


def _what_is_wrong(error: RequestValidationError) -> str:
    """The first field that does not fit, without what was sent."""
    first = error.errors()[0]
    if first["type"] == "extra_forbidden":
        return "the body: has a field that is not known"
    if first["type"] in ("model_attributes_type", "json_invalid"):
        return "the body: is no JSON object; send one, with `Content-Type: application/json`"
    if first["loc"] == ("body", "image") and first["type"] == "value_error":
        return "image: is text; send the file itself, as `curl -F image=@FILE` does"
    field = ".".join(str(part) for part in first["loc"][1:] if isinstance(part, int) or part.replace("_", "").isalnum())
    return f"{field[:60] or 'the body'}: {first['msg']}"


async def _file(request: Request, image: UploadFile) -> bytes:
    """The file of a form. Raises UsageError for a field that would be left out: an unknown one, or a second one."""
    sent = Counter(name for name, _ in (await request.form()).multi_items())
    known = {field.alias for field in request.scope["route"].dependant.body_params}
    if sent.keys() - known:
        raise UsageError("the form has a field that is not known", f"the fields are {', '.join(sorted(known))}")
    twice = sorted(name for name, count in sent.items() if count > 1 and name not in ("questions", "labels"))
    if twice:
        raise UsageError(f"the form has more than one {twice[0]}", "send one picture a request")
    data = await image.read()
    await image.close()  # the form would hold a second copy until the answer
    return data


def _answers_document(answers: list[Answer]) -> JSONResponse:
    return JSONResponse(
        {"schema": ANSWERS_SCHEMA, "answers": [answer.to_json() for answer in answers], "unreadable": [], "no_pictures": []}
    )


def _window(center: float | None, width: float | None) -> Window | None:
    if (center is None) != (width is None):
        raise UsageError("a window is a center and a width", "give both, or none")
    return None if center is None or width is None else (center, width)


def _index(frame: int) -> int:
    if not 0 <= frame < 1 << 31:
        raise InputError("there is no such frame", "count from 0")
    return frame


def _png(pixels: Any) -> bytes:
    import io

    import PIL.Image

    out = io.BytesIO()
    PIL.Image.fromarray(pixels).save(out, "PNG", compress_level=1)
    return out.getvalue()
