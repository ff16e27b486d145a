"""From a folder to a Predictor: its files are hashed while numpy and onnxruntime are imported, and each is opened once it is verified."""

import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar

from pmclip_deploy.bundle import TOKENIZER, WORDS, Manifest, manifest_from_bundle, verify_bundle
from pmclip_deploy.errors import BundleError
from pmclip_deploy.models import DEFAULT_BUNDLE

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from pmclip_deploy.predictor import Predictor
    from pmclip_deploy.sessions import Session

T = TypeVar("T")


def load(bundle: "str | os.PathLike[str] | None" = None, device: str = "auto", *, once: bool = False) -> "Predictor":
    """Verifies a bundle and opens what ``ask`` runs, the rest when it is first needed.

    Without a head it waits for the image tower alone: the text tower and the tokenizer go on opening behind. ``device`` is of
    ``sessions.DEVICES``; "auto" takes what runs here and says in ``Predictor.notes`` what does not. ``once`` is for a process that asks
    about one picture and ends: INT8 transformers open sooner, run slower and say the same (docs/measured/cold-start.md); numpy gets one
    thread.
    """
    return load_beside(lambda: None, bundle, device, once)


def load_beside(work: Callable[[], object], bundle: "str | os.PathLike[str] | None", device: str, once: bool) -> "Predictor":
    """``load``, which calls ``work`` while the graphs are opened, when the interpreter's lock is free for other imports."""
    path = DEFAULT_BUNDLE if bundle is None else Path(bundle)
    if once and "numpy" not in sys.modules:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its other threads spin as it is imported, on a core that hashing wants
    pool = ThreadPoolExecutor()  # hashing, like building a graph, is done outside the interpreter's lock
    try:
        manifest = manifest_from_bundle(path)
        files: dict[str, Future[Any]] = {name: Future() for name in manifest.files}  # each is verified before it is parsed
        verified: Future[Any] = pool.submit(verify_bundle, path, manifest, lambda name: files[name].set_result(None))

        def verify(*names: str) -> None:
            for name in names:
                if name in files and files[name] in wait((files[name], verified), return_when=FIRST_COMPLETED).not_done:
                    verified.result()

        import pmclip_deploy.pixels
        import pmclip_deploy.sessions.onnxruntime  # noqa: F401
        from pmclip_deploy.predictor import Predictor, graphs_of_ask

        def session(name: str) -> "Session":
            file = manifest.graphs[name].file
            verify(file, f"{file}.data", *(engine.file for engine in manifest.engines if engine.graph == name))
            return _session(path, manifest, name, device, notes, once)

        def tokenizer(name: str) -> "Tokenizer":
            from pmclip_deploy.tokens import tokenizer_from_file

            verify(name)
            return tokenizer_from_file(path / name)

        head, notes = manifest.head, list[str]()
        sessions, tokenizers = Opened(session, manifest.graphs), Opened(tokenizer, (TOKENIZER, WORDS))
        opening: list[Future[Any]] = [pool.submit(sessions.__getitem__, name) for name in graphs_of_ask(manifest)]
        if "text" in graphs_of_ask(manifest) or (head is not None and head.words is not None):
            opening.append(pool.submit(tokenizers.__getitem__, TOKENIZER if head is None or head.words is None else WORDS))
        import PIL.Image  # noqa: F401  # for the first picture

        work()
        verified.result()
        for future in opening if head else opening[:1]:
            future.result()
    finally:
        pool.shutdown(wait=False)
    return Predictor(path, manifest, sessions, tokenizers, notes)


class Opened(dict[str, T]):
    """What ``opens`` makes of each of ``names``, once, when it is first asked for. Safe for threads, and no name waits for another."""

    def __init__(self, opens: Callable[[str], T], names: Iterable[str]) -> None:
        self._opens = opens
        self._locks = {name: Lock() for name in names}

    def __missing__(self, name: str) -> T:
        with self._locks[name]:
            if name not in self:
                self[name] = self._opens(name)
        return self[name]


def _session(path: Path, manifest: Manifest, name: str, device: str, notes: list[str], once: bool) -> "Session":
    from pmclip_deploy.predictor import contract_of
    from pmclip_deploy.sessions import session_from_bundle

    session = session_from_bundle(path, manifest, name, device, notes, once)
    inputs, outputs = contract_of(manifest)[name]
    if set(session.inputs) != set(inputs) or not set(outputs) <= set(session.outputs):
        found = f"takes {session.inputs} and gives {session.outputs}, not {inputs} and {outputs}"
        raise BundleError(f"{path / manifest.graphs[name].file}: {found}; export it again")
    return session
