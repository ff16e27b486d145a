"""Who imports whom: no circle, and nothing from a higher layer; imports inside functions and for types alone count."""

import ast
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

from tests.sources import ROOT, modules

LAYERS = ("core", "kernels", "runtime", "train", "export", "benchmarks", "cli")  # each may import itself and those before it
CORE = ("answer", "errors", "intent", "spec")


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in ("pmclip_deploy", *parts[parts[0] == "pmclip_deploy" :]) if part != "__init__")


MODULES = {module_of(path): path for path in modules()}


def layer_of(module: str) -> int:
    first = module.split(".")[1] if "." in module else ""
    return LAYERS.index("core" if first in CORE else first if first in LAYERS else "runtime")


def imported(module: str) -> set[str]:
    """The modules of ours that this one names. Its own package, without which it is not imported, is none of them."""
    names = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
            base = resolve_name("." * node.level + (node.module or ""), package)
            names |= {full if (full := f"{base}.{alias.name}") in MODULES else base for alias in node.names}
    return {name for name in names & MODULES.keys() if name != module and not module.startswith(f"{name}.")}


IMPORTED = {module: imported(module) for module in MODULES}


def test_no_circle() -> None:
    TopologicalSorter(IMPORTED).prepare()  # CycleError names the modules


@pytest.mark.parametrize("layer", LAYERS)
def test_nothing_from_a_higher_layer(layer: str) -> None:
    mine = [module for module in MODULES if LAYERS[layer_of(module)] == layer]
    assert mine
    assert not [f"{module} imports {name}" for module in mine for name in IMPORTED[module] if layer_of(name) > layer_of(module)]
