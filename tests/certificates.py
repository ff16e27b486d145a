"""Certificates for two days, made by openssl."""

import subprocess
from pathlib import Path


def certificates(folder: Path) -> None:
    """NAME.pem and NAME.key: of an authority, "ca", and signed by it, "server", for localhost, and "client"."""
    for name, subject in {"ca": "/CN=test authority", "server": "/CN=localhost", "client": "/CN=a client"}.items():
        by = ["-CA", folder / "ca.pem", "-CAkey", folder / "ca.key", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
        made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", subject, *(by if name != "ca" else [])]
        subprocess.run([*made, "-keyout", folder / f"{name}.key", "-out", folder / f"{name}.pem"], check=True, capture_output=True)
