"""``rowmill serve``: the HTTP API."""

from __future__ import annotations

import importlib.util
from typing import Annotated

import typer

from pipeline.cli import errors, output
from pipeline.cli.command import Invocation, command
from pipeline.cli.interrupts import service_interrupts
from storage.errors import EngineMissing


@command
def serve(
    invocation: Invocation,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="Port; 0 is any free one.")] = 8080,
    embedded: Annotated[
        bool, typer.Option("--embedded", help="Run the jobs in this process: no broker and no worker is needed.")
    ] = False,
) -> int:
    """Serve the HTTP API: /api/v1 (jobs), /v1 (OpenAI's batch API), /docs. Runs until it is stopped.

    Callers need a key of a tenant ('rowmill key create'). Any number of them may serve one database. Ctrl-C or SIGTERM
    lets running requests end; with --embedded, what its jobs have finished is flushed, and the next start goes on.
    """
    invocation.set_up_logging(service=True)  # before the imports, which take a second
    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None:
        raise EngineMissing("the gateway is not installed: pip install 'rowmill[gateway]'")
    from pipeline.gateway.server import Server, check, listen, url_of

    settings = invocation.loaded.settings
    with listen(host, port) as listener:
        check(settings, listener, embedded=embedded)
        url = url_of(listener)

        def ready() -> None:
            if invocation.as_json:
                output.emit_json({"url": url})
            invocation.notice(f"serving {url} (/api/v1, /v1, {url}/docs); Ctrl-C ends it")

        server = Server(settings, listener, embedded=embedded, ready=ready)
        with service_interrupts(invocation, server.stop):
            return errors.OK if server.serve_here() else errors.ERROR
