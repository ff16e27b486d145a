"""What stands below a folder. Standard library only."""

import os
from pathlib import Path
from stat import S_ISREG

from pmclip_deploy.errors import InputError


def files_below(folder: Path) -> tuple[list[Path], list[InputError]]:
    """Every file in ``folder`` and the folders below, in order, and what to say of each folder that cannot be listed."""
    unlisted = list[InputError]()

    def note(error: OSError) -> None:
        unlisted.append(InputError(f"{error.filename}: a folder that cannot be listed ({error.strerror})", "check its permissions"))

    found = sorted(Path(parent) / name for parent, _, names in os.walk(folder, onerror=note) for name in names)
    return [path for path in found if _is_file(path)], unlisted


def _is_file(path: Path) -> bool:
    """No pipe and no broken link. What may not be looked at is taken for a file: who reads it gets the error."""
    try:
        return S_ISREG(path.stat().st_mode)
    except PermissionError:
        return True
    except OSError:
        return False
