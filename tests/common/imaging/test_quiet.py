"""pydicom's warnings, which may hold a patient's values, are silent within a block and in no other."""

from __future__ import annotations

import threading
import warnings

import pytest

from pneumofed.common.imaging.dicom_tags import quiet_warnings


def test_warnings_are_silent_within_and_speak_again_afterwards() -> None:
    with pytest.warns(UserWarning, match="outside") as seen:
        with quiet_warnings(), quiet_warnings():
            warnings.warn("inside", stacklevel=1)
        warnings.warn("outside", stacklevel=1)
    assert len(seen) == 1


def test_threads_that_leave_in_any_order_restore_the_filters() -> None:
    before = list(warnings.filters)
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()
    heard = []

    def first() -> None:
        with quiet_warnings():
            first_in.set()
            second_in.wait(10)
        first_out.set()

    def second() -> None:
        first_in.wait(10)
        with quiet_warnings():
            second_in.set()
            first_out.wait(10)
            heard.append(warnings.filters[0][0])

    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert heard == ["ignore"]
    assert list(warnings.filters) == before
