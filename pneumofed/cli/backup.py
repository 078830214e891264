"""`pneumofed site backup`, `site restore`, `server backup` and `server restore`. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pneumofed.common.errors import counted
from pneumofed.common.ops.command_line import Json, Site, print_json, say

if TYPE_CHECKING:
    from pneumofed.common.ops.backup import BackupWritten

Out = Annotated[Path, typer.Argument(help="The archive; mode 0600. It must not be there yet.")]
Archive = Annotated[Path, typer.Argument(help="The backup.")]
PassphraseFile = Annotated[
    Path | None, typer.Option(help="File with the passphrase, which encrypts all of the backup.", show_default="asked for")
]
WithoutKeys = Annotated[
    bool, typer.Option("--without-keys", help="Leave the keys out and encrypt nothing; the rest is as confidential as before.")
]
Coordinator = Annotated[Path, typer.Option("--folder", "-C", help="The coordinator folder.")]


def site_backup(
    out: Out,
    passphrase_file: PassphraseFile = None,
    without_keys: WithoutKeys = False,
    without_images: Annotated[
        bool, typer.Option("--without-images", help="Leave out the copies of images that were imported from the archive.")
    ] = False,
    site: Site = Path(),
    json_: Json = False,
) -> None:
    """Back the site folder up, while the site runs or not: settings, policy, keys, manifest, ledger, audit log."""
    from pneumofed.client.site.backup import backup_site
    from pneumofed.client.site.folder import SiteFolder

    folder = SiteFolder.open(site)
    _tell_written(backup_site(folder, out, _new_passphrase(passphrase_file, without_keys), images=not without_images), json_)


def site_restore(
    archive: Archive,
    folder: Annotated[Path, typer.Argument(help="The new site folder; empty, or not there yet.")],
    passphrase_file: PassphraseFile = None,
    coordinator_log: Annotated[
        Path | None,
        typer.Option(help="The coordinator's state/audit.jsonl: rounds that it shows after the backup are counted as spent."),
    ] = None,
    former: Annotated[
        Path | None, typer.Option(help="What is left of the former site folder: its ledger counts where it is longer.")
    ] = None,
    rounds_since: Annotated[
        int | None, typer.Option(help="So many private rounds were answered after the backup; each is counted as the dearest.")
    ] = None,
    json_: Json = False,
) -> None:
    """Put a backup back as a new site folder. What was spent after it is counted; without evidence of that nothing is restored."""
    from pneumofed.client.site.backup import Since, restore_site

    since = Since(former, coordinator_log, rounds_since)
    done = restore_site(archive, folder, _known_passphrase(archive, passphrase_file), since)
    if json_:
        print_json({"folder": str(folder.resolve()), **vars(done)})
        return
    say(f"{done.label.name} is restored into {folder}, as it was on {done.label.created}")
    if done.ledger_of == "former":
        say("the former folder's ledger had gone on, and took the place of the backup's")
    if done.lost_rounds:
        say(
            f"{counted(done.lost_rounds, 'round')} since then counted as spent, each as the dearest that the data has had",
            style="yellow",
        )
    if done.epsilons:
        say(f"spent now: epsilon {', '.join(f'{epsilon:.4g}' for epsilon in done.epsilons)}; `pneumofed privacy show` has more")
    _tell_missing(done.missing)
    say("then: pneumofed site preflight, pneumofed site start")


def server_backup(
    out: Out,
    passphrase_file: PassphraseFile = None,
    without_keys: WithoutKeys = False,
    folder: Coordinator = Path(),
    json_: Json = False,
) -> None:
    """Back the coordinator folder up, while runs go on or not: settings, keys, sites, registry, audit log, run folders."""
    from pneumofed.server.operations.backup import backup_coordinator
    from pneumofed.server.operations.settings import CoordinatorFolder

    place = CoordinatorFolder(folder.resolve())
    if (registry := place.settings().registry) and not registry.startswith("sqlite"):
        say("the registry is in another database and not in this backup; back it up with pg_dump", style="yellow")
    _tell_written(backup_coordinator(place, out, _new_passphrase(passphrase_file, without_keys)), json_)


def server_restore(
    archive: Archive,
    folder: Annotated[Path, typer.Argument(help="The new coordinator folder; empty, or not there yet.")],
    passphrase_file: PassphraseFile = None,
    json_: Json = False,
) -> None:
    """Put a backup back as a new coordinator folder. Unpack the newest kit over it before you start it."""
    from pneumofed.server.operations.backup import restore_coordinator

    done = restore_coordinator(archive, folder, _known_passphrase(archive, passphrase_file))
    if json_:
        print_json({"folder": str(folder.resolve()), **vars(done)})
        return
    say(f"{done.label.name} is restored into {folder}, as it was on {done.label.created}")
    _tell_missing(done.missing)
    for name in done.unfinished:
        way = "must not go on: it adds noise here, and rounds since are not counted" if name in done.closed else "can be resumed"
        say(f"run {name} had not ended; it {way}", style="yellow")
    say("a site that was revoked since is NOT revoked in it: unpack the newest kit over the folder first", style="yellow")
    say("then: pneumofed server start")


def _new_passphrase(file: Path | None, without_keys: bool) -> str | None:
    from pneumofed.common.errors import ConfigError
    from pneumofed.common.ops.encryption import check_passphrase

    if without_keys:
        if file is not None:
            raise ConfigError("give either --without-keys or --passphrase-file")
        return None
    if file is not None:
        return check_passphrase(_read(file))
    return check_passphrase(str(typer.prompt("passphrase of the backup", hide_input=True, confirmation_prompt=True, err=True)))


def _known_passphrase(archive: Path, file: Path | None) -> str | None:
    from pneumofed.common.ops.backup import is_encrypted

    if not is_encrypted(archive):
        return None
    return _read(file) if file else str(typer.prompt("passphrase of the backup", hide_input=True, err=True))


def _read(file: Path) -> str:
    from pneumofed.common.errors import ConfigError

    try:
        return file.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the passphrase file {file} cannot be read ({type(error).__name__})") from error


def _tell_written(written: BackupWritten, as_json: bool) -> None:
    if as_json:
        print_json(vars(written))
        return
    say(f"backup: {written.path}, {counted(written.files, 'file')}, {written.size / 1e6:.1f} MB")
    if not written.encrypted:
        say("it is not encrypted and holds no keys; nothing proves who wrote it", style="yellow")


def _tell_missing(missing: tuple[str, ...]) -> None:
    if missing:
        say(f"the backup holds no {', '.join(missing)}: put them back by hand before you start", style="yellow")
