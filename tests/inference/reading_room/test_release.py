"""A room that wants a released model starts with no other."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pneumofed.common.errors import ReleaseError
from pneumofed.common.evaluation.comparison import Margins
from pneumofed.common.release import ReleasedModel, ReleaseRecord, mark_of, write_signed
from pneumofed.common.wire.keys import NodeKey, PrivateKey, format_public_key, parse_private_key
from pneumofed.inference.reading_room.serve import describe_release, open_room_bundle
from pneumofed.inference.reading_room.settings import RoomFolder, RoomSettings
from tests.inference.reading_room.stage import bundle
from tests.model_bundles import signing_key

MARGINS = Margins(auroc=0.02, point=0.05)


@pytest.fixture
def folder(tmp_path: Path) -> RoomFolder:
    """A room that asks for a release by the coordinator of the test bundle, of which it has a copy."""
    shutil.copytree(bundle().folder, tmp_path / "bundle")
    (tmp_path / "coordinator.pub").write_bytes(format_public_key(signing_key().public_key(), "coordinator"))
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "room.yaml").write_text("hospital: x\nbundle: ../bundle\nrequire_release: [../coordinator.pub]\n")
    return RoomFolder(tmp_path / "room")


def mark(folder: RoomFolder, key: PrivateKey, digest: str, **values: object) -> None:
    facts = {
        "time": datetime(2026, 3, 1, tzinfo=UTC),
        "decision": "released",
        "old": None,
        "margins": MARGINS,
        "site_margins": MARGINS,
    }
    record = ReleaseRecord.model_validate({**facts, "new": ReleasedModel(name="m", digest=digest), **values})
    write_signed(mark_of(folder.inside(folder.settings.bundle)), record, key)


def test_a_bundle_without_a_record_is_refused(folder: RoomFolder) -> None:
    with pytest.raises(ReleaseError, match="cannot be read"):
        open_room_bundle(folder, folder.settings)


def test_a_released_bundle_opens_and_start_says_since_when(folder: RoomFolder) -> None:
    mark(folder, signing_key(), bundle().digest)
    opened = open_room_bundle(folder, folder.settings)
    assert opened.digest == bundle().digest
    assert describe_release(folder, opened) == "released on 2026-03-01"


def test_a_record_of_a_stranger_of_another_model_or_of_a_refusal_releases_nothing(folder: RoomFolder) -> None:
    stranger = parse_private_key(NodeKey.generate("stranger").private, "stranger")
    for key, digest, values in (
        (stranger, bundle().digest, {}),
        (signing_key(), "0" * 64, {}),
        (signing_key(), bundle().digest, {"decision": "refused", "reasons": ("test: worse",)}),
    ):
        mark(folder, key, digest, **values)
        with pytest.raises(ReleaseError):
            open_room_bundle(folder, folder.settings)


def test_by_default_any_bundle_opens_and_start_says_that_it_was_not_released(folder: RoomFolder) -> None:
    folder.settings_file.write_text("hospital: x\nbundle: ../bundle\n")
    plain = RoomFolder(folder.path)
    assert RoomSettings(hospital="x", bundle="b").require_release is None
    opened = open_room_bundle(plain, plain.settings)
    assert describe_release(plain, opened) == "not released: there is no bundle.release.json beside it"
    mark(plain, signing_key(), bundle().digest)
    assert describe_release(plain, opened) == "released on 2026-03-01, by somebody whose key was not checked"
