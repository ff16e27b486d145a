"""What a node tells a monitor, on loopback: /metrics for Prometheus, /live and /ready. No label comes from a peer."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from pmclip_deploy.answer import ModelInfo
from pmclip_deploy.node.ledger import Ledger
from pmclip_deploy.node.receive import Receiver
from pmclip_deploy.node.settings import Ward
from pmclip_deploy.serve.metrics import expiry_of

Start = Callable[..., Any]


class Facts(Collector):
    """Read from the ledger with each scrape."""

    def __init__(self, ward: Ward, ledger: Ledger, receiver: Receiver, model: ModelInfo) -> None:
        self.ward, self.ledger, self.receiver, self.model = ward, ledger, receiver, model

    def collect(self) -> Iterator[Any]:
        for table, states in self.ledger.counts().items():
            name = {"image": "pmclip_images", "job": "pmclip_jobs", "delivery": "pmclip_deliveries"}[table]
            family = GaugeMetricFamily(name, "Rows of the ledger.", labels=["state"])
            for state, count in states.items():
                family.add_metric([state], count)
            yield family
        oldest = GaugeMetricFamily("pmclip_queue_oldest_seconds", "Age of the oldest job that is not done.", labels=["state"])
        for state, since in self.ledger.oldest().items():
            oldest.add_metric([state], max(time.time() - since, 0))
        yield oldest
        yield CounterMetricFamily("pmclip_dicom_copies", "Images that came again with the same bytes.", value=self.ledger.copies())
        stored = CounterMetricFamily("pmclip_dicom_stored", "Answers to C-STORE since the start.", labels=["status"])
        for status, count in sorted(self.receiver.statuses.items()):
            stored.add_metric([f"{status:04X}"], count)
        yield stored
        yield GaugeMetricFamily("pmclip_dicom_associations", "Associations that are open.", value=self.receiver.associations)
        yield GaugeMetricFamily("pmclip_disk_free_bytes", "Free space where the state lies.", value=shutil.disk_usage(self.ward.state).free)
        tls = self.ward.node.tls
        if (expiry := expiry_of(None if tls is None else tls.cert)) is not None:
            yield GaugeMetricFamily("pmclip_cert_expiry_seconds", "Time until the certificate expires.", value=expiry - time.time())
        model = self.model
        info = GaugeMetricFamily("pmclip_model_info", "The model that answers.", labels=["bundle", "version", "precision", "sha256"])
        info.add_metric([model.bundle, model.version, model.precision, model.sha256], 1)
        yield info


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Silent(WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Nothing: a line would go to standard error, and hold what a client sent."""


def serve(facts: Facts, faults_of: Callable[[], list[str]], port: int) -> int:
    """Answers on 127.0.0.1 in a thread of its own, and returns the port. Raises OSError."""
    registry = CollectorRegistry()
    registry.register(facts)
    metrics = make_wsgi_app(registry, disable_compression=True)

    def app(environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path == "/metrics":
            answered: Iterable[bytes] = metrics(environ, start)
            return answered
        if path in ("/live", "/ready"):
            faults = faults_of() if path == "/ready" else []
            start("503 Service Unavailable" if faults else "200 OK", [("Content-Type", "application/json")])
            return [json.dumps({"ready": not faults, "reasons": faults} if path == "/ready" else {"live": True}).encode()]
        start("404 Not Found", [("Content-Type", "text/plain")])
        return [b"there are /metrics, /live and /ready\n"]

    server = make_server("127.0.0.1", port, app, _Server, _Silent)
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return int(server.server_address[1])
