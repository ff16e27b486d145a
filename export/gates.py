"""The bounds that a bundle of a precision must keep to beside its fp32 checkpoint."""

from collections.abc import Iterator, Mapping
from typing import Any

from pmclip_deploy.errors import ParityError
from pmclip_deploy.export.precisions import PRECISIONS, TENSOR_GATES
from pmclip_deploy.spec import ACCURACY_LOSS, AGREEMENT, CANDIDATE_AGREEMENT

PIXELS = 1e-5  # largest difference of a normalised pixel, every precision; tokens must be equal
LABELLED = 100  # pictures, fewer of which cannot tell. Like candidates, labels are given however near the second is
KEPT = 1e-3  # of embeddings that a bundle stores
CROSSED = 0.02  # of a head's decisions may differ that are no near-ties
DECIDED = 100  # of fewer decisions about findings all must agree, but for near-ties
PARTS = ANSWERS, FINDINGS = "answers", "findings"  # of a bundle: each says something by itself, and has its own gates


def gate(precision: str, parity: Mapping[str, Any], gates: Mapping[str, Mapping[str, float]] = TENSOR_GATES) -> None:
    """Raises ParityError that names every figure out of its bounds."""
    if found := [text for part in misses(precision, parity, gates).values() for text in part]:
        raise ParityError(
            f"{precision} misses parity with fp32 PyTorch: {'; '.join(found)}", "use a higher precision or other calibration images"
        )


def misses(precision: str, parity: Mapping[str, Any], gates: Mapping[str, Mapping[str, float]] = TENSOR_GATES) -> dict[str, list[str]]:
    """Every figure out of its bounds: of the graphs that answer, of "findings"."""
    answering, looking = [*_of_stages(parity.get("stages", {}))], list[str]()
    for graph, figures in parity["tensors"].items():
        of = looking if part_of(graph) == FINDINGS else answering
        of += _of_tensor(graph, figures, gates[precision])
    if answers := parity["answers"]:
        answering += _of_answers(answers)
    if (labels := parity.get("labels")) and labels["n"] >= LABELLED and not labels["agreement"] >= CANDIDATE_AGREEMENT:
        answering.append(f"labels agree on {labels['agreement']:.2%} of {labels['n']} pictures (limit {CANDIDATE_AGREEMENT:.0%})")
    if findings := parity.get("findings"):
        looking += _of_findings(findings)
    if checked := parity.get("checks"):
        answering += _of_model(checked)
        for output, figures in checked["outputs"].items():
            of = looking if part_of(output) == FINDINGS else answering
            of += _of_output(output, figures, PRECISIONS[precision].stray)
    return {ANSWERS: answering, FINDINGS: looking}


def _of_stages(stages: Mapping[str, Any]) -> Iterator[str]:
    for stage, figures in stages.items():
        furthest = figures.get("max_abs", 0.0)
        if furthest is None or not furthest <= PIXELS:
            yield f"{stage} differ {'in size' if furthest is None else f'by up to {furthest:.3g} (limit {PIXELS:g})'}"
        if not figures.get("equal", 1.0) >= 1:
            yield f"{stage} are equal in {figures['equal']:.0%} of the questions (limit 100%)"


def _of_tensor(graph: str, figures: Mapping[str, Any], limits: Mapping[str, float]) -> Iterator[str]:
    for name, limit in limits.items():
        figure = figures[name]
        if figure is None or not (figure <= limit if name == "max_abs" else figure >= limit):
            yield f"{graph} {name} {'is no number' if figure is None else f'{figure:.6g}'} (limit {limit:g})"


def _of_answers(answers: Mapping[str, Any]) -> Iterator[str]:
    if answers["agreement"] is not None and not answers["agreement"] >= AGREEMENT:
        yield f"answers agree on {answers['agreement']:.2%} (limit {AGREEMENT:.0%})"
    if not answers["candidate_agreement"] >= CANDIDATE_AGREEMENT:
        yield f"best candidates agree on {answers['candidate_agreement']:.2%} (limit {CANDIDATE_AGREEMENT:.0%})"
    if not answers["difference"] >= -ACCURACY_LOSS:
        yield f"accuracy changes by {100 * answers['difference']:.2f} points (limit -{100 * ACCURACY_LOSS:g})"


def _of_findings(findings: Mapping[str, Any]) -> Iterator[str]:
    if findings["decisions"] >= DECIDED and not findings["agreement"] >= AGREEMENT:
        yield f"findings agree on {findings['agreement']:.2%} of {findings['decisions']} decisions (limit {AGREEMENT:.0%})"
    if findings["decisions"] < DECIDED and findings["crossed"]:
        yield f"{findings['crossed']} decisions about findings differ that are no near-ties (limit 0)"


def _of_model(checked: Mapping[str, Any]) -> Iterator[str]:
    if checked["differ"]:
        yield f"{', '.join(checked['differ'])} of the bundle are not the checkpoint's"
    if (decisions := checked["decisions"]) and decisions["crossed"] > CROSSED * decisions["n"]:
        yield f"{decisions['crossed']} of {decisions['n']} decisions differ that are no near-ties (limit {CROSSED:.0%})"


def _of_output(output: str, figures: Mapping[str, Any], stray: float) -> Iterator[str]:
    graph = output.partition("/")[0]
    if graph == "kept":  # fp32 whatever the precision
        limits = {"row": KEPT, "column": KEPT}
    elif graph == "words":  # tables alone, in which no error adds up
        limits = {"row": stray / 5, "column": stray / 5}
    elif graph in ("head", FINDINGS) and output != "findings/places":  # logits, from the reference's inputs or nearly so
        limits = {"column": stray / 2, "shift": stray}
    else:
        limits = {"row": stray, "column": stray}
    for name, limit in limits.items():
        figure = figures[name]
        if figure is None or figure > limit:
            said = {"row": "a row is off by", "column": "a column is off by", "shift": "a column is shifted by"}[name]
            yield f"{output}: {said} {'no number' if figure is None else f'{figure:.3g}'} (limit {limit:g})"


def part_of(graph: str) -> str:
    """Of a graph, GRAPH/LAYER or GRAPH/OUTPUT."""
    return FINDINGS if graph.partition("/")[0] == FINDINGS else ANSWERS
