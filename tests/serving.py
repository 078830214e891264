"""An ASGI application served by a real server, for tests with a browser."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn


@contextmanager
def serving(app: Any, **settings: Any) -> Iterator[str]:
    """Address of `app` on a free port of loopback; `settings` are uvicorn's."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, **{"log_level": "error", **settings}))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.05)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()
