"""The command `elision serve`."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import secrets
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from elision.errors import ElisionError, MissingDependency, OptionError

DEMO_CONFIG = Path(__file__).parent / "semantic" / "demo.yaml"


def serve(
    upstream: Annotated[str | None, typer.Option(help="Base URL of an OpenAI-compatible server.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with policies and everything else.")] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Start a local SmolLM2 as the upstream: nothing else needed.")
    ] = False,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8400,
    store: Annotated[
        str | None, typer.Option(help="sqlite:PATH, :memory: or redis://... instead of the file's.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Check the configuration and stop.")] = False,
) -> None:
    """A category-aware semantic cache in front of any OpenAI-compatible server."""
    console = Console(stderr=True)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    try:
        _serve(console, upstream, config, demo, host, port, store, check)
    except ElisionError as error:
        console.print("error", style="bold red", end=" ")
        # Not markup: messages quote what the user wrote, brackets included.
        console.print(str(error), highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(2) from error


def _serve(
    console: Console,
    upstream: str | None,
    config: Path | None,
    demo: bool,
    host: str,
    port: int,
    store: str | None,
    check: bool,
) -> None:
    try:
        from elision.serving.semantic.config import ServeConfig
        from elision.serving.semantic.policies import checked
        from elision.serving.semantic.proxy.admin import Grant
        from elision.serving.semantic.proxy.app import Proxy
        from elision.serving.semantic.proxy.server import listen, own_process, running, server
    except ImportError as error:
        if isinstance(error, ElisionError):
            raise
        raise MissingDependency(f"serving needs more packages ({error.name}): pip install 'elision[serve]'") from error
    if demo == (upstream is not None):
        raise OptionError("give either --upstream URL or --demo")
    settings = ServeConfig.read(config or DEMO_CONFIG) if demo or config else ServeConfig()
    if store is not None:
        # Checked again as a whole: a URL of no known kind must not wait for the first request.
        settings = settings.model_copy(
            update={"store": checked(type(settings.store), {**settings.store.model_dump(), "url": store}, "--store")}
        )
    if check:
        console.print("the configuration is good")
        return
    own_process()
    grants, token = [], None
    if not settings.admin.tokens:
        token = secrets.token_urlsafe(24)
        grants = [Grant(hashlib.sha256(token.encode()).digest(), None)]
    with contextlib.ExitStack() as stack:
        if demo:
            from elision.serving.semantic.proxy.demo import MODEL, Generator, demo_app

            with console.status("loading SmolLM2 and MiniLM"):
                upstream = stack.enter_context(running(demo_app(Generator())))
        proxy = Proxy(upstream or "", settings, grants=grants)
        sock = stack.enter_context(contextlib.closing(listen(host, port)))
        base = f"http://{host}:{sock.getsockname()[1]}"
        console.print(f"elision serve: [bold]{base}/v1[/] in front of {upstream}", highlight=False)
        console.print(
            f"dashboard: {base}/dashboard" + (f"#token={token}" if token else ""), highlight=False, soft_wrap=True
        )
        if token is not None:
            console.print("(no admin.tokens are configured: the token above is good until this process ends)")
        if demo:
            console.print(
                f"try: OpenAI(base_url='{base}/v1', api_key='any'), model='{MODEL}'", highlight=False, markup=False
            )
        server(proxy.app).run(sockets=[sock])


def main() -> None:
    """`python -m elision.serving`: the command on its own."""
    typer.run(serve)
