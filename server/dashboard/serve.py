"""The page's process: `python -m pneumofed.server.dashboard.serve COORDINATOR`, started and stopped by `pneumofed server`.

`start_page` starts it from another process, `serve_dashboard` is what runs in it. Beside the page a `RunWatcher` keeps the registry true,
the reports of ended runs written and the page's view of sites fresh.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import Self

import httpx

from pneumofed.common.errors import FlowerError, PneumofedError
from pneumofed.common.ops.command_line import INTERRUPTED
from pneumofed.common.ops.processes import Daemon, check_port_free
from pneumofed.common.ops.web import serve_app
from pneumofed.server.dashboard.app import Dashboard
from pneumofed.server.operations.overview import observe_federation
from pneumofed.server.operations.settings import CoordinatorFolder

logger = logging.getLogger(__name__)

PAGE_START_SEC = 60.0
WATCH_SEC = 3.0


def start_page(folder: CoordinatorFolder) -> str:
    """Starts the page unless it runs, and returns its address on this machine once it answers.

    Raises:
        ConfigError: the port is taken.
        FlowerError: it does not come up; the text ends with its last words.
    """
    daemon, port = page_daemon(folder), folder.settings().loopback.page
    if daemon.pid() is None:
        check_port_free("127.0.0.1", port, "the live page")
        command = [sys.executable, "-m", "pneumofed.server.dashboard.serve", str(folder.path)]
        daemon.start(command, os.environ, folder.state)
    deadline = time.monotonic() + PAGE_START_SEC
    while time.monotonic() < deadline and daemon.pid() is not None:
        if page_answers(folder):
            return page_address(folder)
        time.sleep(0.2)
    raise FlowerError(f"the live page did not come up; {daemon.log} ends with: {daemon.last_words()}")


def page_daemon(folder: CoordinatorFolder) -> Daemon:
    """Names the page's process and where its pid file and log lie."""
    return Daemon("page", folder.state)


def page_address(folder: CoordinatorFolder) -> str:
    """Builds the page's address on this machine."""
    return f"http://127.0.0.1:{folder.settings().loopback.page}/"


def page_answers(folder: CoordinatorFolder) -> bool:
    """Says whether the page answers."""
    try:
        return httpx.get(f"{page_address(folder)}health", timeout=2.0, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def serve_dashboard(path: Path) -> None:
    """Serves until it is stopped. It listens only on loopback; the gateway shows it outside where the settings say so."""
    from pneumofed.server.dashboard.access import Access, read_visitors
    from pneumofed.server.dashboard.app import Dashboard, create_dashboard
    from pneumofed.server.operations import processes
    from pneumofed.server.runs.registry import open_registry
    from pneumofed.server.runs.runs import Runs

    folder = CoordinatorFolder(path.resolve())
    settings = folder.settings()
    page = Dashboard(Runs(folder, open_registry(folder), processes), Access(lambda: read_visitors(folder)))
    app = create_dashboard(page, ["127.0.0.1", "localhost", *settings.hosts])
    with RunWatcher(page):
        serve_app(app, "127.0.0.1", settings.loopback.page, proxy_headers=True, forwarded_allow_ips="127.0.0.1")


def main() -> None:
    """Serves the page of the coordinator folder that the command line names."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        serve_dashboard(Path(sys.argv[1]))
    except PneumofedError as error:
        sys.exit(f"pneumofed: {error}")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


class RunWatcher:
    """A thread that reconciles the runs, writes their reports and looks at processes and sites, again and again, whatever goes wrong."""

    def __init__(self, page: Dashboard, every_sec: float = WATCH_SEC) -> None:
        self._page, self._every_sec = page, every_sec
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._logged = ""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(timeout=30.0)

    def turn(self) -> None:
        """Looks at everything once. A failure is logged, once while it stays the same, and the next turn tries again."""
        try:
            try:
                self._page.overview = observe_federation(self._page.runs.folder, self._page.registry)
            finally:  # a bad key in `sites/` must leave no run open, nor without its report
                self._page.runs.reconcile()
                self._page.runs.write_reports()
            self._logged = ""
        except Exception as error:  # a thread that died would leave the page with old news for ever
            if str(error) != self._logged:
                logger.exception("the sites and runs could not be looked at")
            self._logged = str(error)

    def _watch(self) -> None:
        while not self._end.is_set():
            self.turn()
            self._end.wait(self._every_sec)


if __name__ == "__main__":
    main()
