"""What goes over the wire: bodies of requests, documents of replies."""

import gzip
from typing import Annotated, Any

from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from pmclip_deploy.decision.evidence import findings_of
from pmclip_deploy.imaging.elements import Window
from pmclip_deploy.imaging.picture import Picture
from pmclip_deploy.imaging.values import GrayFrame
from pmclip_deploy.predictor import Predictor
from pmclip_deploy.serve.images import EXPIRES_S
from pmclip_deploy.serve.reading import Place
from pmclip_deploy.serve.settings import Settings

MOST_QUESTIONS, LONGEST_QUESTION, MOST_LABELS = 32, 512, 100
PRESETS = {  # Hounsfield units
    "CT": (("soft tissue", 40, 400), ("lung", -600, 1500), ("bone", 400, 1800), ("brain", 40, 80), ("abdomen", 60, 350)),
}
Text = Annotated[str, Field(min_length=1, max_length=LONGEST_QUESTION)]
Number = Annotated[float, Field(allow_inf_nan=False, ge=-1e9, le=1e9)]
Width = Annotated[float, Field(allow_inf_nan=False, gt=0, le=1e9)]


class Asked(BaseModel):
    """Questions about a picture that is held in memory."""

    model_config = ConfigDict(extra="forbid")

    questions: Annotated[list[Text], Field(min_length=1, max_length=MOST_QUESTIONS)]
    frame: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    window: tuple[Number, Width] | None = None
    age: Annotated[int, Field(ge=0, le=150)] | None = None
    ignore_header: bool = False


class Similar(BaseModel):
    """How many rows of the index are wanted."""

    model_config = ConfigDict(extra="forbid")

    k: Annotated[int, Field(ge=1, le=100)] = 8
    frame: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    window: tuple[Number, Width] | None = None


def model_document(predictor: Predictor, settings: Settings, questions: list[dict[str, Any]], has_index: bool) -> dict[str, Any]:
    manifest, model = predictor.manifest, predictor.model
    return {
        "schema": "pmclip-deploy/model/1",
        "bundle": model.bundle,
        "version": model.version,
        "precision": model.precision,
        "backend": model.backend,
        "device": model.device,
        "sha256": model.sha256,
        "notes": list(predictor.notes),
        "research_use_only": "Research use only; not a medical device.",
        "questions": questions,
        "kinds": [{"name": kind.name, "threshold": kind.threshold, "reason": kind.reason} for kind in manifest.kinds],
        "labels": list(manifest.labels),
        "similar": has_index,
        "maps": [finding.name for finding in findings_of(manifest) if finding.map_hits is not None],
        "limits": {
            "questions": MOST_QUESTIONS,
            "question_characters": LONGEST_QUESTION,
            "labels": MOST_LABELS,
            "upload_bytes": settings.max_upload,
            "queue": settings.queue,
            "timeout_s": settings.timeout_s,
        },
    }


def described_document(name: str, picture: Picture, windows: tuple[Window, ...], place: Place) -> dict[str, Any]:
    """Of a picture that was sent. No text of the file's own is in it."""
    info = picture.info
    own = [{"name": "file" if i == 0 else f"file {i + 1}", "center": c, "width": w} for i, (c, w) in enumerate(windows[:4])]
    presets = [{"name": title, "center": c, "width": w} for title, c, w in PRESETS.get(info.modality or "", ())]
    return {
        "schema": "pmclip-deploy/image/1",
        "id": name,
        "format": info.format,
        "modality": info.modality,
        "photometric": info.photometric,
        "frame": info.frame,
        "frames": info.frames,
        "rows": info.rows,
        "columns": info.columns,
        "window": info.window,
        "windows": own + presets if info.window is not None else [],
        "series": place.series,
        "order": place.order,
        "spacing": _spacing_document(place),
        "warnings": list(info.warnings),
        "expires_s": EXPIRES_S,
    }


def _spacing_document(place: Place) -> dict[str, Any] | None:
    if place.spacing is None:
        return None
    return {"row_mm": place.spacing[0], "column_mm": place.spacing[1], "at": "detector" if place.at_detector else "patient"}


def values_response(shown: GrayFrame, gzipped: bool) -> Response:
    """The samples of a grayscale frame, 16-bit little endian, row by row."""
    body = shown.samples.astype("<u2").tobytes()
    rows, columns = shown.samples.shape
    headers = {
        "X-Rows": str(rows),
        "X-Columns": str(columns),
        "X-Slope": repr(float(shown.slope)),
        "X-Intercept": repr(float(shown.intercept)),
        "X-Polarity": "INVERSE" if shown.inverse else "IDENTITY",
        "X-Function": shown.function,
        "X-Frame": str(shown.info.frame),
        "X-Window": "" if shown.info.window is None else "{!r} {!r}".format(*map(float, shown.info.window)),
        "Vary": "Accept-Encoding",
    }
    if gzipped:
        body, headers["Content-Encoding"] = gzip.compress(body, 1), "gzip"
    return Response(body, media_type="application/octet-stream", headers=headers)
