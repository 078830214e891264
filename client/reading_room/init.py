"""Makes a room. What is there already is never overwritten."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from client.reading_room.folder import RoomFolder, RoomSettings
from client.reading_room.serve import open_room_bundle
from client.reading_room.tables import open_room_database
from common.config_reader import build_config
from common.data.atomic import atomic_write
from common.errors import ConfigError

if TYPE_CHECKING:
    from common.model_bundle.bundle import Bundle

_COMMENT = b"""# The reading room. All keys and their defaults: docs/reading-room.md.
# To reach it from other machines: host, names, certificate, key.
"""


def init_room(
    path: Path, bundle: Path, hospital: str, trusted: Sequence[Path] | None, site: Path | None
) -> tuple[RoomFolder, Bundle]:
    """Makes the room at `path`, and returns it with its model bundle, which was checked.

    Raises:
        BundleError: the bundle is missing, changed, or not signed by one of `trusted`.
        ConfigError: there is a room already, or a value is wrong.
    """
    folder = RoomFolder(path.resolve())
    if folder.settings_file.exists():
        raise ConfigError(f"{folder.settings_file} exists; edit it, or choose another folder")
    values = {
        "hospital": hospital,
        "bundle": str(bundle.resolve()),
        "trusted": [str(key.resolve()) for key in trusted] if trusted else None,
        "site": str(site.resolve()) if site else None,
    }
    given = {key: value for key, value in values.items() if value is not None}
    opened = open_room_bundle(folder, build_config(RoomSettings, given, "pneumofed reading-room init"))
    folder.make()
    open_room_database(folder.database).dispose()
    with atomic_write(folder.settings_file) as file:
        file.write(_COMMENT + yaml.safe_dump(given, sort_keys=False, allow_unicode=True).encode())
    return folder, opened
