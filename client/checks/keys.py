"""Keys and certificates: there, private, valid, and for each other."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from client.checks.finding import Finding, Level
from client.folder import SiteFolder
from common.errors import ConfigError

WARN_BEFORE = timedelta(days=30)


def check(folder: SiteFolder) -> Iterator[Finding]:
    connection = folder.connection
    yield check_certificate("authority", Path(connection.ca), "ask the coordinator for the federation's ca.crt")
    yield check_node_key(Path(connection.key))
    yield from check_modes(folder.path, [Path(connection.key)])
    if connection.client_certificate is not None and connection.client_key is not None:
        remedy = "ask the coordinator for a new kit, or send keys/node.pub again"
        yield check_certificate("site certificate", Path(connection.client_certificate), remedy)
        yield from check_modes(folder.path, [Path(connection.client_key)])
        yield check_pair(Path(connection.client_certificate), Path(connection.client_key))


def check_certificate(name: str, path: Path, remedy: str, now: datetime | None = None) -> Finding:
    """A certificate's validity; that of the last 30 days is worth a warning."""
    from common.keys import certificate_validity

    now = now or datetime.now(UTC)
    try:
        begin, end = certificate_validity(path)
    except ConfigError as error:
        return Finding("keys", name, "problem", str(error), remedy)
    if now < begin:
        return Finding("keys", name, "problem", f"not valid before {begin:%Y-%m-%d %H:%M} UTC", "set this machine's clock right")
    if now >= end:
        return Finding("keys", name, "problem", f"expired on {end:%Y-%m-%d}", remedy)
    days = (end - now).days
    if end - now < WARN_BEFORE:
        return Finding("keys", name, "warning", f"expires in {days} days, on {end:%Y-%m-%d}", remedy)
    return Finding("keys", name, "ok", f"valid until {end:%Y-%m-%d}")


def check_node_key(path: Path) -> Finding:
    """The private key can be used, and its public part beside it, which the coordinator got, is its own."""
    from common.keys import fingerprint, read_private_key, read_public_key

    remedy = "take keys/node from the kit, or make a new pair with `pneumofed site init` and send node.pub to the coordinator"
    try:
        public = read_private_key(path).public_key()
        beside = path.with_name(path.name + ".pub")
        if beside.exists() and read_public_key(beside) != public:
            return Finding("keys", "node key", "problem", f"{beside.name} is not the public part of {path.name}", remedy)
    except ConfigError as error:
        return Finding("keys", "node key", "problem", str(error), remedy)
    return Finding("keys", "node key", "ok", fingerprint(public))


def check_modes(folder: Path, private: list[Path]) -> Iterator[Finding]:
    """Whether others than the owner can read what is private."""
    for path in (folder, *private):
        if path.exists() and path.stat().st_mode & 0o077:
            mode = "700" if path.is_dir() else "600"
            level: Level = "warning" if path.is_dir() else "problem"
            yield Finding("keys", f"mode of {path.name}", level, f"others can read {path}", f"chmod {mode} {path}")


def check_pair(certificate: Path, key: Path) -> Finding:
    import ssl

    try:
        ssl.create_default_context().load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError):
        remedy = "take both from one kit"
        return Finding("keys", "site certificate's key", "problem", f"{key.name} does not fit {certificate.name}", remedy)
    return Finding("keys", "site certificate's key", "ok", "fits")
