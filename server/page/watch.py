"""Keeps the registry true, the reports of ended runs written and the page's view of sites fresh while the page runs."""

from __future__ import annotations

import logging
import threading
from typing import Self

from server.overview import look
from server.page.app import Page

logger = logging.getLogger(__name__)

EVERY_SEC = 3.0


class Watch:
    """A thread that reconciles the runs, writes their reports and looks at processes and sites, again and again, whatever goes wrong."""

    def __init__(self, page: Page, every_sec: float = EVERY_SEC) -> None:
        self._page, self._every_sec = page, every_sec
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._told = ""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(timeout=30.0)

    def turn(self) -> None:
        """One look at everything. A trouble is logged, once while it stays the same, and the next turn tries again."""
        try:
            try:
                self._page.overview = look(self._page.runs.folder, self._page.registry)
            finally:  # a bad key in `sites/` must leave no run open, nor without its report
                self._page.runs.reconcile()
                self._page.runs.write_reports()
            self._told = ""
        except Exception as error:  # a thread that died would leave the page with old news for ever
            if str(error) != self._told:
                logger.exception("the sites and runs could not be looked at")
            self._told = str(error)

    def _watch(self) -> None:
        while not self._end.is_set():
            self.turn()
            self._end.wait(self._every_sec)
