"""Signatures: the holder of the key and nobody else, over every byte; keys of any other kind are refused in one line."""

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.command import Result
from tests.imports import RUNTIME, loaded
from tests.tiny.bundle import tiny_bundle

pytest.importorskip("cryptography")
from cryptography.hazmat.primitives.asymmetric import ec, ed448, rsa, x25519
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat, PublicFormat

from pmclip_deploy.bundle.files import sha256_of_file, verify_bundle
from pmclip_deploy.bundle.names import MANIFEST, SEAL, SIGNATURE
from pmclip_deploy.bundle.signing import (
    PASSWORD,
    fingerprint,
    private_key_from_pem,
    problems_in_signature,
    public_key_from_pem,
    sign_bundle,
)
from pmclip_deploy.errors import BundleError, InputError, UsageError

OPENSSL = shutil.which("openssl")
needs_openssl = pytest.mark.skipif(OPENSSL is None, reason="needs the openssl command line")


def pem(key: Any, password: str | None = None) -> bytes:
    encryption = BestAvailableEncryption(password.encode()) if password else NoEncryption()
    return bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))


def public_pem(key: Any) -> bytes:
    return bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return tiny_bundle(tmp_path / "bundle")


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """(private.pem, public.pem)"""
    key = Ed25519PrivateKey.generate()
    (tmp_path / "private.pem").write_bytes(pem(key))
    (tmp_path / "public.pem").write_bytes(public_pem(key))
    return tmp_path / "private.pem", tmp_path / "public.pem"


@pytest.fixture
def run(command: Callable[..., Result]) -> Callable[..., Result]:
    """`pmclip-deploy bundle ...`"""
    return partial(command, "bundle")


def openssl(*arguments: str | Path, **more: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([str(OPENSSL), *map(str, arguments)], capture_output=True, timeout=60, **more)


def is_one_line(err: str) -> bool:
    return err.startswith("error: ") and err.count("\n") == 1


def seal(bundle: Path) -> None:
    (bundle / SEAL).write_text(f"{sha256_of_file(bundle / MANIFEST)}  {MANIFEST}\n")


def test_what_is_signed_verifies_and_leaves_nothing_beside(bundle: Path, keys: tuple[Path, Path]) -> None:
    before = sorted(p.name for p in bundle.parent.iterdir())
    sign_bundle(bundle, private_key_from_pem(keys[0]))
    verify_bundle(bundle)
    assert problems_in_signature(bundle, public_key_from_pem(keys[1])) == []
    assert sorted(p.name for p in bundle.parent.iterdir()) == before
    first = (bundle / SIGNATURE).read_bytes()
    sign_bundle(bundle, private_key_from_pem(keys[0]))  # in place of the old one; RFC 8032 signatures do not differ
    assert (bundle / SIGNATURE).read_bytes() == first and len(first) == 64


def test_the_commands(run: Any, bundle: Path, keys: tuple[Path, Path]) -> None:
    code, out, err = run("verify", bundle, "--key", keys[1])
    assert code == 4 and out == "" and is_one_line(err) and f"{SIGNATURE} is missing" in err
    code, out, err = run("verify", bundle, "--key", keys[1], "--json")
    assert code == 4 and is_one_line(err) and not (document := json.loads(out))["verified"]
    assert document["signed_by"] is None and document["problems"] == ["manifest.sig is missing, so nobody signed this bundle"]
    whose = fingerprint(public_key_from_pem(keys[1]))
    code, out, err = run("sign", bundle, "--key", keys[0])
    assert code == 0 and err == "" and whose in out
    code, out, err = run("sign", bundle, "--key", keys[0], "--json")
    assert code == 0 and json.loads(out) == {
        "schema": "pmclip-deploy/signature/1",
        "bundle": str(bundle),
        "file": SIGNATURE,
        "signed_by": whose,
    }
    code, out, err = run("verify", bundle, "--key", keys[1])
    assert code == 0 and err == "" and whose in out
    code, out, err = run("verify", bundle, "--key", keys[1], "--json")
    assert code == 0 and json.loads(out)["signed_by"] == whose and json.loads(out)["verified"] is True
    code, out, err = run("verify", bundle, "--json")  # without a key nothing is said about who
    assert code == 0 and json.loads(out)["signed_by"] is None
    assert run("sign", bundle)[0] == run("sign", "--key", keys[0])[0] == 2


def test_another_key_is_refused(run: Any, bundle: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "other.pem").write_bytes(public_pem(Ed25519PrivateKey.generate()))
    run("sign", bundle, "--key", keys[0])
    code, out, err = run("verify", bundle, "--key", tmp_path / "other.pem", "--json")
    assert code == 4 and is_one_line(err) and "not this key's signature" in err
    assert json.loads(out)["verified"] is False and json.loads(out)["signed_by"] is None


def test_a_manifest_changed_and_sealed_again_is_refused(run: Any, bundle: Path, keys: tuple[Path, Path]) -> None:
    """What the seal alone cannot see: someone who changes the manifest can write its sha256 too."""
    run("sign", bundle, "--key", keys[0])
    manifest = (bundle / MANIFEST).read_bytes()
    (bundle / MANIFEST).write_bytes(manifest.replace(b"0.6", b"0.1"))
    assert (bundle / MANIFEST).read_bytes() != manifest
    seal(bundle)
    assert run("verify", bundle)[0] == 0
    code, out, err = run("verify", bundle, "--key", keys[1])
    assert code == 4 and out == "" and is_one_line(err) and "not this key's signature" in err


def test_a_changed_file_under_a_good_signature_is_refused(run: Any, bundle: Path, keys: tuple[Path, Path]) -> None:
    run("sign", bundle, "--key", keys[0])
    with (bundle / "text.onnx").open("ab") as file:
        file.write(b"x")
    code, out, err = run("verify", bundle, "--key", keys[1], "--json")
    assert code == 4 and is_one_line(err) and "text.onnx has changed" in err
    assert json.loads(out)["signed_by"] is None and len(json.loads(out)["problems"]) == 1


@pytest.mark.parametrize("bit", [0, 255, 256, 511])
def test_a_flipped_bit_of_the_signature_is_refused(bundle: Path, keys: tuple[Path, Path], bit: int) -> None:
    sign_bundle(bundle, private_key_from_pem(keys[0]))
    signature = bytearray((bundle / SIGNATURE).read_bytes())
    signature[bit // 8] ^= 1 << bit % 8
    (bundle / SIGNATURE).write_bytes(signature)
    assert len(problems_in_signature(bundle, public_key_from_pem(keys[1]))) == 1


@pytest.mark.parametrize("content", [b"", b"x" * 63, b"x" * 65, "base64", b"x" * (1 << 20)])
def test_what_is_no_signature_is_refused(bundle: Path, keys: tuple[Path, Path], content: Any) -> None:
    sign_bundle(bundle, private_key_from_pem(keys[0]))
    (bundle / SIGNATURE).write_bytes(base64.b64encode((bundle / SIGNATURE).read_bytes()) if content == "base64" else content)
    assert "is no signature" in problems_in_signature(bundle, public_key_from_pem(keys[1]))[0]


def test_a_folder_or_a_device_for_a_signature(bundle: Path, keys: tuple[Path, Path]) -> None:
    (bundle / SIGNATURE).mkdir()
    assert "is missing" in problems_in_signature(bundle, public_key_from_pem(keys[1]))[0]
    with pytest.raises(BundleError, match="cannot be written"):
        sign_bundle(bundle, private_key_from_pem(keys[0]))
    assert not list(bundle.parent.glob(".*"))
    (bundle / SIGNATURE).rmdir()
    if os.name == "posix":
        (bundle / SIGNATURE).symlink_to("/dev/zero")  # endless
        assert "is missing" in problems_in_signature(bundle, public_key_from_pem(keys[1]))[0]
        sign_bundle(bundle, private_key_from_pem(keys[0]))  # replaces the link, does not follow it
        assert problems_in_signature(bundle, public_key_from_pem(keys[1])) == []


@pytest.mark.skipif(os.name != "posix", reason="needs a limit on the size of files")
def test_a_write_that_fails_keeps_the_old_signature(bundle: Path, keys: tuple[Path, Path]) -> None:
    sign_bundle(bundle, private_key_from_pem(keys[0]))
    before = (bundle / SIGNATURE).read_bytes()
    (bundle / MANIFEST).write_bytes((bundle / MANIFEST).read_bytes() + b" ")
    seal(bundle)
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))"
    code = (
        f"{full}\nfrom pathlib import Path\nfrom pmclip_deploy.bundle.signing import *\n"
        + "sign_bundle(Path({!r}), private_key_from_pem(Path({!r})))"
    )
    command = [sys.executable, "-B", "-c", code.format(str(bundle), str(keys[0]))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "manifest.sig cannot be written (File too large)" in done.stderr
    assert (bundle / SIGNATURE).read_bytes() == before and not list(bundle.parent.glob(".*"))


def test_a_bundle_that_does_not_verify_is_not_signed(run: Any, bundle: Path, keys: tuple[Path, Path]) -> None:
    (bundle / "stray").touch()
    code, out, err = run("sign", bundle, "--key", keys[0])
    assert code == 4 and out == "" and is_one_line(err) and "'stray' does not belong" in err
    assert not (bundle / SIGNATURE).exists()
    assert run("sign", bundle.parent / "nowhere", "--key", keys[0])[0] == 4


def test_a_bundle_written_anew_has_no_signature(bundle: Path, keys: tuple[Path, Path]) -> None:
    sign_bundle(bundle, private_key_from_pem(keys[0]))
    tiny_bundle(bundle)  # the same bytes, even
    assert not (bundle / SIGNATURE).exists()
    verify_bundle(bundle)


def test_a_manifest_cannot_list_its_own_signature(bundle: Path) -> None:
    data = json.loads((bundle / MANIFEST).read_text())
    data["files"][SIGNATURE] = {"sha256": "0" * 64, "bytes": 64}
    (bundle / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BundleError, match=f"'{SIGNATURE}' is no file name"):
        verify_bundle(bundle)


OTHER_KEYS: dict[str, Any] = {
    "RSA": lambda: rsa.generate_private_key(65537, 1024),
    "EC": lambda: ec.generate_private_key(ec.SECP256R1()),
    "Ed448": ed448.Ed448PrivateKey.generate,
    "X25519": x25519.X25519PrivateKey.generate,
}


@pytest.mark.parametrize("kind", OTHER_KEYS)
def test_keys_of_another_kind_are_refused(tmp_path: Path, kind: str) -> None:
    key = OTHER_KEYS[kind]()
    (tmp_path / "private.pem").write_bytes(pem(key))
    (tmp_path / "public.pem").write_bytes(public_pem(key))
    with pytest.raises(InputError, match="not an Ed25519 private key"):
        private_key_from_pem(tmp_path / "private.pem")
    with pytest.raises(InputError, match="not an Ed25519 public key"):
        public_key_from_pem(tmp_path / "public.pem")


def test_what_is_no_key_is_one_line_and_says_nothing_of_the_key(run: Any, bundle: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    secret = keys[0].read_bytes().splitlines()[1]  # the whole of the key, in base64
    private, public = keys[0].read_bytes(), keys[1].read_bytes()
    cases = [
        ("sign", b""),
        ("sign", b"\0" * 100),
        ("sign", public),
        ("sign", private[:-40]),
        ("sign", private.replace(b"M", b"N")),
        ("sign", base64.b64decode(secret)),  # DER
        ("verify", b""),
        ("verify", private),
        ("verify", public.replace(b"M", b"N")),
        ("verify", b"-" * (1 << 20)),
    ]
    for command, content in cases:
        (tmp_path / "key").write_bytes(content)
        code, out, err = run(command, bundle, "--key", tmp_path / "key")
        assert code == 3 and out == "" and is_one_line(err), (command, content[:30], err)
        code, out, err = run(command, bundle, "--key", tmp_path / "key", "--debug")
        assert code == 3 and out == "" and secret.decode() not in err and "Traceback" not in err
    for nowhere in (tmp_path / "nowhere", tmp_path):
        code, out, err = run("sign", bundle, "--key", nowhere)
        assert code == 3 and is_one_line(err) and "cannot be read" in err
    assert not (bundle / SIGNATURE).exists()


def test_the_password_comes_from_the_environment(
    run: Any, bundle: Path, keys: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    password = "correct horse ü"
    (tmp_path / "locked.pem").write_bytes(pem(private_key_from_pem(keys[0]), password))
    for wrong, said in ((None, f"set {PASSWORD}"), ("", f"set {PASSWORD}"), ("battery staple", "does not open")):
        monkeypatch.delenv(PASSWORD, raising=False)
        if wrong is not None:
            monkeypatch.setenv(PASSWORD, wrong)
        code, out, err = run("sign", bundle, "--key", tmp_path / "locked.pem")
        assert code == 2 and out == "" and is_one_line(err) and said in err and (not wrong or wrong not in err)
    monkeypatch.setenv(PASSWORD, password)
    code, out, err = run("sign", bundle, "--key", tmp_path / "locked.pem")
    assert code == 0 and password not in out + err
    assert run("verify", bundle, "--key", keys[1])[0] == 0
    assert run("sign", bundle, "--key", keys[0])[0] == 0  # one that needs no password does not mind


@needs_openssl
@pytest.mark.parametrize("locked", [False, True])
def test_keys_that_openssl_makes_and_signatures_that_it_checks(
    run: Any, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locked: bool
) -> None:
    private, public = tmp_path / "private.pem", tmp_path / "public.pem"
    lock = ["-aes-256-cbc", "-pass", "env:PMCLIP_SIGNING_PASSWORD"] if locked else []
    if locked:
        monkeypatch.setenv(PASSWORD, "correct horse")
    if openssl("genpkey", "-algorithm", "ed25519", *lock, "-out", private).returncode:
        pytest.skip("this openssl makes no Ed25519 keys")
    opened = ["-passin", "env:PMCLIP_SIGNING_PASSWORD"] if locked else []
    assert openssl("pkey", "-in", private, *opened, "-pubout", "-out", public).returncode == 0
    assert run("sign", bundle, "--key", private)[0] == 0
    assert run("verify", bundle, "--key", public)[0] == 0
    der = openssl("pkey", "-pubin", "-in", public, "-outform", "DER").stdout
    assert openssl("dgst", "-sha256", "-r", input=der).stdout.split()[0].decode() == fingerprint(public_key_from_pem(public))
    check = ["pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin", "-in", bundle / MANIFEST, "-sigfile", bundle / SIGNATURE]
    done = openssl(*check)
    if b"unknown option" in done.stderr.lower():
        pytest.skip("this openssl is older than -rawin")
    assert done.returncode == 0, done.stderr
    (bundle / MANIFEST).write_bytes((bundle / MANIFEST).read_bytes() + b" ")
    assert openssl(*check).returncode != 0


@pytest.mark.skipif(not Path("/dev/fd").is_dir(), reason="needs /dev/fd")
def test_a_key_may_come_through_a_pipe(bundle: Path, keys: tuple[Path, Path]) -> None:
    read, write = os.pipe()
    with os.fdopen(write, "wb") as out:
        out.write(keys[0].read_bytes())
    sign_bundle(bundle, private_key_from_pem(Path(f"/dev/fd/{read}")))
    os.close(read)
    assert problems_in_signature(bundle, public_key_from_pem(keys[1])) == []


def test_without_cryptography_the_error_says_what_to_install(
    run: Any, bundle: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "cryptography"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)  # Python's own way to say that it is not there
    for command, key in zip(("sign", "verify"), keys, strict=True):
        code, out, err = run(command, bundle, "--key", key)
        assert code == 2 and out == "" and is_one_line(err) and "pip install '.[sign]'" in err
    assert run("verify", bundle)[0] == 0
    with pytest.raises(UsageError):
        public_key_from_pem(keys[1])


def test_nothing_else_loads_cryptography(bundle: Path, keys: tuple[Path, Path]) -> None:
    assert "pmclip_deploy.bundle.signing" in RUNTIME and "pmclip_deploy.cli.bundle" in RUNTIME
    assert "cryptography" not in loaded(f"import {', '.join(RUNTIME)}")
    call = "import sys; sys.argv = {}\nfrom pmclip_deploy.cli.app import main\ntry: main()\nexcept SystemExit: pass"
    assert "cryptography" not in loaded(call.format(["pmclip-deploy", "bundle", "verify", str(bundle)]))
    assert "cryptography" in loaded(call.format(["pmclip-deploy", "bundle", "sign", str(bundle), "--key", str(keys[0])]))
