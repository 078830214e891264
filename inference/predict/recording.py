"""Results on their way through the site's monitor of drift (`pneumofed monitor`), which must not stop them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pneumofed.common.errors import PneumofedError
from pneumofed.inference.predict.predict import FileResult

if TYPE_CHECKING:
    from pneumofed.inference.monitor.monitor import Monitor


@dataclass
class Recorder:
    """Puts judgements into `monitor`, in their order, as of today; after the first failure, which `tell` is called with, no more.

    Attributes:
        recorded: images that the monitor has taken.
    """

    monitor: Monitor
    tell: Callable[[str], None]
    recorded: int = 0

    def pass_on(self, results: Iterable[FileResult]) -> Iterator[FileResult]:
        """Passes `results` on as they are, and records those that were judged."""
        works = True
        for result in results:
            if works:
                works = self._record(result)
            yield result

    def _record(self, result: FileResult) -> bool:
        if result.judgement is None or result.loaded.image is None:
            return True
        try:
            self.monitor.record(result.judgement, result.loaded.image.info, patient=result.loaded.patient)
        except (PneumofedError, OSError) as error:
            self.tell(f"--monitor: stopped after {self.recorded} images, judging goes on: {_sentence(error)}")
            return False
        self.recorded += 1
        return True


def _sentence(error: PneumofedError | OSError) -> str:
    return str(error) if isinstance(error, PneumofedError) else type(error).__name__
