"""The cache of decoded images: rows in the order asked for, each image decoded once, damage repaired."""

from __future__ import annotations

import multiprocessing
import resource
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pneumofed.common.config.experiment import ImageConfig
from pneumofed.common.data import cache
from pneumofed.common.data.cache import load_block
from pneumofed.common.data.manifest import Manifest
from pneumofed.common.errors import DataError, ImageError, SkipReason
from pneumofed.common.imaging.images import fit_square, read_image
from pneumofed.common.imaging.types import Image

IMAGE = ImageConfig(size_px=32)
MakeSite = Callable[[int], Manifest]


def _wanted(manifest: Manifest) -> dict[str, Path]:
    return {f"digest-{record.path.name}": record.path for record in manifest.records}


def _expected(wanted: dict[str, Path], image: ImageConfig = IMAGE) -> np.ndarray:
    images = [fit_square(read_image(path).pixels, image.size_px, image.fit) for path in wanted.values()]
    return np.rint(np.stack(images) * 255).astype(np.uint8)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were decoded, in order."""
    files: list[Path] = []

    def record(path: Path) -> Image:
        files.append(path)
        return read_image(path)

    monkeypatch.setattr(cache, "read_image", record)
    return files


def _files(folder: Path, suffix: str) -> list[Path]:
    return [file for file in folder.rglob("*") if file.suffix == suffix]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_rows_are_the_images_in_the_order_asked_for(make_site: MakeSite, tmp_path: Path, workers: int, fit: Any) -> None:
    image = ImageConfig(size_px=40, fit=fit)
    wanted = _wanted(make_site(70))
    for _ in ("built", "read"):
        block = load_block(wanted, image, tmp_path / "cache", workers)
        assert block.digests == tuple(wanted)
        assert block.stored
        assert isinstance(block.pixels, np.memmap)
        np.testing.assert_array_equal(block.pixels, _expected(wanted, image))


def test_an_image_is_decoded_once(make_site: MakeSite, tmp_path: Path, decoded: list[Path]) -> None:
    wanted = _wanted(make_site(5))
    for _ in range(3):
        load_block(wanted, IMAGE, tmp_path, 1)
    assert sorted(decoded) == sorted(wanted.values())


def test_images_that_come_later_are_decoded_alone_and_replace_the_older_block(
    make_site: MakeSite, tmp_path: Path, decoded: list[Path]
) -> None:
    wanted = _wanted(make_site(6))
    load_block(dict(list(wanted.items())[1:4]), IMAGE, tmp_path, 1)
    block = load_block(wanted, IMAGE, tmp_path, 1)
    assert sorted(decoded) == sorted(wanted.values())
    np.testing.assert_array_equal(block.pixels, _expected(wanted))
    assert len(_files(tmp_path, ".pixels")) == 1


def test_a_part_of_what_is_cached_is_copied_and_leaves_the_whole(
    make_site: MakeSite, tmp_path: Path, decoded: list[Path]
) -> None:
    wanted = _wanted(make_site(6))
    load_block(wanted, IMAGE, tmp_path, 1)
    part = dict(list(wanted.items())[4:1:-1])
    np.testing.assert_array_equal(load_block(part, IMAGE, tmp_path, 1).pixels, _expected(part))
    load_block(wanted, IMAGE, tmp_path, 1)
    assert len(decoded) == 6
    assert len(_files(tmp_path, ".pixels")) == 2


def test_another_preprocessing_has_images_of_its_own(make_site: MakeSite, tmp_path: Path, decoded: list[Path]) -> None:
    wanted = _wanted(make_site(2))
    images = [ImageConfig(size_px=32), ImageConfig(size_px=32, fit="crop"), ImageConfig(size_px=48)]
    for image in images * 2:
        np.testing.assert_array_equal(load_block(wanted, image, tmp_path, 1).pixels, _expected(wanted, image))
    assert len(decoded) == 2 * len(images)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _append(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"x")


@pytest.mark.parametrize("suffix", [".pixels", ".json"])
@pytest.mark.parametrize("damage", [_cut, _halve, _flip_a_bit, _append, Path.unlink], ids=lambda damage: damage.__name__)
def test_a_damaged_block_is_built_again(
    make_site: MakeSite, tmp_path: Path, suffix: str, damage: Callable[[Path], None], decoded: list[Path]
) -> None:
    wanted = _wanted(make_site(3))
    load_block(wanted, IMAGE, tmp_path, 1)
    damage(_files(tmp_path, suffix)[0])
    for _ in ("rebuilt", "read"):
        block = load_block(wanted, IMAGE, tmp_path, 1)
        assert block.digests == tuple(wanted)
        np.testing.assert_array_equal(block.pixels, _expected(wanted))
    assert len(decoded) == 6


def test_a_damaged_block_is_not_copied_from(make_site: MakeSite, tmp_path: Path) -> None:
    wanted = _wanted(make_site(3))
    load_block(dict(list(wanted.items())[:2]), IMAGE, tmp_path, 1)
    _flip_a_bit(_files(tmp_path, ".pixels")[0])
    np.testing.assert_array_equal(load_block(wanted, IMAGE, tmp_path, 1).pixels, _expected(wanted))


def test_a_bad_image_is_remembered_with_its_reason(make_site: MakeSite, tmp_path: Path, decoded: list[Path]) -> None:
    manifest = make_site(4)
    _halve(manifest.records[1].path)
    manifest.records[2].path.write_text("no image")
    wanted = _wanted(manifest)
    for _ in range(2):
        block = load_block(wanted, IMAGE, tmp_path, 1)
        assert block.digests == ("digest-0.png", "digest-3.png")
        assert set(block.refused) == {"digest-1.png", "digest-2.png"}
        assert block.refused["digest-2.png"] == SkipReason.UNKNOWN_FORMAT
    assert len(decoded) == 4


def test_bad_images_alone_give_a_block_without_rows(make_site: MakeSite, tmp_path: Path) -> None:
    manifest = make_site(1)
    manifest.records[0].path.write_text("no image")
    for _ in range(2):
        assert load_block(_wanted(manifest), IMAGE, tmp_path, 1).pixels.shape == (0, 32, 32)


def test_an_image_that_could_not_be_opened_is_tried_again(
    make_site: MakeSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[Path]
) -> None:
    wanted = _wanted(make_site(3))
    lost = list(wanted.values())[1]

    def fail_once(path: Path) -> Image:
        if path == lost:
            raise ImageError(SkipReason.UNREADABLE)
        return read_image(path)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "read_image", fail_once)
        assert load_block(wanted, IMAGE, tmp_path, 1).refused == {"digest-1.png": SkipReason.UNREADABLE}
    block = load_block(wanted, IMAGE, tmp_path, 1)
    assert decoded == [lost]
    np.testing.assert_array_equal(block.pixels, _expected(wanted))


@pytest.mark.parametrize("reason", [SkipReason.OUT_OF_MEMORY, SkipReason.NO_DECODER])
def test_what_the_machine_lacked_is_tried_again(
    make_site: MakeSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: SkipReason
) -> None:
    def fail(path: Path) -> Image:
        raise ImageError(reason)

    wanted = _wanted(make_site(3))
    with monkeypatch.context() as patch:
        patch.setattr(cache, "read_image", fail)
        assert set(load_block(wanted, IMAGE, tmp_path, 1).refused.values()) == {reason}
    assert not load_block(wanted, IMAGE, tmp_path, 1).refused


def test_refused_images_are_tried_again_with_another_decoder_or_when_they_are_forgotten(
    make_site: MakeSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[Path]
) -> None:
    manifest = make_site(4)
    bad = manifest.records[2].path
    bad.write_text("no image")
    wanted = _wanted(manifest)
    load_block(wanted, IMAGE, tmp_path, 1)
    monkeypatch.setattr(cache, "decoder_version", lambda: "another")
    load_block(wanted, IMAGE, tmp_path, 1)
    load_block(wanted, IMAGE, tmp_path, 1)
    assert decoded[4:] == [bad]
    assert [cache.forget_refused(tmp_path), cache.forget_refused(tmp_path)] == [1, 0]
    block = load_block(wanted, IMAGE, tmp_path, 1)
    assert decoded[4:] == [bad, bad]
    assert block.refused == {"digest-2.png": SkipReason.UNKNOWN_FORMAT}
    assert len(block.digests) == 3


def _load_and_count(images: Path, folder: Path, log: Path, start: Barrier) -> None:
    """What each of two processes does: loads the block, writing a byte to `log` for each image that it decodes."""

    def count(path: Path) -> Image:
        with log.open("ab") as file:
            file.write(b".")
        time.sleep(0.005)
        return read_image(path)

    cache.read_image = count  # type: ignore[assignment]
    wanted = {file.name: file for file in sorted(images.iterdir())}
    start.wait(60)
    block = load_block(wanted, IMAGE, folder, 1)
    np.testing.assert_array_equal(block.pixels, _expected(wanted))


def test_of_two_processes_that_build_at_once_one_does_the_work(make_site: MakeSite, tmp_path: Path) -> None:
    count = len(make_site(40).records)
    context = multiprocessing.get_context("spawn")
    arguments = (tmp_path / "images", tmp_path / "cache", tmp_path / "log", context.Barrier(2))
    processes = [context.Process(target=_load_and_count, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert (tmp_path / "log").stat().st_size == count


@contextmanager
def _limited_file_size(limit_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_when_writing_fails_for_want_of_space_the_images_are_kept_in_memory(make_site: MakeSite, tmp_path: Path) -> None:
    wanted = _wanted(make_site(40))
    with _limited_file_size(8 * 32 * 32):
        block = load_block(wanted, IMAGE, tmp_path / "cache", 1)
    assert not block.stored
    np.testing.assert_array_equal(block.pixels, _expected(wanted))
    assert [file.name for file in (tmp_path / "cache").rglob("*") if file.is_file()] in ([], ["lock"])


def test_a_disk_known_to_be_too_small_is_not_written_to(
    make_site: MakeSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[Path]
) -> None:
    wanted = _wanted(make_site(3))
    usage = cache.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage._replace(free=3 * 32 * 32 - 1))
    assert not load_block(wanted, IMAGE, tmp_path, 1).stored
    assert len(decoded) == 3


def test_a_folder_that_cannot_be_written_says_so(make_site: MakeSite, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file in the way")
    with pytest.raises(DataError, match="cannot be written"):
        load_block(_wanted(make_site(1)), IMAGE, tmp_path / "cache", 1)


@pytest.mark.parametrize("stop_at", [0, 2, 4])
def test_ctrl_c_leaves_no_part_of_a_block(
    make_site: MakeSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    wanted = _wanted(make_site(5))
    folder = tmp_path / "cache"

    def interrupt(path: Path) -> Image:
        if path == list(wanted.values())[stop_at]:
            raise KeyboardInterrupt
        return read_image(path)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "read_image", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load_block(wanted, IMAGE, folder, 1)
    assert {file.name for file in folder.rglob("*") if file.is_file()} <= {"lock"}
    np.testing.assert_array_equal(load_block(wanted, IMAGE, folder, 1).pixels, _expected(wanted))


def test_what_a_killed_process_left_is_removed(make_site: MakeSite, tmp_path: Path) -> None:
    manifest = make_site(2)
    load_block(_wanted(manifest.subset([0])), IMAGE, tmp_path / "cache", 1)
    leftover = next((tmp_path / "cache").iterdir()) / ".name.pixels.abc123"
    leftover.write_bytes(b"half")
    load_block(_wanted(manifest), IMAGE, tmp_path / "cache", 1)
    assert not leftover.exists()


def test_the_cache_is_for_its_owner_alone(make_site: MakeSite, tmp_path: Path) -> None:
    load_block(_wanted(make_site(2)), IMAGE, tmp_path / "cache", 1)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "cache").rglob("*") if file.is_file()}
    assert modes == {0o600}
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in (tmp_path / "cache").iterdir()} == {0o700}
