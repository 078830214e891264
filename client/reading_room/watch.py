"""What the room tells the site's monitor (`pneumofed monitor`): each new case, and what a reader found. No failure there stops the room."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from client.reading_room.folder import RoomFolder
from client.reading_room.reading import JudgedFile
from client.reading_room.schema import Label
from common.errors import PneumofedError

if TYPE_CHECKING:  # SciPy, and with the bundle ONNX Runtime
    from client.monitor.monitor import Monitor
    from common.model_bundle.bundle import Bundle

logger = logging.getLogger(__name__)


def open_monitor(folder: RoomFolder, bundle: Bundle) -> Monitor | None:
    """The monitor that the room's settings name; None where they name none, or where `bundle` has no reference to compare with."""
    from client.monitor.monitor import Monitor

    if folder.settings.monitor is None:
        return None
    try:
        return Monitor.open(folder.inside(folder.settings.monitor), bundle)
    except PneumofedError as error:
        logger.warning("drift is not watched: %s", error)
        return None


class RoomMonitor:
    """The monitor as the room uses it. What goes wrong is logged by its kind, since its text may quote what is in a file.

    Args:
        monitor: of the bundle that judges; None watches nothing.
        failed: called after a failure.
    """

    def __init__(self, monitor: Monitor | None, failed: Callable[[], None]) -> None:
        self._monitor, self._failed = monitor, failed

    def judged(self, file: JudgedFile) -> int | None:
        """Records a judged image; its number in the monitor, or None if it was not recorded."""
        if self._monitor is None:
            return None
        header = file.header
        try:
            return self._monitor.record(file.judgement, file.info, patient=header.patient or header.accession or None)
        except Exception as error:
            self._tell(error)
            return None

    def read(self, image: int | None, label: Label) -> None:
        """Records what a reader found on the image of that number; nothing where he is unsure, or where the image was not recorded."""
        if self._monitor is None or image is None or label == "unsure":
            return
        try:
            self._monitor.record_reading(image, "normal" if label == "normal" else "pneumonia")
        except Exception as error:
            self._tell(error)

    def _tell(self, error: Exception) -> None:
        logger.error("the monitor of drift could not be written: %s", type(error).__name__)
        self._failed()
