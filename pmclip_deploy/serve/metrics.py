"""Counters for Prometheus. No label comes from a request's content."""

import ssl
import time
from importlib.metadata import version
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from pmclip_deploy.answer import Answer, ModelInfo

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


def expiry_of(certificate: Path | None) -> float | None:
    """The time at which a certificate, a PEM file, expires; None without one, or where it cannot be read."""
    if certificate is None:
        return None
    try:
        decoded = ssl._ssl._test_decode_cert(str(certificate))  # type: ignore[attr-defined]  # the standard library's one reader
        return ssl.cert_time_to_seconds(decoded["notAfter"])
    except (OSError, ValueError, KeyError, AttributeError):
        return None


class Metrics:
    """One registry a service."""

    def __init__(self, model: ModelInfo, certificate: Path | None = None) -> None:
        self.registry = CollectorRegistry()
        of = self.registry
        self.requests = Counter("pmclip_http_requests", "Requests by route and status.", ["route", "status"], registry=of)
        self.seconds = Histogram(
            "pmclip_http_seconds", "Seconds from a request's first byte to its reply.", ["route"], buckets=SECONDS, registry=of
        )
        self.infer = Histogram("pmclip_infer_seconds", "Seconds of each step of an answer.", ["stage"], buckets=SECONDS, registry=of)
        self.queue = Gauge("pmclip_queue_depth", "Pictures that were accepted and are not answered yet.", ["queue"], registry=of)
        self.rejected = Counter("pmclip_rejected", "Requests that were turned away.", ["reason"], registry=of)
        self.answers = Counter("pmclip_answers", "Answers by kind of question.", ["kind", "abstained"], registry=of)
        self.images = Gauge("pmclip_images", "Pictures that are held in memory.", registry=of)
        self.restarts = Gauge("pmclip_reader_restarts", "Decoding processes that ended and were replaced.", registry=of)
        if (expiry := expiry_of(certificate)) is not None:
            left = Gauge("pmclip_cert_expiry_seconds", "Seconds until the TLS certificate expires.", registry=of)
            left.set_function(lambda: expiry - time.time())
        info = Gauge("pmclip_model_info", "The model that answers.", ["bundle", "version", "precision", "sha256", "program"], registry=of)
        info.labels(model.bundle, model.version, model.precision, model.sha256, version("pmclip-deploy")).set(1)

    def count(self, answers: list[Answer]) -> None:
        for answer in answers:
            kind = answer.understood_as.kind if answer.understood_as else "head"
            self.answers.labels(kind, str(answer.abstained).lower()).inc()
        for stage, milliseconds in (answers[0].timings_ms if answers else {}).items():
            self.infer.labels(stage).observe(milliseconds / 1e3)

    def text(self) -> bytes:
        return generate_latest(self.registry)
