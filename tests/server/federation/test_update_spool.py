"""Updates that wait on the disk: the same bits as in memory, and memory that does not grow with the number of sites."""

from __future__ import annotations

import errno
import gc
import os
import tracemalloc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ConfigRecord

from pneumofed.common.config.choices import StrategyName
from pneumofed.common.config.experiment import StrategyConfig
from pneumofed.common.errors import DataError
from pneumofed.common.wire.messages import ModelArrays, Update, pack_arrays
from pneumofed.server.federation import update_spool
from pneumofed.server.federation.drift import SummedCorrections
from pneumofed.server.federation.replies import UpdateChecks
from pneumofed.server.federation.strategies import aggregate, build_strategy
from pneumofed.server.federation.update_spool import IN_MEMORY, SpooledArray, UpdateSpool, columns
from tests.server.federation.test_strategies import ALL
from tests.server.federation.updates import LAYOUT, as_reply, full_update, small_update, take_identity, zeros

LENGTH = 30_000
UPDATE_BYTES = 4 * LENGTH
QUICK = ("fedavg", "fedmedian", "fedyogi")
"""Of the strategies that read one update after the other, all of some columns, and one after the other with a state of their own."""
START = ModelArrays(np.linspace(-1, 1, LENGTH, dtype=np.float32), np.ones(6, np.float32))


@pytest.fixture(autouse=True)
def _identity() -> None:
    take_identity()


def site_updates(sites: int) -> Iterator[Update]:
    for number in range(sites):
        generator = np.random.default_rng(number)
        parameters = START.parameters + np.float32(0.01) * generator.standard_normal(LENGTH, np.float32)
        yield small_update(f"site-{number:03d}", parameters, 1 + generator.random(6), 10 + number)  # type: ignore[arg-type]


def one_round(name: StrategyName, spool: UpdateSpool, sites: int, order: int = 1) -> ModelArrays:
    strategy = build_strategy(StrategyConfig(name=name, malicious_sites=2), weight=lambda _, images: 3.0 + images / 7)
    if isinstance(strategy, SummedCorrections):
        strategy.meet({f"site-{number:03d}": 10 + number for number in range(sites)})
    strategy.configure_train(1, pack_arrays(START), ConfigRecord(), None)  # type: ignore[arg-type]
    kept = [spool.keep(update) for update in site_updates(sites)]
    return aggregate(strategy, 1, kept[::order])


def peak_in_updates(name: StrategyName, folder: Path, sites: int) -> float:
    """The peak of memory of a round, in updates."""
    gc.collect()
    tracemalloc.start()
    one_round(name, UpdateSpool(folder), sites)
    peak = tracemalloc.get_traced_memory()[1] / UPDATE_BYTES
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("name", ALL)
def test_updates_on_the_disk_give_the_bits_of_updates_in_memory(name: StrategyName, tmp_path: Path) -> None:
    sites = 11
    memory = one_round(name, UpdateSpool(tmp_path, in_memory=sites), sites)
    for order in (1, -1):
        disk = one_round(name, UpdateSpool(tmp_path, in_memory=2), sites, order)
        assert disk.parameters.tobytes() == memory.parameters.tobytes()
        assert disk.statistics.tobytes() == memory.statistics.tobytes()


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ALL if "krum" not in name]
)
def test_memory_is_the_same_for_eight_sites_and_for_many(
    name: StrategyName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update_spool, "COLUMN_BYTES", 2 * UPDATE_BYTES)
    few, many = (peak_in_updates(name, tmp_path, sites) for sites in (8, 28))
    assert many - few < 20 * 0.15  # a site's message, names and numbers; an update is 1
    assert many < IN_MEMORY + 16


def test_median_and_trimmed_mean_do_not_depend_on_the_width_of_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("fedmedian", "fedtrimmedavg"):
        whole = one_round(name, UpdateSpool(tmp_path), 11)
        for size in (20_000, UPDATE_BYTES):
            monkeypatch.setattr(update_spool, "COLUMN_BYTES", size)
            narrow = one_round(name, UpdateSpool(tmp_path), 11)
            assert narrow.parameters.tobytes() == whole.parameters.tobytes()


@pytest.mark.parametrize("length", [1, 2, 3, 5, 1000])
def test_blocks_of_columns_are_the_whole_and_never_one_column(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update_spool, "COLUMN_BYTES", 30)
    vectors = np.arange(3 * length, dtype=np.float32).reshape(3, length)
    blocks = list(columns([Array(row) for row in vectors]))
    np.testing.assert_array_equal(np.concatenate(blocks, axis=1), vectors)
    assert all(block.shape[1] > 1 or length == 1 for block in blocks)


def test_checked_updates_beyond_the_first_few_are_not_in_memory(tmp_path: Path) -> None:
    names = [f"site-{number}" for number in range(IN_MEMORY + 3)]
    presences = {name: full_update(name).presence for name in names}
    checks = UpdateChecks(zeros(), LAYOUT, presences, StrategyConfig(), spool=UpdateSpool(tmp_path))
    assert all(checks.take(name, as_reply(full_update(name))) for name in names)
    good, _ = checks.close()
    spooled = [name for name, update in good.items() if isinstance(update.record["parameters"], SpooledArray)]
    assert spooled == names[IN_MEMORY:]
    for name in names:
        np.testing.assert_array_equal(good[name].arrays.parameters, full_update(name).arrays.parameters)
        assert good[name].nbytes == full_update(name).nbytes


def test_nothing_stays_on_the_disk_and_no_file_has_a_name(tmp_path: Path) -> None:
    spool = UpdateSpool(tmp_path, in_memory=0)
    kept = [spool.keep(update) for update in site_updates(3)]
    file = weakref.ref(spool._file)
    assert list(tmp_path.iterdir()) == []
    del spool
    np.testing.assert_array_equal(kept[2].arrays.parameters, list(site_updates(3))[2].arrays.parameters)
    del kept
    gc.collect()
    assert file() is None


class FullDisk:
    """A file that cannot be written."""

    def __init__(self, number: int) -> None:
        self._number = number

    def seek(self, *_: Any) -> int:
        return 0

    def write(self, _: Any) -> int:
        raise OSError(self._number, os.strerror(self._number))


def test_on_a_full_disk_updates_stay_in_memory_and_another_error_is_named(tmp_path: Path) -> None:
    spool, update = UpdateSpool(tmp_path, in_memory=0), next(site_updates(1))
    spool._file = FullDisk(errno.ENOSPC)
    assert spool.keep(update) is update
    spool._file = FullDisk(errno.EACCES)
    with pytest.raises(DataError, match="cannot be written"):
        spool.keep(update)
