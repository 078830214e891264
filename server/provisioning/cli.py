"""`pneumofed provision`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

console = Console(highlight=False, soft_wrap=True)


def provision(
    federation: Annotated[Path, typer.Argument(help="YAML file of the federation, e.g. configs/federation.example.yaml.")],
    out: Annotated[Path, typer.Option(help="Folder of the kits and of the federation's certificate authority.")] = Path("kits"),
) -> None:
    """Write a start-up kit for the coordinator, each hospital and each auditor. Run it again to add, renew or revoke."""
    from server.provisioning.provision import provision as write_kits
    from server.provisioning.schema import read_federation

    reports = write_kits(read_federation(federation), out)
    for report in reports:
        console.print(f"{report.name}: {report.outcome}{f'  {report.note}' if report.note else ''}", markup=False)
    console.print(f"kits: {out}; hand each over on a way that nobody else reads, and keep {out / 'ca'} offline", markup=False)
    if any(report.outcome == "revoked" for report in reports):
        console.print(
            "revoked keys are refused as soon as the coordinator has its new kit and `pneumofed server start` ran again"
        )
