"""Making a room and serving it.

`init_room` makes a room and never overwrites what is there already. `serve_room` is the server process: it checks the model bundle, opens
the room from its folder, and answers until it is stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from pneumofed.common.config.classes import positive_word
from pneumofed.common.config.reader import build_config
from pneumofed.common.data.manifest import LABELS
from pneumofed.common.errors import ConfigError, ReleaseError
from pneumofed.common.files import atomic_write
from pneumofed.common.folder_lock import owned
from pneumofed.common.imaging.types import MAX_VOLUME_BYTES
from pneumofed.common.ops.processes import LOOPBACK_HOSTS, check_port_free
from pneumofed.common.ops.web import serve_app
from pneumofed.common.wire.keys import PublicKey, certificate_validity, read_public_key
from pneumofed.inference.reading_room.cases import open_room_database
from pneumofed.inference.reading_room.clinical import view_columns
from pneumofed.inference.reading_room.file_judge import SeriesLimits
from pneumofed.inference.reading_room.room import Room
from pneumofed.inference.reading_room.schema import ModelInfo
from pneumofed.inference.reading_room.settings import MIB, RoomFolder, RoomSettings
from pneumofed.inference.reading_room.watching import open_monitor
from pneumofed.inference.reading_room.worker import Worker, Workers, load_same_model

if TYPE_CHECKING:
    from pneumofed.common.model_bundle.bundle import Bundle

_SETTINGS_COMMENT = b"""# The reading room. All keys and their defaults: docs/reading-room.md.
# To reach it from other machines: host, names, certificate, key.
"""


def open_room(folder: RoomFolder, bundle: Bundle) -> Room:
    """Opens the room with a worker for each process that its settings allow; they are not started yet.

    Args:
        folder: the room's; missing folders in it are made.
        bundle: of `open_room_bundle`; the workers load it again from its folder.

    Raises:
        ConfigError: the database cannot be opened, or a key of the settings cannot be read.
    """
    settings = folder.settings
    trusted = None if settings.trusted is None else [folder.inside(name) for name in settings.trusted]
    unpacked = settings.upload.for_series().file_mb * MIB
    series = SeriesLimits(settings.upload.slices, unpacked, min(MAX_VOLUME_BYTES, settings.worker_memory_mb * MIB // 3))
    load = partial(load_same_model, bundle.digest, bundle.folder, trusted, settings.precision, series, bundle.manifest.threshold)
    workers = [Worker(load, settings.worker_memory_mb, settings.worker_seconds) for _ in range(settings.workers)]
    folder.make()
    return Room(folder, open_room_database(folder.database), model_info(bundle), Workers(workers), open_monitor(folder, bundle))


def open_room_bundle(folder: RoomFolder, settings: RoomSettings) -> Bundle:
    """Opens and checks the model bundle that `settings` name, at the hospital's own operating point if they name one; with
    `require_release` it must be a released one.

    Args:
        folder: the room's, which paths of the settings are relative to.
        settings: may be others than those in the folder, as before a room is made.

    Raises:
        BundleError: it is missing, changed, or signed by somebody who is not trusted.
        ReleaseError: it has to be released and is not, or by somebody else; or the operating point is not of this bundle.
        ConfigError: a key of the settings cannot be read.
    """
    from pneumofed.common.model_bundle.bundle import load_bundle
    from pneumofed.common.release import mark_of, require_release, use_site_point

    path = folder.inside(settings.bundle)
    bundle = load_bundle(path, _keys(folder, settings.trusted))
    if settings.require_release is not None:
        try:
            require_release(bundle, mark_of(path), _keys(folder, settings.require_release))
        except ReleaseError as error:
            raise ReleaseError(
                f"{settings.bundle}: this room takes released models alone (require_release in room.yaml): {error}; get the release "
                f"record from the coordinator and lay it beside the bundle as {mark_of(path).name}"
            ) from None
    return use_site_point(bundle, folder.inside(settings.operating_point)) if settings.operating_point else bundle


def describe_release(folder: RoomFolder, bundle: Bundle) -> str:
    """Words whether `bundle` was released, for who starts the room.

    Args:
        folder: the room's.
        bundle: that `open_room_bundle` took.
    """
    from pneumofed.common.release import mark_of, require_release

    mark = mark_of(folder.inside(folder.settings.bundle))
    checked = folder.settings.require_release or folder.settings.trusted
    if not mark.exists():
        return f"not released: there is no {mark.name} beside it"
    try:
        record = require_release(bundle, mark, _keys(folder, checked))
    except ReleaseError as error:
        return f"not released: {error}"
    whose = "" if checked else ", by somebody whose key was not checked"
    return f"released on {record.time:%Y-%m-%d}{whose}"


def _keys(folder: RoomFolder, names: Sequence[str] | None) -> list[PublicKey] | None:
    return None if names is None else [read_public_key(folder.inside(name)) for name in names]


def reader_labels(classes: Sequence[str]) -> list[str]:
    """Lists what a reader may say of a case that a bundle of `classes` judged: its classes where they are a study's own, else `LABELS`."""
    own = positive_word(classes) == "finding"
    return [*(classes if own else LABELS), "unsure"]


def model_info(bundle: Bundle) -> ModelInfo:
    """Builds what the page says of the model."""
    manifest = bundle.manifest
    return ModelInfo(
        name=manifest.name,
        digest=bundle.digest,
        signer=bundle.signer,
        classes=list(manifest.classes),
        positive=positive_word(manifest.classes),
        labels=reader_labels(manifest.classes),
        phantom=manifest.card.phantom,
        slices=manifest.preprocessing.slices,
        clinical=view_columns(manifest.model.clinical),
        threshold=min(manifest.threshold.value, 1.0),
        threshold_of=manifest.threshold.site,
        created=manifest.created,
    )


def serve_room(folder: RoomFolder, tell: Callable[[str], None]) -> None:
    """Serves until it is stopped. No line of its log holds an address that was asked for.

    Args:
        folder: the room's.
        tell: takes a sentence about the model and one about the address, before the first request.

    Raises:
        BundleError, ReleaseError: the model cannot be used.
        ConfigError: the settings are wrong, the port is taken, or another process serves the room.
    """
    _ = folder.settings  # where there is no room, none is made
    with owned(folder.path, "room", "pneumofed reading-room start", "stop it first, or serve another room"):
        _serve(folder, tell)


def _serve(folder: RoomFolder, tell: Callable[[str], None]) -> None:
    from pneumofed.inference.reading_room.app import create_room_app

    settings = folder.settings
    check_port_free(settings.host, settings.port, "the reading room")
    certificate, key = (folder.inside(name) if name else None for name in (settings.certificate, settings.key))
    if certificate is not None:
        certificate_validity(certificate)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    bundle = open_room_bundle(folder, settings)
    room = open_room(folder, bundle)
    if not room.users.all():
        raise ConfigError(f"nobody could sign in yet; add yourself: pneumofed reading-room user add NAME -C {folder.path}")
    app = create_room_app(room, [*LOOPBACK_HOSTS, *settings.names, *([settings.host] if settings.host != "0.0.0.0" else [])])
    released = describe_release(folder, bundle)
    tell(f"model: {room.model.name} {room.model.digest[:12]}, signed by {room.model.signer}; {released}")
    if room.model.threshold_of:
        tell(f"threshold: {room.model.threshold:.1%}, chosen on patients of {room.model.threshold_of}")
    tell(f"reading room at {address(folder)}")
    try:
        room.record("", "room-started", model=room.model.digest, threshold=room.model.threshold)
        serve_app(
            app, settings.host, settings.port, ssl_certfile=certificate, ssl_keyfile=key, proxy_headers=False,
            timeout_graceful_shutdown=10,
        )  # fmt: skip
    finally:
        room.record("", "room-stopped")
        room.close()


def address(folder: RoomFolder) -> str:
    """Returns where a browser on this machine finds the room."""
    settings = folder.settings
    name = settings.names[0] if settings.names else "127.0.0.1" if settings.host == "0.0.0.0" else settings.host
    return f"http{'s' if settings.certificate else ''}://{name}:{settings.port}/"


def init_room(
    path: Path, bundle: Path, hospital: str, trusted: Sequence[Path] | None, site: Path | None
) -> tuple[RoomFolder, Bundle]:
    """Makes the room at `path`, and returns it with its model bundle, which was checked.

    Args:
        path: made if missing, mode 0700; must hold no room.yaml.
        bundle: folder or archive of the model.
        hospital: name that the page shows.
        trusted: public keys of who may sign the bundle; without any the signature is checked only against the bundle's own key.
        site: folder of the hospital's site, whose pseudonyms exported labels then have; None for the room's own.

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
        file.write(_SETTINGS_COMMENT + yaml.safe_dump(given, sort_keys=False, allow_unicode=True).encode())
    return folder, opened
