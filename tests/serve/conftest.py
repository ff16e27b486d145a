"""One service for all tests of a file."""

from collections.abc import Iterator

import pytest

from tests.serve.running import Running, running
from tests.serve.watcher import Watcher

NEEDS = "serving needs the extra `ward`"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    for name in ("fastapi", "uvicorn", "multipart", "prometheus_client"):
        pytest.importorskip(name, reason=NEEDS)
    with running(tmp_path_factory.mktemp("serve")) as started:
        yield started


@pytest.fixture
def watched(service: Running) -> Iterator[Running]:
    """The service while somebody else uses it."""
    with Watcher(service):
        yield service
    assert service.client.get("/health/ready").status_code == 200
