"""What a service is started with."""

import os
import stat
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from pmclip_deploy.errors import UsageError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
SHORTEST_TOKEN = 16  # characters


@dataclass(frozen=True)
class Settings:
    """Options of `pmclip-deploy serve`."""

    token: str = field(repr=False)
    host: str = "127.0.0.1"
    port: int = 8765
    names: tuple[str, ...] = ()  # that Host may have beside those of LOOPBACK
    tls_cert: Path | None = None
    tls_key: Path | None = None
    client_ca: Path | None = None
    queue: int = 64  # pictures that are accepted and not answered yet
    threads: int = 1  # pictures that are computed side by side
    timeout_s: float = 30.0
    max_upload: int = 256 << 20  # bytes
    readers: int = 3  # processes that decode: one may be busy with a hostile file and another one starting; the third serves
    reader_memory: int = 4 << 30  # bytes of address space of each
    index: Path | None = None

    @property
    def hosts(self) -> frozenset[str]:
        return frozenset(name.lower() for name in (*LOOPBACK, *self.names))

    @property
    def url(self) -> str:
        shown = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls_cert else 'http'}://{shown}:{self.port}/"

    def check(self) -> None:
        """Raises UsageError for what is not safe to start."""
        if (self.tls_cert is None) != (self.tls_key is None):
            raise UsageError("--tls-cert and --tls-key go together", "give both files")
        if self.client_ca is not None and self.tls_cert is None:
            raise UsageError("--client-ca needs TLS", "give --tls-cert and --tls-key too")
        for option, path in (("--tls-cert", self.tls_cert), ("--tls-key", self.tls_key), ("--client-ca", self.client_ca)):
            if path is not None and not path.is_file():
                raise UsageError(f"{option} {path}: no such file", "check the path")
        if not is_loopback(self.host) and self.tls_cert is None:
            raise UsageError(f"--host {self.host} can be reached from other machines, and needs TLS", "give --tls-cert and --tls-key")


def is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def token_from_file(path: Path) -> str:
    """The first line of a file that only its owner can read. Raises UsageError."""
    try:
        mode, text = path.stat().st_mode, path.read_text("ascii")
    except (OSError, ValueError):
        raise UsageError(f"{path}: the token cannot be read", "give a text file with the token in its first line") from None
    others = 0o037 if str(path.parent) == os.environ.get("CREDENTIALS_DIRECTORY") else 0o077  # systemd may give the unit's user an ACL
    if os.name != "nt" and stat.S_IMODE(mode) & others:
        raise UsageError(f"{path}: other users can read the token", f"run `chmod 600 {path}`")
    token = (text.splitlines() or [""])[0].strip()
    if len(token) < SHORTEST_TOKEN or not token.isprintable() or " " in token:
        raise UsageError(f"{path}: the token has under {SHORTEST_TOKEN} characters, or spaces", "write one with `openssl rand -base64 32`")
    return token
