"""The room's server process: opened from its folder, and answering until it is told to stop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from client.reading_room.folder import RoomFolder, RoomSettings
from client.reading_room.judge import load_file_judge
from client.reading_room.room import Room
from client.reading_room.schema import ModelInfo
from client.reading_room.tables import open_room_database
from client.reading_room.watch import open_monitor
from client.reading_room.workers import Worker, Workers
from common.errors import ConfigError, ReleaseError
from common.keys import PublicKey, certificate_validity, read_public_key
from common.processes import LOOPBACK, check_port_free

if TYPE_CHECKING:
    from common.model_bundle.bundle import Bundle


def open_room(folder: RoomFolder, bundle: Bundle) -> Room:
    """The room with a worker for each process that its settings allow; they are not started yet.

    Raises:
        ConfigError: the database cannot be opened, or a key of the settings cannot be read.
    """
    settings = folder.settings
    trusted = None if settings.trusted is None else [folder.inside(name) for name in settings.trusted]
    load = partial(load_file_judge, bundle.folder, trusted, settings.precision)
    workers = [Worker(load, settings.worker_memory_mb, settings.worker_seconds) for _ in range(settings.workers)]
    folder.make()
    return Room(folder, open_room_database(folder.database), model_info(bundle), Workers(workers), open_monitor(folder, bundle))


def open_room_bundle(folder: RoomFolder, settings: RoomSettings) -> Bundle:
    """The model bundle that `settings` name, checked; with `require_release` a released one.

    Raises:
        BundleError: it is missing, changed, or signed by somebody who is not trusted.
        ReleaseError: it has to be released and is not, or by somebody else.
        ConfigError: a key of the settings cannot be read.
    """
    from common.model_bundle.bundle import open_bundle
    from common.release.record import mark_of, require_release

    path = folder.inside(settings.bundle)
    bundle = open_bundle(path, _keys(folder, settings.trusted))
    if settings.require_release is not None:
        try:
            require_release(bundle, mark_of(path), _keys(folder, settings.require_release))
        except ReleaseError as error:
            raise ReleaseError(
                f"{settings.bundle}: this room takes released models alone (require_release in room.yaml): {error}; get the release "
                f"record from the coordinator and lay it beside the bundle as {mark_of(path).name}"
            ) from None
    return bundle


def describe_release(folder: RoomFolder, bundle: Bundle) -> str:
    """Whether `bundle`, which `open_room_bundle` took, was released, in words for who starts the room."""
    from common.release.record import mark_of, require_release

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


def model_info(bundle: Bundle) -> ModelInfo:
    """What the page says of the model."""
    manifest = bundle.manifest
    return ModelInfo(
        name=manifest.name,
        digest=bundle.digest,
        signer=bundle.signer,
        classes=list(manifest.classes),
        phantom=manifest.card.phantom,
        threshold=min(manifest.threshold.value, 1.0),
        created=manifest.created,
    )


def serve_room(folder: RoomFolder, tell: Callable[[str], None]) -> None:
    """Serves until it is told to stop. No line of its log tells an address that was asked for.

    Args:
        folder: the room's.
        tell: takes a sentence about the model and one about the address, before the first request.

    Raises:
        BundleError, ReleaseError: the model cannot be used.
        ConfigError: the settings are wrong, or the port is taken.
    """
    import uvicorn

    from client.reading_room.app import create_room_app

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
    app = create_room_app(room, [*LOOPBACK, *settings.names, *([settings.host] if settings.host != "0.0.0.0" else [])])
    released = describe_release(folder, bundle)
    tell(f"model: {room.model.name} {room.model.digest[:12]}, signed by {room.model.signer}; {released}")
    tell(f"reading room at {address(folder)}")
    room.record("", "room-started", model=room.model.digest)
    try:
        uvicorn.run(
            app, host=settings.host, port=settings.port, ssl_certfile=certificate, ssl_keyfile=key, log_level="warning",
            access_log=False, server_header=False, proxy_headers=False, timeout_graceful_shutdown=10,
        )  # fmt: skip
    finally:
        room.record("", "room-stopped")
        room.close()


def address(folder: RoomFolder) -> str:
    """Where a browser on this machine finds the room."""
    settings = folder.settings
    name = settings.names[0] if settings.names else "127.0.0.1" if settings.host == "0.0.0.0" else settings.host
    return f"http{'s' if settings.certificate else ''}://{name}:{settings.port}/"
