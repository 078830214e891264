"""An archive is put back as it was or not at all: cut, altered, of a wrong passphrase, or with a path that leads outside."""

from __future__ import annotations

import io
import json
import random
import sqlite3
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pneumofed.common.errors import ConfigError
from pneumofed.common.ops import encryption
from pneumofed.common.ops.backup import COMPLETE, LABEL, BackupLabel, files_to_back_up, unpack_backup, write_backup
from pneumofed.common.ops.encryption import MAGIC

SECRET = "correct horse battery"
SITE = BackupLabel("site", "north", "/srv/north", "0.2.0")


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encryption, "SCRYPT", {"n": 1 << 4, "r": 8, "p": 1})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a text, a program, a database, a log whose last line is half written, and three chunks of anything."""
    folder = tmp_path / "party"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "site.yaml").write_text("name: north\n")
    (folder / "start.sh").write_text("#!/bin/sh\n")
    (folder / "start.sh").chmod(0o755)
    (folder / "deep" / "er" / "images").write_bytes(random.Random(1).randbytes(3 * encryption.CHUNK + 5))
    (folder / "audit.jsonl").write_bytes(b'{"a": 1}\n{"a": 2')
    with sqlite3.connect(folder / "ledger.sqlite") as connection:
        connection.execute("CREATE TABLE entry (number INTEGER)")
    connection.close()
    return folder


def write(folder: Path, passphrase: str | None = SECRET, label: BackupLabel = SITE, name: str = "backup") -> Path:
    return write_backup(folder.parent / name, label, folder, files_to_back_up(folder), passphrase).path


def restore(archive: Path, target: Path, passphrase: str | None = SECRET) -> Path:
    with unpack_backup(archive, "site", target, passphrase, "site.yaml"):
        pass
    return target


@pytest.mark.parametrize("passphrase", [SECRET, None])
def test_all_files_come_back_for_their_owner_only(folder: Path, tmp_path: Path, passphrase: str | None) -> None:
    archive = write(folder, passphrase)
    assert archive.stat().st_mode & 0o777 == 0o600
    found = restore(archive, tmp_path / "new", passphrase)
    names = {"site.yaml", "start.sh", "deep/er/images", "audit.jsonl", "ledger.sqlite"}
    assert {path.relative_to(found).as_posix() for path in found.rglob("*") if path.is_file()} == names
    for name in ("site.yaml", "deep/er/images"):
        assert (found / name).read_bytes() == (folder / name).read_bytes()
    assert (found / "audit.jsonl").read_bytes() == b'{"a": 1}\n'
    assert (found / "start.sh").stat().st_mode & 0o777 == 0o700
    assert (found / "site.yaml").stat().st_mode & 0o777 == 0o600
    assert found.stat().st_mode & 0o777 == (found / "deep").stat().st_mode & 0o777 == 0o700


def test_nothing_of_an_encrypted_backup_can_be_read(folder: Path) -> None:
    (folder / "site.yaml").write_text("name: DOE-JANE\n" * 100)
    content = write(folder).read_bytes()
    assert content.startswith(MAGIC)
    assert not [word for word in (b"DOE-JANE", b"north", b"site.yaml", b"SQLite") if word in content]


@pytest.mark.parametrize("passphrase", [SECRET, None])
@pytest.mark.parametrize("keep", [0.0, 0.001, 0.3, 0.6, 0.9999])
def test_a_backup_that_was_cut_restores_nothing(folder: Path, tmp_path: Path, passphrase: str | None, keep: float) -> None:
    archive = write(folder, passphrase)
    content = archive.read_bytes()
    archive.write_bytes(content[: int(keep * (len(content) - (10240 if passphrase is None else 0)))])
    with pytest.raises(ConfigError):
        restore(archive, tmp_path / "new", passphrase)
    assert not (tmp_path / "new").exists()


def test_an_encrypted_backup_that_was_cut_between_two_chunks_is_refused(folder: Path, tmp_path: Path) -> None:
    archive = write(folder)
    head, chunk = archive.read_bytes().index(b"}\n") + 2, encryption.CHUNK + 16
    for chunks in (1, 2, 3):
        cut = tmp_path / f"cut-{chunks}"
        cut.write_bytes(archive.read_bytes()[: head + chunks * chunk])
        with pytest.raises(ConfigError, match="cut in the middle"):
            restore(cut, tmp_path / "new")


def test_any_altered_byte_is_noticed(folder: Path, tmp_path: Path) -> None:
    for passphrase in (SECRET, None):
        content = bytearray(write(folder, passphrase, name=f"backup-{passphrase}").read_bytes())
        draw = random.Random(2)
        for number in range(20):
            # of a plain archive the padding after a file has no meaning, so only the large file's bytes are altered
            place = draw.randrange(len(MAGIC), len(content)) if passphrase else content.index(b"deep/er/images") + 600 + number
            altered = tmp_path / "altered"
            altered.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            with pytest.raises(ConfigError):
                restore(altered, tmp_path / "new", passphrase)
            assert not (tmp_path / "new").exists()


def test_chunks_that_changed_places_or_were_appended_are_refused(folder: Path, tmp_path: Path) -> None:
    content = write(folder).read_bytes()
    head, chunk = content.index(b"}\n") + 2, encryption.CHUNK + 16
    first, second = content[head : head + chunk], content[head + chunk : head + 2 * chunk]
    for wrong in (content[:head] + second + first + content[head + 2 * chunk :], content + b"more", content + content[-chunk:]):
        (tmp_path / "wrong").write_bytes(wrong)
        with pytest.raises(ConfigError):
            restore(tmp_path / "wrong", tmp_path / "new")


def test_a_wrong_a_missing_and_a_short_passphrase(folder: Path, tmp_path: Path) -> None:
    archive = write(folder)
    with pytest.raises(ConfigError, match="passphrase is wrong"):
        restore(archive, tmp_path / "new", "another horse battery")
    with pytest.raises(ConfigError, match="is encrypted; give its passphrase"):
        restore(archive, tmp_path / "new", None)
    with pytest.raises(ConfigError, match="12 or more"):
        write(folder, "short", name="other")
    assert not (folder.parent / "other").exists() and not (tmp_path / "new").exists()


def forged(path: Path, *members: tuple[tarfile.TarInfo, bytes], complete: bool = True) -> Path:
    """A plain archive with right checksums, as who can write it would make it."""
    import hashlib

    held = {info.name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()} for info, content in members}
    label = {"party": "site", "name": "north", "folder": "/", "version": "0", "created": "", "without": [], "format": 1}
    ends = [(tarfile.TarInfo(COMPLETE), json.dumps(held).encode())] if complete else []
    with tarfile.open(path, "w") as tar:
        for info, content in [(tarfile.TarInfo(LABEL), json.dumps(label).encode()), *members, *ends]:
            info.size = len(content) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(content))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    "evil",
    [
        member("../outside"),
        member("/tmp/outside-of-a-backup"),
        member("work/../../outside"),
        member("./outside"),
        member("."),
        member("link", tarfile.SYMTYPE, "/etc"),
        member("hard", tarfile.LNKTYPE, "site.yaml"),
        member("pipe", tarfile.FIFOTYPE),
        member("device", tarfile.CHRTYPE),
        member("folder", tarfile.DIRTYPE),
        member(LABEL),
        member("site.yaml/below-a-file"),
        member("site.yaml"),
    ],
    ids=lambda info: f"{info.name}-{info.type.decode()}",
)
def test_a_forged_archive_writes_nothing(tmp_path: Path, evil: tarfile.TarInfo) -> None:
    site = (member("site.yaml"), b"name: north\n")
    assert restore(forged(tmp_path / "good", site), tmp_path / "good-site", None).is_dir()
    archive = forged(tmp_path / "evil", site, (evil, b"owned"))
    before = set(tmp_path.rglob("*"))
    with pytest.raises(ConfigError):
        restore(archive, tmp_path / "new", None)
    assert set(tmp_path.rglob("*")) == before
    assert not Path("/tmp/outside-of-a-backup").exists()


def test_a_plain_archive_without_its_list_of_files_is_one_that_was_cut(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cut in the middle"):
        restore(forged(tmp_path / "cut", (member("site.yaml"), b"name: north\n"), complete=False), tmp_path / "new", None)


def test_a_folder_with_files_another_party_and_another_file_are_refused(folder: Path, tmp_path: Path) -> None:
    archive = write(folder, None)
    with pytest.raises(ConfigError, match="not empty"):
        restore(archive, folder, None)
    with (
        pytest.raises(ConfigError, match="not of a coordinator"),
        unpack_backup(archive, "coordinator", tmp_path / "c", None, "x"),
    ):
        pass
    (tmp_path / "text").write_text("hello")
    for other in (tmp_path / "text", tmp_path / "nowhere"):
        with pytest.raises(ConfigError):
            restore(other, tmp_path / "new", None)
    with pytest.raises(ConfigError, match="never takes the place"):
        write(folder, None)


def test_a_check_that_fails_leaves_the_folder_as_it_was(folder: Path, tmp_path: Path) -> None:
    archive, target = write(folder, None), tmp_path / "volume"
    (target / "lost+found").mkdir(parents=True)  # as on a new volume
    with pytest.raises(ConfigError, match="no"), unpack_backup(archive, "site", target, None, "site.yaml"):
        raise ConfigError("no")
    assert [path.name for path in target.iterdir()] == ["lost+found"]
    assert (restore(archive, target, None) / "site.yaml").is_file()


def test_a_database_is_copied_between_two_transactions_while_others_write(tmp_path: Path) -> None:
    """Two rows are always written together: every copy has an even number of them."""
    folder = tmp_path / "party"
    folder.mkdir()
    (folder / "site.yaml").write_text("")
    stop = threading.Event()

    def work() -> None:
        connection = sqlite3.connect(folder / "ledger.sqlite", timeout=30, isolation_level=None)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE entry (content BLOB)")
        ready.set()
        while not stop.is_set():
            connection.execute("BEGIN")
            connection.execute("INSERT INTO entry VALUES (randomblob(3000))")
            connection.execute("INSERT INTO entry VALUES (randomblob(3000))")
            connection.execute("COMMIT")
        connection.close()

    ready = threading.Event()
    writer = threading.Thread(target=work)
    writer.start()
    try:
        assert ready.wait(60)
        counts = []
        for number in range(5):
            found = restore(write(folder, None, name=f"backup-{number}"), tmp_path / f"new-{number}", None)
            with sqlite3.connect(found / "ledger.sqlite") as connection:
                assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
                counts.append(connection.execute("SELECT COUNT(*) FROM entry").fetchone()[0])
            connection.close()
    finally:
        stop.set()
        writer.join()
    assert all(count % 2 == 0 for count in counts) and counts == sorted(counts)


def test_logs_are_read_before_what_counts_and_passing_files_stay_out(folder: Path) -> None:
    for name in ("lock", ".site.lock", ".policy.sum", "x.pid", "x.log", "ledger.sqlite-wal", ".half.a1b2c3d4", "cache"):
        (folder / name).touch()
    (folder / "link").symlink_to("/etc")
    assert files_to_back_up(folder, leave=["cache"], last=["start.sh"]) == [
        *("audit.jsonl", "deep/er/images", "site.yaml"),
        *("ledger.sqlite", "start.sh"),
    ]


def test_a_full_disk_leaves_no_half_backup(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Callable[[], None]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(ConfigError, match="No space left"):
        write(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["party"]
