"""A bundle is opened only if not one byte of it was changed since somebody whom the reader trusts signed it."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pneumofed.common.errors import BundleError
from pneumofed.common.model_bundle import sealing
from pneumofed.common.model_bundle.bundle import load_bundle, pack, unpack_bundle
from pneumofed.common.model_bundle.manifest import FORMAT
from pneumofed.common.model_bundle.sealing import MANIFEST, SIGNATURE_FILE, list_files, seal_bundle
from pneumofed.common.wire.keys import NodeKey, key_fingerprint, parse_private_key
from tests.model_bundles import make_bundle, signing_key

TRUSTED = [signing_key().public_key()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("sealed") / "bundle")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_an_untouched_bundle_opens_and_says_who_signed_it(folder: Path) -> None:
    bundle = load_bundle(folder, TRUSTED)
    assert bundle.signer == key_fingerprint(TRUSTED[0])
    assert load_bundle(folder, None).digest == bundle.digest
    assert bundle.load_reference().features.shape[0] == bundle.manifest.reference.images  # type: ignore[union-attr]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_byte_is_refused(folder: Path, data: st.DataObject) -> None:
    path = folder / data.draw(st.sampled_from(list_files(folder)))
    content = path.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    flipped = bytes([content[place] ^ data.draw(st.integers(1, 255))])
    try:
        path.write_bytes(content[:place] + flipped + content[place + 1 :])
        with pytest.raises(BundleError):
            load_bundle(folder, TRUSTED)
        with pytest.raises(BundleError):
            load_bundle(folder, None)
    finally:
        path.write_bytes(content)


def test_every_byte_of_the_signature_file_counts(folder: Path) -> None:
    path = folder / SIGNATURE_FILE
    content = path.read_bytes()
    told = (folder / MANIFEST).read_bytes()
    for place in range(len(content)):
        for flip in (1, 32):
            changed = content[:place] + bytes([content[place] ^ flip]) + content[place + 1 :]
            with pytest.raises(BundleError):
                sealing._check_signature(changed, told, None)


def test_an_extra_a_missing_and_a_shortened_file_are_refused(copy: Path) -> None:
    (copy / "extra.txt").write_text("")
    with pytest.raises(BundleError, match=r"extra\.txt"):
        load_bundle(copy, TRUSTED)
    (copy / "extra.txt").unlink()
    card = (copy / "card.md").read_bytes()
    (copy / "card.md").write_bytes(card[:-1])
    with pytest.raises(BundleError, match=r"card\.md was changed"):
        load_bundle(copy, TRUSTED)
    (copy / "card.md").unlink()
    with pytest.raises(BundleError, match=r"lacks 1 file.*card\.md"):
        load_bundle(copy, TRUSTED)


def test_a_link_in_the_folder_is_refused(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes((copy / "card.md").read_bytes())
    (copy / "card.md").unlink()
    (copy / "card.md").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="link"):
        load_bundle(copy, TRUSTED)


def test_a_stranger_is_refused_by_name_and_taken_where_all_are_trusted(copy: Path) -> None:
    stranger = parse_private_key(NodeKey.generate("stranger").private, "test")
    seal_bundle(copy, load_bundle(copy, TRUSTED).manifest, stranger)
    with pytest.raises(BundleError, match="does not trust") as refused:
        load_bundle(copy, TRUSTED)
    assert key_fingerprint(stranger.public_key()) in str(refused.value)
    with pytest.raises(BundleError, match="does not trust"):
        load_bundle(copy, [])
    assert load_bundle(copy, None).signer == key_fingerprint(stranger.public_key())


def test_a_newer_format_asks_for_a_newer_program(copy: Path) -> None:
    values = json.loads((copy / SIGNATURE_FILE).read_text())
    (copy / SIGNATURE_FILE).write_text(json.dumps({**values, "format": FORMAT + 1}))
    with pytest.raises(BundleError, match="install a newer pneumofed"):
        load_bundle(copy, TRUSTED)


def test_a_file_that_changes_after_opening_is_not_used(copy: Path) -> None:
    bundle = load_bundle(copy, TRUSTED)
    (copy / "model.onnx").write_bytes(b"something else")
    with pytest.raises(BundleError, match="changed after the bundle was opened"):
        bundle.read("model.onnx")


def test_archives_hold_the_same_bundle(folder: Path, tmp_path: Path) -> None:
    zipped = pack(folder, tmp_path / "bundle.zip")
    (tmp_path / "again").mkdir()
    assert pack(folder, tmp_path / "again" / "bundle.zip").read_bytes() == zipped.read_bytes()
    with tarfile.open(tmp_path / "bundle.tar", "w") as tar:
        tar.add(folder, arcname="bundle")
    digests = {load_bundle(path, TRUSTED).digest for path in (folder, zipped, tmp_path / "bundle.tar")}
    assert len(digests) == 1


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_archive_is_refused_or_gives_the_very_same_bundle(folder: Path, tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "damaged.zip"
    whole = tmp_path / "whole.zip"
    content = bytearray(whole.read_bytes() if whole.exists() else pack(folder, whole).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with contextlib.suppress(BundleError):
        assert load_bundle(path, TRUSTED).digest == load_bundle(folder, TRUSTED).digest


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/../../outside", "..\\outside", "C:outside"])
def test_names_that_lead_out_of_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    archive, target = tmp_path / "evil.zip", tmp_path / "inside" / "target"
    target.mkdir(parents=True)
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(zipfile.ZipInfo(name), b"gotcha")
    with pytest.raises(BundleError, match="leads out"):
        unpack_bundle(archive, target)
    assert not list(tmp_path.rglob("*outside*"))


def test_links_in_archives_are_refused(tmp_path: Path) -> None:
    zipped, tarred = tmp_path / "link.zip", tmp_path / "link.tar"
    entry = zipfile.ZipInfo("bundle/link")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(zipped, "w") as file:
        file.writestr(entry, "/etc/passwd")
    with tarfile.open(tarred, "w") as tar:
        link = tarfile.TarInfo("bundle/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    for archive in (zipped, tarred):
        target = tmp_path / archive.suffix
        target.mkdir()
        with pytest.raises(BundleError, match="link"):
            unpack_bundle(archive, target)


def test_a_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pneumofed.common.model_bundle.bundle.MAX_BYTES", 10_000)
    archive, target = tmp_path / "bomb.zip", tmp_path / "target"
    target.mkdir()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("zeros", bytes(1_000_000))
    with pytest.raises(BundleError, match="unpacks to more than"):
        unpack_bundle(archive, target)
    assert sum(path.stat().st_size for path in target.rglob("*")) <= 10_000


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.zip").write_bytes(b"no archive at all")
    with pytest.raises(BundleError, match=r"no \.zip or \.tar"):
        load_bundle(tmp_path / "text.zip", None)
    with pytest.raises(BundleError, match="does not exist"):
        load_bundle(tmp_path / "nowhere", None)
    with pytest.raises(BundleError, match="no model bundle"):
        load_bundle(tmp_path, None)


def test_compressed_tars_are_not_read(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("empty"))
    (tmp_path / "bundle.tar").write_bytes(buffer.getvalue())
    with pytest.raises(BundleError):
        load_bundle(tmp_path / "bundle.tar", None)
