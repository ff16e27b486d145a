"""Ed25519 signatures of a bundle: manifest.sig is a key holder's word for manifest.json, which holds the sha256 of every other file."""

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from pmclip_deploy.atomic import write_errors, written
from pmclip_deploy.bundle.files import verify_bundle
from pmclip_deploy.bundle.names import MANIFEST, SIGNATURE
from pmclip_deploy.errors import BundleError, InputError, UsageError
from pmclip_deploy.extras import step_to_install

if TYPE_CHECKING:  # the extra `sign`: nothing else may need it, so the functions import it
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey


PASSWORD = "PMCLIP_SIGNING_PASSWORD"  # of an encrypted private key; never an option, which other users of the machine could read
MAX_KEY_BYTES = 1 << 16
SIGNATURE_BYTES = 64  # RFC 8032, 5.1.6


def sign_bundle(bundle: Path, private_key: "Ed25519PrivateKey") -> None:
    """Writes manifest.sig, whole or not at all, in place of an older one. Raises BundleError, also where the bundle does not verify.

    The 64 bytes of RFC 8032 as they are, not base64: `openssl pkeyutl -verify -rawin` reads them, so that checking needs no code of ours.
    """
    verify_bundle(bundle)
    folder = Path(bundle).resolve()
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.sig")  # not inside: what is left of a killed process must not spoil the bundle
    with write_errors(f"{bundle}: {SIGNATURE}", "check space and permissions", BundleError), written(folder / SIGNATURE, beside) as new:
        new.write_bytes(private_key.sign((folder / MANIFEST).read_bytes()))


def problems_in_signature(bundle: Path, public_key: "Ed25519PublicKey") -> list[str]:
    """Empty where manifest.sig is that key's signature of manifest.json as it stands. The other files are verify_bundle's."""
    from cryptography.exceptions import InvalidSignature

    signature, manifest = Path(bundle) / SIGNATURE, Path(bundle) / MANIFEST
    try:
        if not signature.is_file():
            return [f"{SIGNATURE} is missing, so nobody signed this bundle"]
        if signature.stat().st_size != SIGNATURE_BYTES:
            return [f"{SIGNATURE} is no signature (it is not {SIGNATURE_BYTES} bytes long)"]
        public_key.verify(signature.read_bytes(), manifest.read_bytes())
    except OSError as error:
        raise BundleError(f"{error.filename}: cannot be read ({error.strerror})", "check its permissions") from error
    except InvalidSignature:
        return [f"{SIGNATURE} is not this key's signature of {MANIFEST}"]
    return []


def private_key_from_pem(path: Path) -> "Ed25519PrivateKey":
    """An encrypted key's password is what the environment variable PMCLIP_SIGNING_PASSWORD holds.

    Raises InputError where the file holds no such key, UsageError where the password is not there or wrong, or the extra is not installed.
    """
    need_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    content = _read(path)
    try:
        key = load_pem_private_key(content, None)
    except TypeError:  # it is encrypted
        password = os.environ.get(PASSWORD)
        if not password:
            raise UsageError(f"{path}: the key is encrypted", f"set {PASSWORD} to its password") from None
        try:
            key = load_pem_private_key(content, os.fsencode(password))
        except ValueError:
            raise UsageError(f"{path}: the key does not open with the password in {PASSWORD}", "set it to the right one") from None
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(
            f"{path}: not an Ed25519 private key in PEM", "make one with `openssl genpkey -algorithm ed25519 -out private.pem`"
        )
    return key


def public_key_from_pem(path: Path) -> "Ed25519PublicKey":
    """Raises InputError where the file holds no Ed25519 public key, UsageError where the extra is not installed."""
    need_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(_read(path))
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise InputError(f"{path}: not an Ed25519 public key in PEM", "`openssl pkey -in private.pem -pubout -out public.pem` makes one")
    return key


def fingerprint(public_key: "Ed25519PublicKey") -> str:
    """What `openssl pkey -pubin -in public.pem -outform DER | sha256sum` prints: short enough to compare over the telephone."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def need_cryptography() -> None:
    try:
        import cryptography.hazmat.primitives.asymmetric.ed25519  # noqa: F401
    except ImportError:
        raise UsageError("a signature needs cryptography, which cannot be imported", step_to_install("sign")) from None


def _read(path: Path) -> bytes:
    """No more than a key can be, and from a pipe too: `--key <(pass show bundle-key)` keeps it off the disk."""
    try:
        with Path(path).open("rb") as file:
            return file.read(MAX_KEY_BYTES)
    except OSError as error:
        raise InputError(f"{path}: the key cannot be read ({error.strerror})", "check the file") from error
