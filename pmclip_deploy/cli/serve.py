"""`pmclip-deploy serve`: answers over HTTP, and a page in the browser."""

import re
import secrets
from pathlib import Path
from typing import Annotated

import typer

from pmclip_deploy.cli.options import Bundle, Device, check_choice
from pmclip_deploy.cli.output import RESEARCH_ONLY, print_notes
from pmclip_deploy.console import print_note
from pmclip_deploy.errors import UsageError
from pmclip_deploy.extras import need_extra

MOST_THREADS = 4  # the graphs themselves take all cores
ENGINES = ("local", "triton")
NEEDS = ("fastapi", "uvicorn", "multipart", "prometheus_client")

Host = Annotated[str, typer.Option(help="Address to listen on. Any but this machine's own needs --tls-cert.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")]
TokenFile = Annotated[
    Path | None,
    typer.Option(help="File that holds the token, readable by its owner only. Default: a new token with each start.", show_default=False),
]
TlsCert = Annotated[Path | None, typer.Option(help="TLS certificate, a PEM file.", show_default=False)]
TlsKey = Annotated[Path | None, typer.Option(help="Key of the certificate, a PEM file.", show_default=False)]
ClientCa = Annotated[
    Path | None, typer.Option(help="PEM file of authorities. Clients must show a certificate from one of them.", show_default=False)
]
AllowHost = Annotated[
    list[str] | None, typer.Option(help="Name by which browsers reach the service. Repeat the option for more.", show_default=False)
]
Queue = Annotated[int, typer.Option(min=1, max=4096, help="Number of pictures that may wait. More are refused with status 503.")]
Timeout = Annotated[float, typer.Option("--timeout-s", min=1, max=3600, help="Seconds after which a request is given up.")]
MaxUpload = Annotated[int, typer.Option("--max-upload-mb", min=1, max=4096, help="Size of the largest request, in MiB.")]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1, max=256, help="Number of pictures that are computed side by side. Default: the cores, 4 at most.", show_default=False
    ),
]
IndexFile = Annotated[Path | None, typer.Option("--index", help="Index for similar pictures, from `search index`.", show_default=False)]
Engine = Annotated[str, typer.Option(help=f"What runs the graphs: {' or '.join(ENGINES)}. triton is a Triton Inference Server.")]
TritonUrl = Annotated[
    str | None, typer.Option(help="--engine triton: HOST:PORT of the server, its port for gRPC.", metavar="HOST:PORT", show_default=False)
]
TritonCa = Annotated[
    Path | None, typer.Option(help="--engine triton: PEM file of authorities. The server is then asked over TLS.", show_default=False)
]
Open = Annotated[bool, typer.Option("--open", help="Open the page in the browser.")]


def serve(
    host: Host = "127.0.0.1",
    port: Port = 8765,
    token_file: TokenFile = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    client_ca: ClientCa = None,
    allow_host: AllowHost = None,
    queue: Queue = 64,
    timeout: Timeout = 30.0,
    max_upload: MaxUpload = 256,
    threads: Threads = None,
    index: IndexFile = None,
    bundle: Bundle = None,
    device: Device = "auto",
    engine: Engine = ENGINES[0],
    triton_url: TritonUrl = None,
    triton_ca: TritonCa = None,
    open_page: Open = False,
) -> None:
    """Answer questions over HTTP, and serve a page to ask them on.

    pmclip-deploy serve --open
    """
    need_extra("ward", "serve", *NEEDS)
    _check_engine(engine, triton_url, triton_ca, device)
    from pmclip_deploy.serve.settings import Settings, token_from_file
    from pmclip_deploy.threads import cpu_threads

    settings = Settings(
        host=host,
        port=port,
        names=tuple(allow_host or ()),
        tls_cert=tls_cert,
        tls_key=tls_key,
        client_ca=client_ca,
        queue=queue,
        threads=threads or min(cpu_threads(), MOST_THREADS),
        timeout_s=timeout,
        max_upload=max_upload << 20,
        token=secrets.token_urlsafe(32) if token_file is None else token_from_file(token_file),
    )
    settings.check()

    if triton_url is not None:
        from pmclip_deploy.serve.triton import predictor_from_triton

        predictor = predictor_from_triton(bundle, triton_url, timeout, triton_ca)
    else:
        from pmclip_deploy.opening import load

        predictor = load(bundle, device)
    print_notes(predictor)
    opened = None
    if index is not None:
        from pmclip_deploy.search.index import index_from_file

        opened = index_from_file(index)
        opened.refuse_other_bundle(predictor.model.bundle, predictor.model.sha256)
    from pmclip_deploy.serve.server import serve as run

    def started(url: str) -> None:
        link = url if token_file is not None else f"{url}#token={settings.token}"
        print_note(f"{RESEARCH_ONLY} Open {link}")
        if open_page:
            import webbrowser

            webbrowser.open(link)

    run(predictor, settings, opened, started)


def _check_engine(engine: str, url: str | None, ca: Path | None, device: str) -> None:
    check_choice("engine", engine, ENGINES)
    if engine == "local":
        if url is not None or ca is not None:
            raise UsageError("--triton-url and --triton-ca are for --engine triton", "add --engine triton, or leave them out")
        return
    if url is None or not re.fullmatch(r"[\w.-]+:\d{1,5}|\[[0-9a-fA-F:]+\]:\d{1,5}", url):
        raise UsageError("--engine triton needs the server's address", "give --triton-url HOST:PORT, without http://")
    if ca is not None and not ca.is_file():
        raise UsageError(f"--triton-ca {ca}: no such file", "check the path")
    if device != "auto":
        raise UsageError("--device is for --engine local", "leave it out: the server's repository says where the graphs run")
    need_extra("triton", "--engine triton", "tritonclient")
