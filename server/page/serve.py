"""The page's process: `python -m server.page.serve COORDINATOR`, started and stopped by `pneumofed server`."""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path

import httpx

from common.errors import FlowerError, PneumofedError
from common.processes import Daemon, check_port_free
from server.settings import CoordinatorFolder

START_SEC = 60.0


def start_page(folder: CoordinatorFolder) -> str:
    """Starts the page unless it runs, and returns its address on this machine once it answers.

    Raises:
        ConfigError: the port is taken.
        FlowerError: it does not come up; the text ends with its last words.
    """
    daemon, port = page_daemon(folder), folder.settings().loopback.page
    if daemon.pid() is None:
        check_port_free("127.0.0.1", port, "the live page")
        command = [sys.executable, "-m", "server.page.serve", str(folder.path)]
        daemon.start(command, os.environ, folder.state)
    deadline = time.monotonic() + START_SEC
    while time.monotonic() < deadline and daemon.pid() is not None:
        if page_answers(folder):
            return page_address(folder)
        time.sleep(0.2)
    raise FlowerError(f"the live page did not come up; {daemon.log} ends with: {daemon.last_words()}")


def page_daemon(folder: CoordinatorFolder) -> Daemon:
    return Daemon("page", folder.state)


def page_address(folder: CoordinatorFolder) -> str:
    return f"http://127.0.0.1:{folder.settings().loopback.page}/"


def page_answers(folder: CoordinatorFolder) -> bool:
    try:
        return httpx.get(f"{page_address(folder)}health", timeout=2.0, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def serve(path: Path) -> None:
    """Serves until it is told to stop. It listens on loopback alone; the door shows it outside where the settings say so."""
    import uvicorn

    from server import stack
    from server.page.access import Access, read_visitors
    from server.page.app import Page, create_app
    from server.page.watch import Watch
    from server.registry.registry import open_registry
    from server.runs import Runs

    folder = CoordinatorFolder(path.resolve())
    settings = folder.settings()
    page = Page(Runs(folder, open_registry(folder), stack), Access(lambda: read_visitors(folder)))
    app = create_app(page, ["127.0.0.1", "localhost", *settings.hosts])
    with Watch(page):
        uvicorn.run(
            app, host="127.0.0.1", port=settings.loopback.page, log_level="warning", access_log=False, server_header=False,
            proxy_headers=True, forwarded_allow_ips="127.0.0.1",
        )  # fmt: skip


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        serve(Path(sys.argv[1]))
    except PneumofedError as error:
        sys.exit(f"pneumofed: {error}")


if __name__ == "__main__":
    main()
