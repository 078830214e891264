"""A reading room for tests, over a small bundle, with readers whose passwords are cheap to check."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import yaml
from fastapi.testclient import TestClient
from httpx import Response

from pneumofed.common.model_bundle.bundle import Bundle
from pneumofed.common.model_bundle.predictor import Predictor
from pneumofed.common.ops.web import CSRF_HEADER
from pneumofed.inference.reading_room.app import create_room_app
from pneumofed.inference.reading_room.cases import open_room_database
from pneumofed.inference.reading_room.file_judge import FileJudge, load_clinical_network
from pneumofed.inference.reading_room.room import Room
from pneumofed.inference.reading_room.serve import model_info
from pneumofed.inference.reading_room.settings import RoomFolder
from pneumofed.inference.reading_room.watching import open_monitor
from pneumofed.inference.reading_room.worker import Read, Workers
from tests.dicom_factory import dicom_bytes
from tests.model_bundles import open_test_bundle, phantom_images
from tests.tiny import folder_of_process

PASSWORD = "a long pass phrase"
ADMIN, READER = "admin", "reader"


@lru_cache
def bundle() -> Bundle:
    return open_test_bundle(folder_of_process() / "bundle")


@lru_cache
def inline_reader() -> FileJudge:
    return FileJudge(Predictor(bundle(), threads=1))


class Stage:
    """A room in `path` and its application; files are read in this process."""

    def __init__(self, path: Path, read: Read | None = None, model: Bundle | None = None, **settings: Any) -> None:
        judging = model or bundle()
        folder = RoomFolder(path / "room")
        folder.make()
        values = {"hospital": "North", "bundle": str(judging.folder), "workers": 1, **settings}
        folder.settings_file.write_text(yaml.safe_dump(values))
        folder.settings_file.chmod(0o600)
        monitor = open_monitor(folder, judging)
        read = read or (FileJudge(Predictor(model, threads=1), load_clinical_network(model)) if model else None)
        workers = Workers([read or inline_reader()])
        self.room = Room(folder, open_room_database(folder.database), model_info(judging), workers, monitor)
        for name, role in ((ADMIN, "admin"), (READER, "radiologist")):
            self.room.users.add(name, role, PASSWORD)  # type: ignore[arg-type]
        self.app = create_room_app(self.room, ["testserver", "localhost"])

    @contextmanager
    def visitor(self) -> Iterator[TestClient]:
        """Somebody who has not signed in."""
        with TestClient(self.app) as client:
            yield client

    @contextmanager
    def signed_in(self, user: str = READER) -> Iterator[TestClient]:
        """A user with a session, whose client sends the CSRF token by itself."""
        with self.visitor() as client:
            sign_in(client, user)
            yield client


def sign_in(client: TestClient, user: str = READER, password: str = PASSWORD) -> None:
    answer = client.post("/api/login", json={"user": user, "password": password})
    assert answer.status_code == 200, answer.text
    client.headers[CSRF_HEADER] = answer.json()["csrf"]


def upload(client: TestClient, *files: bytes, name: str = "image") -> list[dict[str, Any]]:
    """What came of the files."""
    answer = client.post("/api/cases", files=[("files", (name, file)) for file in files])
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["files"]
    return found


def problem(answer: Response) -> tuple[int, str]:
    """(status, error word) of an answer above 399."""
    return answer.status_code, answer.json()["error"]


def phantom_png(number: int = 0) -> bytes:
    """A phantom that the test bundle judges."""
    pixels = phantom_images(12)[number][0].pixels
    buffer = BytesIO()
    PIL.Image.fromarray(np.rint(pixels * 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def phantom_dicom(number: int = 0, **tags: Any) -> bytes:
    """The same as a DICOM file of 12 bits."""
    pixels = phantom_images(12)[number][0].pixels
    return dicom_bytes(np.rint(pixels * 4095).astype(np.uint16), BitsStored=12, **tags)


def files_below(folder: Path) -> set[Path]:
    """All that lies below `folder`, links and pipes too."""
    return {path for path in folder.rglob("*") if not path.is_dir()}
