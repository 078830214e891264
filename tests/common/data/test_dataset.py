"""A manifest as arrays: rows, subsets, labels without a class, files that cannot be read."""

from __future__ import annotations

import csv
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pneumofed.common.config.experiment import ImageConfig
from pneumofed.common.data import cache
from pneumofed.common.data.dataset import load_dataset
from pneumofed.common.data.manifest import DataWarning, ImageRecord, Manifest
from pneumofed.common.data.sources.public_sets import read_kaggle
from pneumofed.common.errors import EmptySiteError, SkipReason
from tests.common.data.conftest import write_image
from tests.tiny import draw_manifest

IMAGE = ImageConfig(size_px=32)
MakeSite = Callable[[int], Manifest]


def _forbid_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise AssertionError("an image was decoded again")

    monkeypatch.setattr(cache, "read_image", refuse)


def _relabel(manifest: Manifest, *labels: str) -> Manifest:
    return Manifest(tuple(replace(record, label=label) for record, label in zip(manifest.records, labels, strict=True)))


def test_rows_follow_the_manifest(make_site: MakeSite, tmp_path: Path) -> None:
    manifest = make_site(6)
    dataset = load_dataset(manifest, "binary", IMAGE, tmp_path / "cache")
    assert dataset.pixels.shape == (6, 32, 32)
    assert dataset.pixels.dtype == np.uint8
    assert dataset.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert dataset.labels.dtype == np.int64
    assert dataset.patients == manifest.patients
    for row, record in zip(dataset.pixels, manifest.records, strict=True):
        np.testing.assert_array_equal(row, cache.decode_for_cache(record.path, IMAGE))


def test_a_subset_keeps_what_belongs_together(make_site: MakeSite, tmp_path: Path) -> None:
    whole = load_dataset(make_site(6), "binary", IMAGE, tmp_path / "cache")
    part = whole.subset([4, 1])
    assert len(part) == 2
    assert part.labels.tolist() == [0, 1]
    assert part.patients == ("p4", "p1")
    assert part.digests == (whole.digests[4], whole.digests[1])
    np.testing.assert_array_equal(part.pixels, np.stack([whole.pixels[4], whole.pixels[1]]))


def test_labels_without_a_class_are_counted_and_left_out(make_site: MakeSite, tmp_path: Path) -> None:
    manifest = _relabel(make_site(6), "normal", "bacterial", "viral", "pneumonia", "banana", "")
    three = load_dataset(manifest, "three_class", IMAGE, tmp_path / "cache")
    assert three.labels.tolist() == [0, 1, 2]
    assert three.report.skipped == {SkipReason.UNKNOWN_LABEL: 2, SkipReason.NO_LABEL: 1}
    binary = load_dataset(manifest, "binary", IMAGE, tmp_path / "cache")
    assert binary.labels.tolist() == [0, 1, 1, 1]
    assert binary.report.classes == {"normal": 1, "pneumonia": 3}


def test_a_bad_file_costs_the_site_that_file_alone(make_site: MakeSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make_site(6)
    paths = [record.path for record in manifest.records]
    paths[0].unlink()
    paths[1].write_bytes(b"")
    paths[2].write_bytes(paths[2].read_bytes()[:200])
    paths[3].write_text("a letter")
    reasons = [SkipReason.MISSING, SkipReason.EMPTY, SkipReason.CORRUPT, SkipReason.UNKNOWN_FORMAT]
    first = load_dataset(manifest, "binary", IMAGE, tmp_path / "cache")
    assert first.patients == ("p4", "p5")
    assert first.report.skipped == Counter(reasons)
    rows = list(csv.DictReader((tmp_path / "cache" / "skipped.csv").open()))
    assert [(row["path"], row["reason"]) for row in rows] == [
        (str(path), reason.value) for path, reason in zip(paths, reasons, strict=False)
    ]
    _forbid_decoding(monkeypatch)
    again = load_dataset(manifest, "binary", IMAGE, tmp_path / "cache")
    assert again.report == first.report
    np.testing.assert_array_equal(again.pixels, first.pixels)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["normal", "viral", "", "x"]), st.booleans()), max_size=12))
def test_every_image_is_used_or_counted_with_a_reason(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, str, bool]]
) -> None:
    folder = tmp_path_factory.mktemp("site")
    records = [ImageRecord(write_image(folder / f"{n}.png", seed), f"p{seed}", label) for n, (seed, label, _) in enumerate(rows)]
    for record, (_, _, is_bad) in zip(records, rows, strict=True):
        if is_bad:
            record.path.write_bytes(b"x")
    good = {seed for seed, label, is_bad in rows if label in ("normal", "viral") and not is_bad}
    if not good:
        with pytest.raises(EmptySiteError):
            load_dataset(Manifest(tuple(records)), "binary", IMAGE, folder / "cache")
        return
    dataset = load_dataset(Manifest(tuple(records)), "binary", IMAGE, folder / "cache")
    report = dataset.report
    assert report.used + report.skipped.total() == report.found == len(rows)
    assert report.used == len(dataset) == len(good) == len(set(dataset.digests)) == report.patients
    assert report.classes.total() == report.used


def test_the_same_content_counts_once(make_site: MakeSite, tmp_path: Path) -> None:
    manifest = make_site(3)
    copy, other = tmp_path / "copy.png", tmp_path / "other.png"
    shutil.copy(manifest.records[0].path, copy)
    shutil.copy(manifest.records[1].path, other)
    more = (replace(manifest.records[0], path=copy), replace(manifest.records[1], path=other, label="normal"))
    dataset = load_dataset(Manifest(manifest.records + more), "binary", IMAGE, tmp_path / "cache")
    assert dataset.patients == ("p0", "p1", "p2")
    assert dataset.labels.tolist() == [0, 1, 0]
    assert dataset.report.skipped == {SkipReason.DUPLICATE: 2}
    assert dataset.report.warnings[DataWarning.CONFLICTING_DUPLICATE] == 1


def test_a_class_without_images_is_said(make_site: MakeSite, tmp_path: Path) -> None:
    dataset = load_dataset(make_site(4).subset([0, 2]), "binary", IMAGE, tmp_path / "cache")
    assert dataset.report.warnings[DataWarning.EMPTY_CLASS] == 1
    assert dataset.report.public()["classes"] == {"normal": 2, "pneumonia": 0}


def test_a_site_without_a_usable_image_says_why_and_names_none(make_site: MakeSite, tmp_path: Path) -> None:
    manifest = make_site(2)
    for record in manifest.records:
        record.path.write_text("no image")
    with pytest.raises(EmptySiteError, match=r"not a DICOM, JPEG, PNG, TIFF, BMP or WebP file \(2\)") as caught:
        load_dataset(manifest, "binary", IMAGE, tmp_path / "cache")
    assert manifest.records[0].path.name not in str(caught.value)


def test_an_empty_manifest_says_so(tmp_path: Path) -> None:
    with pytest.raises(EmptySiteError, match="the manifest is empty"):
        load_dataset(Manifest(()), "binary", IMAGE, tmp_path / "cache")


def test_moved_images_are_known_by_their_content(make_site: MakeSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make_site(3)
    load_dataset(manifest, "binary", IMAGE, tmp_path / "cache")
    (tmp_path / "images").rename(tmp_path / "moved")
    moved = Manifest(tuple(replace(record, path=tmp_path / "moved" / record.path.name) for record in manifest.records))
    _forbid_decoding(monkeypatch)
    assert load_dataset(moved, "binary", IMAGE, tmp_path / "cache").patients == manifest.patients


def test_a_changed_image_is_decoded_again(make_site: MakeSite, tmp_path: Path) -> None:
    manifest = make_site(2)
    load_dataset(manifest, "binary", IMAGE, tmp_path / "cache")
    path = write_image(manifest.records[1].path, seed=99)
    os.utime(path, ns=(0, 1))
    dataset = load_dataset(manifest, "binary", IMAGE, tmp_path / "cache")
    np.testing.assert_array_equal(dataset.pixels[1], cache.decode_for_cache(path, IMAGE))


def test_a_full_disk_is_told_in_the_report_and_training_can_go_on(
    make_site: MakeSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = make_site(4)
    usage = cache.shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(cache.shutil, "disk_usage", lambda _: usage._replace(free=0))
        full = load_dataset(manifest, "binary", IMAGE, tmp_path / "cache")
    assert full.report.warnings == Counter({DataWarning.CACHE_IN_MEMORY: 1})
    freed = load_dataset(manifest, "binary", IMAGE, tmp_path / "cache")
    assert freed.report.warnings == Counter()
    np.testing.assert_array_equal(full.pixels, freed.pixels)


def test_the_order_of_the_manifest_changes_the_order_of_rows_alone(make_site: MakeSite, tmp_path: Path) -> None:
    manifest = make_site(8)
    order = random.Random(0).sample(range(8), 8)
    plain = load_dataset(manifest, "binary", IMAGE, tmp_path / "cache")
    shuffled = load_dataset(manifest.subset(order), "binary", IMAGE, tmp_path / "cache")
    np.testing.assert_array_equal(shuffled.pixels, plain.pixels[order])
    assert shuffled.report == plain.report


def test_the_kaggle_test_folder_is_read_whole(kaggle_dir: Path, tmp_path: Path) -> None:
    manifest, found = read_kaggle(kaggle_dir, ("test",))
    sample = manifest.subset(range(0, len(manifest), 8))
    dataset = load_dataset(sample, "three_class", IMAGE, tmp_path / "cache", workers=2)
    assert found.used == 624
    assert dataset.report.found == len(sample)
    assert dataset.report.used + dataset.report.skipped[SkipReason.DUPLICATE] == dataset.report.found
    assert 20 < dataset.pixels.mean() < 200


def test_a_held_out_set_keeps_its_duplicates_in_place(tmp_path: Path) -> None:
    manifest = draw_manifest(tmp_path / "images", 3, seed=0)
    twice = Manifest((*manifest.records, manifest.records[1]))
    once = load_dataset(twice, "binary", IMAGE, tmp_path / "cache")
    kept = load_dataset(twice, "binary", IMAGE, tmp_path / "cache", keep_duplicates=True)
    assert (len(once), len(kept)) == (6, 7)
    np.testing.assert_array_equal(kept.pixels[6], once.pixels[1])
    np.testing.assert_array_equal(kept.pixels[:6], once.pixels)
    assert kept.report.used == kept.report.found == 7
