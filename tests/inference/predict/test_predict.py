"""Finding files and judging them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pneumofed.common.errors import SkipReason
from pneumofed.common.imaging.images import read_image
from pneumofed.common.model_bundle.predictor import BATCH, Predictor
from pneumofed.common.model_bundle.series import MAX_DEPTH
from pneumofed.common.model_bundle.suitability import Reason
from pneumofed.inference.predict.predict import find_files, judge_files, map_ahead
from tests.inference.predict.pictures import STUDY, write_phantom, write_png


def _touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_folders_are_searched_in_order_without_hidden_files(tmp_path: Path) -> None:
    _touch(*(tmp_path / name for name in ("b/2.png", "a/1.dcm", "c.jpg", ".hidden", ".git/x", "DICOMDIR")))
    found = [path.relative_to(tmp_path).as_posix() for path in find_files([tmp_path])]
    assert found == ["a/1.dcm", "b/2.png", "c.jpg"]


def test_links_that_lead_back_are_followed_once(tmp_path: Path) -> None:
    _touch(tmp_path / "a" / "1.png")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "self").symlink_to(tmp_path / "self")
    assert [path.name for path in find_files([tmp_path])] == ["1.png", "self"]


def test_depth_is_bounded(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*"d" * MAX_DEPTH)
    _touch(deep / "in.png", deep / "d" / "out.png")
    assert [path.name for path in find_files([tmp_path])] == ["in.png"]


def test_a_named_file_is_given_back_even_where_it_is_missing(tmp_path: Path) -> None:
    assert list(find_files([tmp_path / "no.png"])) == [tmp_path / "no.png"]


def test_ahead_is_in_order_and_takes_no_more_than_it_may() -> None:
    taken: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    results = map_ahead(lambda number: number * number, numbers(), threads=4, ahead=8)
    assert next(results) == 0
    assert len(taken) == 8
    assert list(results) == [number * number for number in range(1, 100)]


def test_an_error_of_our_own_is_not_swallowed() -> None:
    with pytest.raises(ZeroDivisionError):
        list(map_ahead(lambda number: 1 // number, [1, 0, 1], threads=2, ahead=3))


def test_answers_are_those_of_the_predictor_whatever_the_batch(tmp_path: Path, predictor: Predictor) -> None:
    paths = [write_png(tmp_path / f"{number:02}.png", number) for number in range(BATCH + 4)]
    paths.insert(3, write_phantom(tmp_path / "x.dcm", 20))
    answers = list(judge_files(paths, predictor, workers=3))
    assert [answer.loaded.path for answer in answers] == paths
    alone = predictor.judge([read_image(path, window=predictor.window) for path in paths])
    assert sum(answer.status == "judged" for answer in answers) > BATCH
    for answer, expected in zip(answers, alone, strict=True):
        assert answer.judgement is not None
        assert answer.judgement.verdict == expected.verdict
        assert answer.judgement.image == str(answer.loaded.path)
        if answer.prediction and expected.prediction:
            assert answer.prediction.probability == pytest.approx(expected.prediction.probability, abs=1e-6)
        np.testing.assert_allclose(answer.judgement.features, expected.features, atol=1e-5)
    assert (answers[3].loaded.study, answers[3].loaded.instance) == (STUDY, f"{STUDY}.1.21")


def test_waiting_images_are_small(tmp_path: Path, predictor: Predictor) -> None:
    (answer,) = judge_files([write_png(tmp_path / "a.png")], predictor)
    assert answer.loaded.image is not None
    size = predictor.manifest.preprocessing.size_px
    assert answer.loaded.image.pixels.shape == (size, size)
    assert answer.loaded.image.info.width_px == 64


def test_bad_files_have_reasons_and_stop_nothing(tmp_path: Path, predictor: Predictor) -> None:
    good = write_png(tmp_path / "good.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.txt").write_text("no image")
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:300])
    names = ("empty.png", "text.txt", "cut.png", "gone.png", "good.png")
    answers = list(judge_files([tmp_path / name for name in names], predictor))
    reasons = (SkipReason.EMPTY, SkipReason.UNKNOWN_FORMAT, SkipReason.CORRUPT, SkipReason.MISSING, None)
    assert tuple(answer.loaded.problem for answer in answers) == reasons
    assert [answer.judgement is None for answer in answers] == [True, True, True, True, False]


def test_the_files_own_account_is_heard(tmp_path: Path, predictor: Predictor) -> None:
    told: tuple[dict[str, Any], ...] = ({"ViewPosition": "LL"}, {"Modality": "CT"}, {"BodyPartExamined": "HAND"})
    paths = [write_phantom(tmp_path / f"{number}.dcm", **tags) for number, tags in enumerate(told)]
    found = [answer.judgement.reasons for answer in judge_files(paths, predictor) if answer.judgement]
    expected = (Reason.NOT_FRONTAL, Reason.NOT_A_RADIOGRAPH, Reason.NOT_THE_CHEST)
    for reason, reasons in zip(expected, found, strict=True):
        assert reason in reasons


def test_an_identity_that_is_no_uid_is_left_out(tmp_path: Path, predictor: Predictor) -> None:
    path = write_phantom(tmp_path / "a.dcm", text={"StudyInstanceUID": "=cmd()"}, StudyInstanceUID=None)
    (answer,) = judge_files([path], predictor)
    assert (answer.loaded.study, answer.loaded.instance) == ("", f"{STUDY}.1.1")
