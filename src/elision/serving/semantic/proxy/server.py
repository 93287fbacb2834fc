"""Running ASGI applications: in the foreground for the command, in a thread for the demo, tests and benchmarks."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from elision.errors import OptionError


def own_process() -> None:
    """Settings for a process that does nothing but serve; never called by the library.

    Python lets a thread compute for 5 ms before another one gets its turn: longer than the proxy needs for a whole
    request.
    """
    sys.setswitchinterval(0.0005)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any free one.

    Raises:
        OptionError: if the address is taken or not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise OptionError(f"cannot listen on {host}:{port}: {error}; choose another --port or --host") from error
    sock.listen(2048)
    return sock


def server(app: ASGIApp) -> uvicorn.Server:
    """A uvicorn server for an application; it logs warnings only and waits 5 s for open requests at the end."""
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5, backlog=2048, access_log=False)
    return uvicorn.Server(config)


@contextlib.contextmanager
def running(app: ASGIApp, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """The base URL of an application that is served by a thread inside the `with` block.

    Raises:
        OptionError: if the address cannot be had, or the application does not start within 120 s.
    """
    sock = listen(host, port)
    it = server(app)
    thread = threading.Thread(target=it.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        for _ in range(12_000):
            if it.started:
                break
            if not thread.is_alive():
                raise OptionError("the application did not start: see the log above")
            time.sleep(0.01)
        else:
            raise OptionError("the application did not start within 120 s: see the log above")
        yield f"http://{host}:{sock.getsockname()[1]}"
    finally:
        it.should_exit = True
        thread.join(timeout=15)
        sock.close()
