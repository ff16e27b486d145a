"""A Ray cluster: this process's own on loopback, or one that runs."""

import logging
import os
import secrets
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pmclip_deploy.errors import DeviceError, PmclipError, UsageError
from pmclip_deploy.process import native_stderr_off

TOKEN = secrets.token_hex(32)  # of this process's clusters, so that no other user of the machine enters them; Ray reads it once
REACHED_S = 10.0  # for a connection to a cluster


@contextmanager
def ray_cluster(address: str | None, next_step: str) -> Iterator[Any]:
    """The module ``ray``, connected. Without ``address`` it is a cluster of this process, on loopback alone, and ends with it.

    What Ray raises becomes a PmclipError of one line, with ``next_step`` unless a worker raised one for a person. Raises DeviceError where
    no cluster takes this process in, and UsageError where others imported ray before the process's own cluster.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    options: dict[str, Any] = {"address": address}
    if address is None:
        if "ray" in sys.modules and os.environ.get("RAY_AUTH_TOKEN") != TOKEN:  # Ray reads what follows when it is imported
            raise UsageError("ray was imported already, and would listen on every interface", "start this cluster before `import ray`")
        options = {"address": "local", "include_dashboard": False}  # whatever RAY_ADDRESS says
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # there and here: no address but 127.0.0.1
        os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"] = "token", TOKEN
    else:
        _reach(address)
    import ray

    logging.getLogger("ray").setLevel(logging.CRITICAL)
    ray._private.worker.print_to_stdstream = lambda *_, **__: None  # what is tried again: Ray prints it on standard output
    try:
        _join(ray, options)
        yield ray
    except ray.exceptions.RayError as error:
        raise _told(error, ray.exceptions.RayError, next_step) from None
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Raises DeviceError soon; Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), REACHED_S).close()
    except (OSError, ValueError, OverflowError):
        raise _not_joined(address) from None


def _join(ray: Any, options: dict[str, Any]) -> None:
    try:
        with native_stderr_off():  # where it writes each attempt
            ray.init(**options, log_to_driver=False, configure_logging=False)
    except (OSError, ValueError):
        raise _not_joined(options["address"]) from None


def _not_joined(address: str) -> DeviceError:
    hint = "check --ray-address, and that both have the same token (RAY_AUTH_MODE, ~/.ray/auth_token)"
    return DeviceError(f"{address}: no Ray cluster took this process in", hint)


def _told(error: BaseException, of_ray: type[BaseException], next_step: str) -> PmclipError:
    """What a worker raised, if it was for a person. Ray makes an error that is of both kinds, with the worker's traceback in its text."""
    cause: BaseException | None = error
    while cause is not None and (isinstance(cause, of_ray) or not isinstance(cause, PmclipError)):
        cause = getattr(cause, "cause", None) or cause.__cause__
    return cause or PmclipError(f"ray: {type(error).__name__}", next_step)
