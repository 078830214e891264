"""`pneumofed provision`: start-up kits for the parties of a federation, and a wheelhouse for hospitals without a network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pneumofed.common.ops.command_line import say

if TYPE_CHECKING:
    from pneumofed.server.provisioning.provision import PartyReport


def provision_command(
    federation: Annotated[Path, typer.Argument(help="YAML file of the federation, e.g. configs/federation.example.yaml.")],
    out: Annotated[Path, typer.Option(help="Folder of the kits and of the federation's certificate authority.")] = Path("kits"),
    admit: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="Take the public key (node.pub) that hospital NAME sent; may repeat."),
    ] = None,
    with_keys: Annotated[
        bool,
        typer.Option(
            "--with-keys",
            help="Make the hospitals' private keys here: whoever holds this folder or a kit can act as the hospital.",
        ),
    ] = False,
    wheelhouse: Annotated[
        Path | None,
        typer.Option(
            help="Collect all of the software as wheels in this folder, for hospitals without a network; kits list its hashes."
        ),
    ] = None,
    software: Annotated[
        str | None,
        typer.Option(metavar="WHEEL", help="With --wheelhouse: pneumofed's wheel; extras in square brackets behind it."),
    ] = None,
    python: Annotated[
        str | None, typer.Option(help="With --wheelhouse: Python of the hospital, e.g. 3.11.", show_default="this one")
    ] = None,
    platform: Annotated[
        list[str] | None,
        typer.Option(
            help="With --wheelhouse: tag of its system, e.g. manylinux_2_28_x86_64; may repeat.", show_default="this one"
        ),
    ] = None,
) -> None:
    """Write a start-up kit for the coordinator, each hospital and each auditor. Run it again to add, admit, renew or revoke.

    A hospital makes its key itself (`pneumofed site init`) and sends the public half, which --admit takes.
    """
    from pneumofed.server.provisioning.identities import read_federation
    from pneumofed.server.provisioning.provision import provision as write_kits

    _collect(wheelhouse, software, python, platform, out)
    _tell(write_kits(read_federation(federation), out, _named_files(admit or []), with_keys=with_keys), out)


def _tell(reports: Sequence[PartyReport], out: Path) -> None:
    for report in reports:
        say(f"{report.name}: {report.outcome}{f'  {report.note}' if report.note else ''}")
    say(f"kits: {out}; hand each over on a way that nobody else reads, and keep {out / 'ca'} offline")
    if any(report.outcome == "revoked" for report in reports):
        say("revoked keys are refused as soon as the coordinator has its new kit and `pneumofed server start` ran again")


def _collect(wheelhouse: Path | None, software: str | None, python: str | None, platform: list[str] | None, out: Path) -> None:
    """Collects a wheelhouse, if one is asked for, whose list the kits then hold."""
    from pneumofed.common.errors import ConfigError

    if wheelhouse is None:
        if software or python or platform:
            raise ConfigError("--software, --python and --platform are for --wheelhouse DIR")
        return
    if software is None:
        raise ConfigError("--wheelhouse needs --software WHEEL; make it from a checkout: pip wheel --no-deps -w . CHECKOUT")
    from pneumofed.server.provisioning.software import WheelTarget, collect_wheelhouse, keep_lock

    done = collect_wheelhouse(wheelhouse, software, WheelTarget(python, tuple(platform or ())))
    keep_lock(done, out)
    say(f"wheelhouse: {done.folder}, {len(done.wheels)} wheels, {done.size / 1e6:.0f} MB; its hashes are in the kits")


def _named_files(pairs: list[str]) -> dict[str, Path]:
    from pneumofed.common.errors import ConfigError

    split = [pair.partition("=") for pair in pairs]
    if wrong := [pair for pair, (name, _, file) in zip(pairs, split, strict=True) if not (name and file)]:
        raise ConfigError(f"--admit {wrong[0]}: expected NAME=FILE, e.g. north=north.pub")
    return {name: Path(file) for name, _, file in split}
