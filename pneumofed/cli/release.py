"""`pneumofed release`. Nothing heavy is imported before the command runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pneumofed.common.errors import ConfigError
from pneumofed.common.ops.command_line import REFUSED, Json, print_json, say

if TYPE_CHECKING:
    from pneumofed.common.evaluation.comparison import Margins, ModelComparison
    from pneumofed.common.model_bundle.bundle import Bundle
    from pneumofed.common.release import ReleaseRecord
    from pneumofed.common.wire.keys import PublicKey
    from pneumofed.server.operations.settings import CoordinatorFolder
    from pneumofed.server.release.chain import ReleaseChain
    from pneumofed.server.release.gate import Evidence, ReleasePolicy
    from pneumofed.server.release.release import Sets

    Terms = tuple[ReleasePolicy, tuple[Margins, Margins]]


New = Annotated[
    Path, typer.Argument(help="The new model: its bundle, or the folder of its run, which holds one.", metavar="BUNDLE_OR_RUN")
]
Against = Annotated[Path | None, typer.Option(help="Bundle of the model that was released last.")]
First = Annotated[bool, typer.Option("--first", help="Release a first model, which nothing can be compared with. Works once.")]
RunFolder_ = Annotated[Path | None, typer.Option("--run", help="The new model's run: its held-out sets and its sites.")]
Folder = Annotated[
    Path | None, typer.Option("--folder", "-C", help="The coordinator folder: held-out sets, sites' keys, audit log.")
]
Verdicts = Annotated[
    list[Path] | None,
    typer.Option("--verdict", help="A site's signed verdict (`pneumofed site compare`), or a folder of them. May repeat."),
]
Margin = Annotated[float | None, typer.Option(help="By how much AUROC may be lower.", show_default="the policy's, 0.02")]
PointMargin = Annotated[
    float | None, typer.Option(help="By how much sensitivity and specificity may be lower.", show_default="the policy's, 0.05")
]
SiteMargin = Annotated[float | None, typer.Option(help="The same for AUROC at the sites.", show_default="--margin")]
SitePointMargin = Annotated[
    float | None, typer.Option(help="For sensitivity and specificity there.", show_default="--point-margin")
]
Alpha = Annotated[float | None, typer.Option(help="One-sided error of each test.", show_default="the policy's, 0.05")]
PolicyFile = Annotated[
    Path | None,
    typer.Option("--policy", help="The coordinator's release policy.", show_default="release.yaml in its folder, if any"),
]
Chain = Annotated[
    Path | None,
    typer.Option(help="The chain of releases.", show_default="state/releases.json of the coordinator, or beside the key"),
]
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
    margin: Margin = None,
    point_margin: PointMargin = None,
    site_margin: SiteMargin = None,
    site_point_margin: SitePointMargin = None,
    alpha: Alpha = None,
    policy: PolicyFile = None,
    chain: Chain = None,
    key: Key = None,
    trusted: Trusted = None,
    out: Out = None,
    json_: Json = False,
) -> None:
    """Release a new model only if it reaches the floor and no site and no held-out set shows, or may hide, that it is worse than the
    one released last. Exit code 4 if it is refused."""
    if (against is None) is not first:
        raise ConfigError("give --against BUNDLE, the model that was released last, or --first where there is none")
    if (new / "config.yaml").is_file():
        new, run = new / "bundle", run or new
    from pneumofed.common.model_bundle.bundle import load_bundle
    from pneumofed.common.wire.keys import read_private_key, read_public_key
    from pneumofed.server.operations.settings import CoordinatorFolder
    from pneumofed.server.release.chain import append_release, read_chain
    from pneumofed.server.release.release import audit_of, publish, summary_lines

    key = key or _find_key(folder, run)
    signing = read_private_key(key)
    known = [read_public_key(file) for file in trusted or ()] or [signing.public_key()]
    place = CoordinatorFolder(folder) if folder else None
    file = chain or _chain_file(place, key)
    terms = _terms(
        policy or (place.release_policy if place else None), (margin, point_margin, site_margin, site_point_margin, alpha)
    )
    bundle = load_bundle(new, known)
    old = load_bundle(against, known) if against else None
    last = read_chain(file, known).last
    if last is not None and last.new.digest == bundle.digest:  # of a command that ended before it wrote the mark
        record = last
    else:
        links = _links(file, old, against, known, place)
        record = _decide((old, bundle), links, terms, lambda models: _gather(models, run, folder, verdict or ()))
        if record.released:
            append_release(file, links, record, signing)
    written = publish(record, new, signing, [out or run or new.resolve().parent], audit_of(place) if place else None)
    if json_:
        print_json(record.model_dump(mode="json"), indent=1)
    else:
        for line in [*summary_lines(record), *(f"written: {path}" for path in written)]:
            say(line)
    if not record.released:
        raise typer.Exit(REFUSED)


def _chain_file(place: CoordinatorFolder | None, key: Path) -> Path:
    from pneumofed.server.release.chain import CHAIN_FILE

    return (place.state if place else key.parent) / CHAIN_FILE


def _links(
    file: Path, old: Bundle | None, against: Path | None, known: list[PublicKey], place: CoordinatorFolder | None
) -> ReleaseChain:
    """The releases that this one follows; none before a first one."""
    from pneumofed.server.release.chain import check_against_audit, continue_from, read_chain
    from pneumofed.server.release.release import audit_of

    links = read_chain(file, known)
    if old is not None and against is not None:
        links = continue_from(links, old, against, known)
    elif links.last is not None:
        last = links.last.new
        raise ConfigError(f"--first works once: {last.name} ({last.digest[:16]}) was released before; give it with --against")
    if place is not None:
        check_against_audit(links, audit_of(place).path)
    return links


def _terms(policy: Path | None, asked: tuple[float | None, ...]) -> Terms:
    """The policy, and the margins on held-out sets and at the sites; those that were asked for take the place of the policy's."""
    from pneumofed.common.config.reader import build_config
    from pneumofed.common.evaluation.comparison import Margins
    from pneumofed.server.release.gate import DEFAULT_POLICY, check_margins, read_release_policy

    stated = read_release_policy(policy)
    found, (auroc, point, site_auroc, site_point, alpha) = stated or DEFAULT_POLICY, asked

    def margins(default: Margins, auroc: float | None, point: float | None) -> Margins:
        given = {"auroc": auroc, "point": point, "alpha": alpha}
        values = default.model_dump() | {name: value for name, value in given.items() if value is not None}
        return build_config(Margins, values, "the margins")

    central = margins(found.margins, auroc, point)
    chosen = central, margins(found.site_margins or central, site_auroc, site_point)
    if stated is not None:
        check_margins(stated, chosen)
    return found, chosen


def _decide(
    models: tuple[Bundle | None, Bundle], links: ReleaseChain, terms: Terms, gather: Callable[[tuple[Bundle, Bundle]], Evidence]
) -> ReleaseRecord:
    from datetime import UTC, datetime

    from pneumofed.server.release.gate import decide_release, first_release

    (old, bundle), (policy, margins) = models, terms
    if old is None:
        return first_release(bundle, gather((bundle, bundle)).central, margins, datetime.now(UTC), policy.floor)
    return decide_release((old, bundle), gather((old, bundle)), margins, policy=policy, losses=links.losses())


def _find_key(folder: Path | None, run: Path | None) -> Path:
    """The key that `pneumofed export` made: the coordinator's, or that of a run without a coordinator folder."""
    places = [place for place in (folder, run and run.resolve().parent.parent, run) if place]
    found = [place / "keys" / "release" / "node" for place in places]
    for file in found:
        if file.is_file():
            return file
    raise ConfigError("no key to sign the record with: give --key FILE, the private key that signs this coordinator's bundles")


def _gather(models: tuple[Bundle, Bundle], run: Path | None, folder: Path | None, verdicts: Sequence[Path]) -> Evidence:
    """All comparisons of `models` (old, new) that there are; of a first model, which is given twice, its own numbers on the sets."""
    from pneumofed.common.model_bundle.evaluate import check_comparable
    from pneumofed.server.operations.settings import CoordinatorFolder
    from pneumofed.server.release.gate import Evidence
    from pneumofed.server.release.release import compare_on_sets, read_verdicts, site_keys, sites_of_run

    first = models[0] is models[1]
    if not first:
        check_comparable(*models)
    sets = _sets(run, folder)
    central = compare_on_sets(*models, sets.manifests, sets.cache, sets.device, sets.threads)
    if first:
        return Evidence(central, {})
    keys = site_keys(CoordinatorFolder(folder)) if folder else {}
    sites = {**(virtual_comparisons(run, models) if run else {}), **read_verdicts(verdicts, keys, models)}
    expected = sites_of_run(run) if run else []
    return Evidence(central, sites, expected, max(len(expected), models[1].manifest.card.sites), sets.needed)


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
    from pneumofed.client.data.bundles import compare_at_site
    from pneumofed.client.federation.site_data import read_site_config

    if not (run / "simulation.yaml").is_file():
        return {}
    files = sorted((run / "sites").glob("*.yaml"), key=lambda file: int(file.stem))
    configs = [read_site_config(file) for file in files]
    return {config.name: compare_at_site(config, *models).comparison for config in configs}
