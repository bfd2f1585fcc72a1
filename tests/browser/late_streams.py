"""A proxy that can hold back the end of what a server streams, as a browser that is too busy to listen hears it."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Stream:
    """What answers the requests of one path.

    Attributes:
        path: how it begins, in the first line of a request.
        last: what is in the piece that ends it.
        flows: while this is not set, that piece and what follows do not reach the browser.
        ended: that piece has come.
    """

    path: bytes
    last: bytes
    flows: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)


@contextlib.contextmanager
def proxy(port: int, stream: Stream) -> Iterator[str]:
    """The address of a proxy of ``127.0.0.1:port``."""
    stream.flows.set()
    with socket.create_server(('127.0.0.1', 0)) as listener:
        _in_background(_accept, listener, port, stream)
        yield f'http://127.0.0.1:{listener.getsockname()[1]}'


def _in_background(run: Callable[..., None], *args: Any) -> None:
    threading.Thread(target=run, args=args, daemon=True).start()


def _accept(listener: socket.socket, port: int, stream: Stream) -> None:
    with contextlib.suppress(OSError):
        while True:
            _in_background(_hand_on, listener.accept()[0], port, stream)


def _hand_on(browser: socket.socket, port: int, stream: Stream) -> None:
    with browser, contextlib.suppress(OSError):
        asked = browser.recv(65536)
        if not asked:  # it was opened in advance and never used
            return
        with socket.create_connection(('127.0.0.1', port)) as server:
            streams = threading.Event()
            _in_background(_answer, server, browser, stream, streams)
            while asked:
                (streams.set if stream.path in asked.partition(b'\r\n')[0] else streams.clear)()
                server.sendall(asked)
                asked = browser.recv(65536)
            server.shutdown(socket.SHUT_RDWR)


def _answer(server: socket.socket, browser: socket.socket, stream: Stream, streams: threading.Event) -> None:
    with contextlib.suppress(OSError):
        while said := server.recv(65536):
            if streams.is_set() and stream.last in said:
                stream.ended.set()
                stream.flows.wait(60)
            browser.sendall(said)
    with contextlib.suppress(OSError):
        browser.shutdown(socket.SHUT_RDWR)
