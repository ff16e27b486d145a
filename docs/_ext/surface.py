"""The reference of the Python API: all of ``pmclip_deploy.__all__``.

A name or a member without a docstring is a warning, and so fails the build.
"""

import dataclasses
import inspect
import re
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

import pmclip_deploy

SHORTER = (  # what a person reads in a signature
    (r"~?\b(?:os|numpy|typing|pathlib|collections\.abc|pydicom\.dataset)\.", ""),
    (r"ndarray\[tuple\[Any, \.\.\.\], dtype\[(\w+)\]\]", r"ndarray[\1]"),
    (r"str \| PathLike\[str\] \| bytes \|[^,&]*? \| [\w.~]*Picture", "Image"),
)
GROUPS = ("Functions", "The predictor", "Results", "Errors")
log = logging.getLogger(__name__)


def page() -> str:
    """A section for each group, with autodoc's directive for each name."""
    groups: dict[str, list[str]] = {group: [] for group in GROUPS}
    for name in pmclip_deploy.__all__:
        groups[_group(getattr(pmclip_deploy, name))].append(_directive(name))
    return "\n".join(f"## {group}\n\n" + "\n".join(directives) for group, directives in groups.items() if directives)


def _group(thing: Any) -> str:
    if not isinstance(thing, type):
        return "Functions"
    return "Errors" if issubclass(thing, BaseException) else "The predictor" if thing.__name__ == "Predictor" else "Results"


def _directive(name: str) -> str:
    thing = getattr(pmclip_deploy, name)
    is_error = isinstance(thing, type) and issubclass(thing, BaseException)
    kind = "autoexception" if is_error else "autoclass" if isinstance(thing, type) else "autofunction"
    options = "   :show-inheritance:\n" if is_error else ""
    return f"```{{eval-rst}}\n.. {kind}:: pmclip_deploy.{name}\n{options}```\n"


def _check(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Attributes of a dataclass are told by the comments beside them, and by the class's docstring."""
    inherited = isinstance(thing, type) and "__doc__" not in vars(thing)
    if what not in ("attribute", "data") and (inherited or not inspect.getdoc(thing)):
        log.warning("%s is public and has no docstring", name, location=name)


def _shorten(app: Sphinx, what: str, name: str, thing: Any, options: Any, signature: str | None, returns: str | None) -> Any:
    """Without the signature of a result, whose fields are listed below it, and of a predictor, which ``load`` makes."""
    if dataclasses.is_dataclass(thing) or thing is pmclip_deploy.Predictor:
        return "", None
    texts = []
    for text in (signature, returns):
        for pattern, shorter in SHORTER if text else ():
            text = re.sub(pattern, shorter, text or "")
        texts.append(text)
    return tuple(texts)


def _resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, text: nodes.Element) -> nodes.Element | None:
    """A signature names ``pmclip_deploy.answer.Answer``, which is documented as ``pmclip_deploy.Answer``."""
    target = str(node.get("reftarget", ""))
    domain = env.domains["py"]
    public = f"pmclip_deploy.{target.rpartition('.')[2]}"
    if node.get("refdomain") != "py" or public == target or public not in domain.objects:  # type: ignore[attr-defined]
        return None
    kind = domain.objects[public].objtype  # type: ignore[attr-defined]
    return domain.resolve_xref(env, node["refdoc"], app.builder, domain.role_for_objtype(kind) or kind, public, node, text)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", _check)
    app.connect("autodoc-process-signature", _shorten)
    app.connect("missing-reference", _resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
