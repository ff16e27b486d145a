"""What `doctor --ward` tells: whether `serve` would start on this machine."""

import socket
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from pmclip_deploy.errors import PmclipError
from pmclip_deploy.extras import step_to_install

MODULES = {  # of the extra `ward`, by the name of the package
    "highdicom": "highdicom",
    "fastapi": "fastapi",
    "uvicorn": "uvicorn",
    "python-multipart": "multipart",
    "prometheus-client": "prometheus_client",
    "fastapi-offline": "fastapi_offline",
}
PORT = 8765


def ward() -> dict[str, Any]:
    """The packages, the port, and whether a decoding process starts. ``problem`` is None where all is well."""
    packages = {name: _version(name) for name in MODULES}
    missing = [name for name, module in MODULES.items() if find_spec(module) is None]
    reader = "not tried" if missing else _reader()
    problem = f"not installed: {', '.join(missing)}; {step_to_install('ward')}" if missing else None
    if problem is None and reader != "starts":
        problem = f"the process that decodes does not start: {reader}"
    return {"packages": packages, "port": PORT, "port_is_free": _is_free(PORT), "reader": reader, "problem": problem}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _reader() -> str:
    from pmclip_deploy.serve.readers import START_S, Reader
    from pmclip_deploy.serve.settings import Settings

    reader = Reader(Settings("-").reader_memory)
    try:
        reader.call(START_S, "warm_up")
    except Exception as error:
        return str(error) if isinstance(error, PmclipError) else type(error).__name__
    finally:
        reader.close()
    return "starts"
