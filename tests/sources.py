"""The repository, the Python files of its folders, and the real data in the folder that PMCLIP_SHARED names."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("PMCLIP_SHARED", ROOT.parent / "shared" / "data"))
MAPPED = ("train", "export", "kernels", "benchmarks")  # imported as pmclip_deploy.train and so on
FOLDERS = ("pmclip_deploy", *MAPPED)


def modules(*folders: str) -> list[Path]:
    """The Python files below these folders, by default all that are installed. The links in pmclip_deploy/ are left out."""
    return sorted(path for folder in folders or FOLDERS for path in (ROOT / folder).rglob("*.py") if path.resolve() == path)
