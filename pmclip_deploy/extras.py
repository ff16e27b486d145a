"""The optional dependencies, which are the extras in pyproject.toml."""

import importlib.util

from pmclip_deploy.errors import UsageError


def step_to_install(extra: str) -> str:
    """What to do if a package of the extra is missing, in one line.

    No index holds pmclip-deploy, so the extra is installed from a clone.
    """
    return f"install the extra `{extra}`: in a clone of the repository run `pip install '.[{extra}]'`"


def need_extra(extra: str, what: str, *modules: str) -> None:
    """Raises UsageError if one of the modules is not installed. ``what`` needs them."""
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise UsageError(f"{what} needs {', '.join(missing)}, not installed here", step_to_install(extra))
