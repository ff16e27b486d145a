"""From a folder to a Predictor: its files are hashed while numpy and onnxruntime are imported, and each is opened once it is verified."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar

from pmclip_deploy.bundle.files import content_of_file, manifest_from_bundle, verify_bundle
from pmclip_deploy.bundle.manifest import Manifest
from pmclip_deploy.bundle.names import TOKENIZER, WORDS
from pmclip_deploy.bundle.types import Graph
from pmclip_deploy.errors import BundleError, DeviceError
from pmclip_deploy.models import DEFAULT_BUNDLE
from pmclip_deploy.process import one_thread_for_numpy
from pmclip_deploy.sessions import F32, GraphFile, Session, SessionOptions, backend_for, backends, onnx_sha256
from pmclip_deploy.tuning import Choice, choices_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from pmclip_deploy.predictor import Predictor

T = TypeVar("T")


def load(
    bundle: "str | os.PathLike[str] | None" = None,
    device: str = "auto",
    *,
    single_use: bool = False,
    items: int | None = None,
    threads: int | None = None,
) -> "Predictor":
    """Verifies a bundle and opens what ``ask`` runs, the rest when it is first needed.

    Without a head it waits for the image tower alone: the text tower and the tokenizer go on opening behind. ``device`` is of
    ``sessions.devices()``; "auto" takes what `pmclip-deploy tune` chose, else what runs here, and says in ``Predictor.notes`` what does
    not. ``single_use`` is for a process that asks about one picture and ends: INT8 transformers open sooner, run slower and say the same
    (docs/measured/cold-start.md). ``items`` says how many pictures there will be, if that is known: for few of them a tuning may have
    chosen what opens sooner. ``threads`` is for several processes on one machine: how many each graph takes. The default is
    what a tuning chose, else one for each core.

    Raises BundleError where the folder is no whole bundle, UsageError for an unknown device, and DeviceError where one that was asked for
    by name is not there.

    >>> import pmclip_deploy as pm
    >>> pm.load(device="cpu")
    Predictor(pmclip-lite 0.1.0, int8, onnxruntime on cpu)
    """
    return load_while(lambda: None, bundle, device, single_use, items, threads)


def load_while(
    work: Callable[[], object],
    bundle: "str | os.PathLike[str] | None",
    device: str,
    single_use: bool,
    items: int | None = None,
    threads: int | None = None,
) -> "Predictor":
    """``load``, which calls ``work`` while the graphs are opened, when the interpreter's lock is free for other imports."""
    path = DEFAULT_BUNDLE if bundle is None else Path(bundle)
    if single_use:
        one_thread_for_numpy()
    pool = ThreadPoolExecutor()  # hashing, like building a graph, is done outside the interpreter's lock
    try:
        manifest = manifest_from_bundle(path)
        from pmclip_deploy.decision.needs import graphs_of_ask

        head, at_once = manifest.head, graphs_of_ask(manifest)
        texts = [TOKENIZER if head is None or head.words is None else WORDS]
        texts = texts if "text" in at_once or (head is not None and head.words is not None) else []
        engines = {engine.graph for engine in manifest.engines}  # whose graphs may stay closed
        wanted = {*texts, *(f"{manifest.graphs[name].file}{ending}" for name in {*at_once} - engines for ending in ("", ".data"))}
        files: dict[str, Future[bytes | None]] = {name: Future() for name in manifest.files}  # each is verified before it is parsed
        verified: Future[Any] = pool.submit(verify_bundle, path, manifest, lambda name, content: files[name].set_result(content), wanted)

        def content(name: str) -> bytes:
            """As it was hashed. What is opened later is read and hashed anew."""
            if name in files and files[name] in wait((files[name], verified), return_when=FIRST_COMPLETED).not_done:
                verified.result()
            file = files.pop(name, None)
            kept = None if file is None else file.result()
            return content_of_file(path, manifest, name) if kept is None else kept

        import pmclip_deploy.imaging.preprocess  # noqa: F401

        notes = list[str]()
        choices = choices_of(path, 1 if single_use else items, notes) if device == "auto" else {}
        if not {*at_once} <= {*choices}:  # the packages of what was chosen are imported
            backend_for(device).version()
        from pmclip_deploy.predictor import Predictor

        batches = {name: choice.batch for name, choice in choices.items() if choice.batch is not None}

        def session(name: str) -> Session:
            opened = _session(path, manifest, name, device, notes, single_use, content, choices, threads)
            if name not in choices:  # it runs as without a tuning, in which nobody looked at batches
                batches.pop(name, None)
            return opened

        def tokenizer(name: str) -> "Tokenizer":
            from pmclip_deploy.tokens import tokenizer_from_text

            return tokenizer_from_text(content(name).decode(errors="surrogateescape"), path / name)  # refused there if it is no UTF-8

        sessions, tokenizers = LazyMap(session, manifest.graphs), LazyMap(tokenizer, (TOKENIZER, WORDS))
        opening: list[Future[Any]] = [pool.submit(sessions.__getitem__, name) for name in at_once]
        opening += [pool.submit(tokenizers.__getitem__, name) for name in texts]
        import PIL.Image  # noqa: F401  # for the first picture

        work()
        verified.result()
        for future in opening if head else opening[:1]:
            future.result()
    finally:
        pool.shutdown(wait=False)
    predictor = Predictor(path, manifest, sessions, tokenizers, notes)
    if runs := [choices[name] for name in manifest.graphs if name in choices]:  # each as `tune` chose it
        names = dict.fromkeys(backend_for(choice.device).name for choice in runs)
        between = dict.fromkeys(choice.between for choice in runs)
        predictor.model = replace(predictor.model, backend=", ".join(names), between=", ".join(between))
    predictor.towers.tuned = batches
    return predictor


class LazyMap(dict[str, T]):
    """What ``opens`` makes of each of ``names``, once, when it is first asked for. Safe for threads, and no name waits for another."""

    def __init__(self, opens: Callable[[str], T], names: Iterable[str]) -> None:
        self._opens = opens
        self._locks = {name: Lock() for name in names}

    def __missing__(self, name: str) -> T:
        with self._locks[name]:
            if name not in self:
                self[name] = self._opens(name)
        return self[name]


def _session(
    path: Path, manifest: Manifest, name: str, device: str, notes: list[str], single_use: bool, content: Callable[[str], bytes],
    choices: dict[str, Choice], threads: int | None,
) -> Session:  # fmt: skip
    from pmclip_deploy.bundle.contract import contract_of

    choice = choices.get(name, Choice(device))
    choice = choice if threads is None else choice._replace(threads=threads)
    try:
        session = session_from_bundle(path, manifest, name, notes=notes, single_use=single_use, content=content, **choice._asdict())
    except DeviceError as error:
        if choices.pop(name, None) is None:
            raise
        notes.append(f"{error.message}; meanwhile the graph {name} runs as without a tuning")
        session = session_from_bundle(path, manifest, name, device, notes, single_use, content, threads=threads)
    inputs, outputs = contract_of(manifest)[name]
    if set(session.inputs) != set(inputs) or not set(outputs) <= set(session.outputs):
        found = f"takes {session.inputs} and gives {session.outputs}, not {inputs} and {outputs}"
        raise BundleError(f"{path / manifest.graphs[name].file}: {found}", "export it again")
    return session


def session_from_bundle(
    folder: Path,
    manifest: Manifest,
    name: str,
    device: str = "auto",
    notes: list[str] | None = None,
    single_use: bool = False,
    content: Callable[[str], bytes] | None = None,
    between: str = F32,
    threads: int | None = None,
    batch: int | None = None,
) -> Session:
    """Opens the graph ``name`` of a bundle. ``content`` gives a file that was verified; by default each is read and verified here.

    "auto" is an engine that fits this machine, else onnxruntime's GPU, else its CPU; a bundle for the CPU stays on the CPU. Where there
    are engines and none fits, one line in ``notes`` says what they were built for and what is here.
    Raises UsageError for an unknown device, and DeviceError where one asked for by name is not there or fails: it never falls back.
    """
    backend, graph = backend_for(device), _graph_file(folder, manifest, name, content or partial(content_of_file, folder, manifest))
    prepack = not (single_use and _integers_alone(graph.read(graph.path), manifest.graphs[name]))
    mirrored = name == "image" and manifest.head is not None and manifest.head.details  # read with its mirror image, in one run
    rows = (*([2] if mirrored else []), 1, *([] if batch is None else [batch]))
    options = SessionOptions(device, manifest.target == "cpu", prepack, between, threads, rows)
    if device != "auto":
        return backend.open(graph, options)
    errors = list[DeviceError]()
    for of_engines in dict.fromkeys(row.backend for row, _ in graph.engines):
        try:
            return backends()[of_engines].open(graph, options)
        except DeviceError as error:
            errors.append(error)
    session = backend.open(graph, options._replace(device="cpu") if manifest.target == "cpu" else options)
    if errors and notes is not None:
        notes.append(f"{errors[0]}; meanwhile {session.backend} runs on {session.device}")
    return session


def _graph_file(folder: Path, manifest: Manifest, name: str, content: Callable[[str], bytes]) -> GraphFile:
    hashes, file = {file: entry.sha256 for file, entry in manifest.files.items()}, manifest.graphs[name].file
    engines = tuple((row, hashes[row.file]) for row in manifest.engines if row.graph == name)
    return GraphFile(folder / file, onnx_sha256(hashes, file), name, manifest.name, engines, cache(lambda path: content(path.name)))


def _integers_alone(content: bytes, graph: Graph) -> bool:
    """Whether a graph says the same from weights that were not packed, and loses little: integer products do; products of floats and of
    blocks give other bits, and integer convolutions take a third longer."""
    return b"QuantizeLinear" in content and b"Conv" not in content and not graph.float_layers
