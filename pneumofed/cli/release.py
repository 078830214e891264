"""`pneumofed release`. Nothing heavy is imported before the command runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pneumofed.common.errors import ConfigError
from pneumofed.common.ops.command_line import REFUSED, Json, print_json, say

if TYPE_CHECKING:
    from pneumofed.common.evaluation.comparison import Margins, ModelComparison
    from pneumofed.common.model_bundle.bundle import Bundle
    from pneumofed.server.release.gate import Evidence
    from pneumofed.server.release.release import Sets


New = Annotated[
    Path, typer.Argument(help="The new model: its bundle, or the folder of its run, which holds one.", metavar="BUNDLE_OR_RUN")
]
Against = Annotated[Path | None, typer.Option(help="Bundle of the model that was released last.")]
First = Annotated[bool, typer.Option("--first", help="Release a first model, which nothing can be compared with.")]
RunFolder_ = Annotated[Path | None, typer.Option("--run", help="The new model's run: its held-out sets and its sites.")]
Folder = Annotated[
    Path | None, typer.Option("--folder", "-C", help="The coordinator folder: held-out sets, sites' keys, audit log.")
]
Verdicts = Annotated[
    list[Path] | None,
    typer.Option("--verdict", help="A site's signed verdict (`pneumofed site compare`), or a folder of them. May repeat."),
]
Margin = Annotated[float, typer.Option(help="By how much AUROC may be lower.")]
PointMargin = Annotated[float, typer.Option(help="By how much sensitivity and specificity may be lower.")]
SiteMargin = Annotated[float | None, typer.Option(help="The same for AUROC at the sites.", show_default="--margin")]
SitePointMargin = Annotated[
    float | None, typer.Option(help="For sensitivity and specificity there.", show_default="--point-margin")
]
Alpha = Annotated[float, typer.Option(help="One-sided error of each test.")]
Key = Annotated[
    Path | None,
    typer.Option(help="Private key that signs the record.", show_default="keys/release/node of the coordinator or run"),
]
Trusted = Annotated[
    list[Path] | None, typer.Option("--trusted", help="Public key whose bundles are taken.", show_default="that of --key")
]
Out = Annotated[
    Path | None, typer.Option(help="Folder for release.json and release.md.", show_default="the run's, or beside the bundle")
]


def release(
    new: New,
    against: Against = None,
    first: First = False,
    run: RunFolder_ = None,
    folder: Folder = None,
    verdict: Verdicts = None,
    margin: Margin = 0.02,
    point_margin: PointMargin = 0.05,
    site_margin: SiteMargin = None,
    site_point_margin: SitePointMargin = None,
    alpha: Alpha = 0.05,
    key: Key = None,
    trusted: Trusted = None,
    out: Out = None,
    json_: Json = False,
) -> None:
    """Release a new model only if no site and no held-out set shows, or may hide, that it is worse. Exit code 4 if it is refused."""
    if (against is None) is not first:
        raise ConfigError("give --against BUNDLE, the model that was released last, or --first where there is none")
    if (new / "config.yaml").is_file():
        new, run = new / "bundle", run or new
    from pneumofed.common.model_bundle.bundle import load_bundle
    from pneumofed.common.wire.keys import read_private_key, read_public_key
    from pneumofed.server.operations.settings import CoordinatorFolder
    from pneumofed.server.release.gate import decide_release, first_release
    from pneumofed.server.release.release import audit_of, publish, summary_lines

    signing = read_private_key(key or _find_key(folder, run))
    known = [read_public_key(file) for file in trusted or ()] or [signing.public_key()]
    central = _margins(margin, point_margin, alpha)
    sites = _margins(site_margin or margin, site_point_margin or point_margin, alpha)
    bundle = load_bundle(new, known)
    if against is None:
        from datetime import UTC, datetime

        record = first_release(bundle, (central, sites), datetime.now(UTC))
    else:
        old = load_bundle(against, known)
        record = decide_release((old, bundle), _gather((old, bundle), run, folder, verdict or ()), (central, sites))
    place = out or run or new.resolve().parent
    written = publish(record, new, signing, [place], audit_of(CoordinatorFolder(folder)) if folder else None)
    if json_:
        print_json(record.model_dump(mode="json"), indent=1)
    else:
        for line in [*summary_lines(record), *(f"written: {file}" for file in written)]:
            say(line)
    if not record.released:
        raise typer.Exit(REFUSED)


def _margins(auroc: float, point: float, alpha: float) -> Margins:
    from pneumofed.common.config.reader import build_config
    from pneumofed.common.evaluation.comparison import Margins

    return build_config(Margins, {"auroc": auroc, "point": point, "alpha": alpha}, "the margins")


def _find_key(folder: Path | None, run: Path | None) -> Path:
    """The key that `pneumofed export` made: the coordinator's, or that of a run without a coordinator folder."""
    places = [place for place in (folder, run and run.resolve().parent.parent, run) if place]
    found = [place / "keys" / "release" / "node" for place in places]
    for file in found:
        if file.is_file():
            return file
    raise ConfigError("no key to sign the record with: give --key FILE, the private key that signs this coordinator's bundles")


def _gather(models: tuple[Bundle, Bundle], run: Path | None, folder: Path | None, verdicts: Sequence[Path]) -> Evidence:
    """All comparisons of `models` (old, new) that there are."""
    from pneumofed.common.model_bundle.compare import check_comparable
    from pneumofed.server.operations.settings import CoordinatorFolder
    from pneumofed.server.release.gate import Evidence
    from pneumofed.server.release.release import compare_on_sets, read_verdicts, site_keys, sites_of_run

    check_comparable(*models)
    sets = _sets(run, folder)
    central = compare_on_sets(*models, sets.manifests, sets.cache, sets.device, sets.threads)
    keys = site_keys(CoordinatorFolder(folder)) if folder else {}
    sites = {**(virtual_comparisons(run, models) if run else {}), **read_verdicts(verdicts, keys, models)}
    expected = sites_of_run(run) if run else []
    needed = tuple(dict.fromkeys((*sets.manifests, "external")))
    return Evidence(central, sites, expected, max(len(expected), models[1].manifest.card.sites), needed)


def _sets(run: Path | None, folder: Path | None) -> Sets:
    from pneumofed.server.operations.settings import CoordinatorFolder
    from pneumofed.server.release.release import Sets

    if run is not None:
        return Sets.of_run(run)
    if folder is not None:
        return Sets.of_coordinator(CoordinatorFolder(folder))
    raise ConfigError("give the new model's --run, or the coordinator folder with -C: they name the held-out sets")


def virtual_comparisons(run: Path, models: tuple[Bundle, Bundle]) -> dict[str, ModelComparison]:
    """The comparisons of a simulated run's virtual hospitals, made here; nothing for a run over real ones."""
    from pneumofed.client.data.compare import compare_at_site
    from pneumofed.client.federation.site_data import read_site_config

    if not (run / "simulation.yaml").is_file():
        return {}
    files = sorted((run / "sites").glob("*.yaml"), key=lambda file: int(file.stem))
    configs = [read_site_config(file) for file in files]
    return {config.name: compare_at_site(config, *models).comparison for config in configs}
