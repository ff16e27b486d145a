"""The ids of images in an index and in an archive: paths, or salted hashes that tell nothing. Standard library only."""

import hmac
import os
from pathlib import Path

from pmclip_deploy.console import counted
from pmclip_deploy.errors import UsageError

SALT_CHECK = b"pmclip-deploy/index-journal/1"  # never to be changed: indexes hold eight digits of its HMAC
SALT_BYTES = 16  # at least: a short salt can be guessed, and with it the UIDs


def id_from_path(path: Path) -> str:
    """With forward slashes; what is no Unicode in a name becomes \\x and its digits."""
    return os.fsencode(path.as_posix()).decode(errors="backslashreplace")


def salted(salt: bytes, text: str) -> str:
    return hmac.digest(salt, text.encode(), "sha256").hex()


def salt_check(salt: bytes | None) -> str:
    """Eight digits that tell one salt from another, "" without a salt. Raises UsageError for a salt that is too short."""
    if salt is None:
        return ""
    if len(salt) < SALT_BYTES:
        raise UsageError(
            f"the salt has {counted(len(salt), 'byte')}", f"give {SALT_BYTES} or more, for example `head -c 32 /dev/urandom > salt`"
        )
    return hmac.digest(salt, SALT_CHECK, "sha256").hex()[:8]
