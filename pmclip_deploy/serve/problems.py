"""Errors as RFC 9457 documents: the status of HTTP, with the code, the exit code and the words of the command line."""

from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException

from pmclip_deploy.errors import BundleError, DeviceError, InputError, NoPictureError, PmclipError, UsageError

STATUS = {UsageError: 400, NoPictureError: 415, InputError: 422, BundleError: 500, DeviceError: 503}
MEDIA_TYPE = "application/problem+json"
FIELDS = {**dict.fromkeys(("type", "title", "detail", "code", "request_id"), "string"), **dict.fromkeys(("status", "exit_code"), "integer")}
DESCRIPTION: dict[str, Any] = {  # of every error, in /openapi.json
    "description": "What is wrong, and what to do next.",
    "content": {MEDIA_TYPE: {"schema": {
        "type": "object", "required": list(FIELDS), "properties": {name: {"type": kind} for name, kind in FIELDS.items()},
    }}},
}  # fmt: skip
OF_ROUTER = {404: "there is no such path; /docs lists the paths", 405: "the path takes another method; /docs lists the methods"}


class Problem(HTTPException):
    """A refusal of the service itself."""

    def __init__(self, status: int, code: str, detail: str, **headers: str) -> None:
        super().__init__(status, detail, {name.replace("_", "-"): value for name, value in headers.items()})
        self.code = code

    def __reduce__(self) -> Any:
        return Problem, (self.status_code, self.code, self.detail)


def busy(detail: str = "the queue is full") -> Problem:
    return Problem(503, "busy", f"{detail}; try again in a second", Retry_After="1")


def of_error(error: BaseException) -> Problem:
    """What a client is told of any error. Of one that is not ours only its type: its message may quote a file."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, PmclipError):
        status = next((status for of, status in STATUS.items() if isinstance(error, of)), 500)
        problem = Problem(status, error.code, str(error))
        problem.exit_code = error.exit_code  # type: ignore[attr-defined]
        return problem
    if isinstance(error, HTTPException) and error.status_code == 400:  # of the parsers of bodies, whose words may quote one
        return Problem(400, UsageError.code, "the body cannot be parsed; send what its Content-Type says")
    if isinstance(error, HTTPException):  # of the router
        detail = OF_ROUTER.get(error.status_code, HTTPStatus(error.status_code).phrase)
        return Problem(error.status_code, "http", detail, **(error.headers or {}))
    return Problem(500, "error", f"internal: {type(error).__name__}")


def document(problem: Problem, request_id: str) -> dict[str, Any]:
    return {
        "type": "about:blank",
        "title": HTTPStatus(problem.status_code).phrase,
        "status": problem.status_code,
        "detail": problem.detail,
        "code": problem.code,
        "exit_code": getattr(problem, "exit_code", {400: 2, 415: 3, 422: 3}.get(problem.status_code, 1)),
        "request_id": request_id,
    }
