"""`pneumofed site` and `pneumofed privacy`: what a hospital's engineer types. Nothing heavy is imported before a command needs it.

`pneumofed privacy` shows what the hospital's data has spent, what a run would spend, and whether the ledger holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from pneumofed.client.cli.bundles import compare, operating_point
from pneumofed.client.cli.data import app as data_app
from pneumofed.common.errors import counted
from pneumofed.common.ops.command_line import FAILURE, NOT_RUNNING, Json, Site, Trusted, console, print_json, say

app = typer.Typer(no_args_is_help=True, help="Take part in a federation as a hospital.")


app.add_typer(data_app, name="data")
app.command("compare")(compare)
app.command("operating-point")(operating_point)


@app.command("init")
def site_init(
    folder: Annotated[Path, typer.Argument(help="The site folder; made if missing.")] = Path(),
    kit: Annotated[Path | None, typer.Option(help="The kit from the coordinator: an archive or a folder.")] = None,
    name: Annotated[str | None, typer.Option(help="Without a kit: this site's name.")] = None,
    coordinator: Annotated[str | None, typer.Option(help="Without a kit: HOST:PORT of the coordinator.")] = None,
    ca: Annotated[Path | None, typer.Option(help="Without a kit: the federation's certificate authority (PEM).")] = None,
) -> None:
    """Make a site folder, from the coordinator's kit or by hand, with a key that never leaves it."""
    from pneumofed.client.site.folder import SiteFolder
    from pneumofed.client.site.init import init_by_hand, init_from_kit
    from pneumofed.common.errors import ConfigError

    if kit is not None and (name or coordinator or ca):
        raise ConfigError("give either --kit, or --name and --coordinator (and --ca)")
    if kit is not None:
        done = init_from_kit(folder, kit)
        say(f"site folder: {folder}")
        if done.kept:
            say(f"left as they were: {', '.join(done.kept)}")
        if done.renewed_until:
            say(f"this site's certificate is renewed until {done.renewed_until:%Y-%m-%d}; it is used from the next start on")
        if done.brought_key:
            say("the kit brought the private key: whoever made it, or saw it on its way, can act as this site")
        opened = SiteFolder.open(folder)
        if done.made:
            _tell_of_key(done.made, opened.config.name, has_ca=True)
        certificate = opened.connection.client_certificate
        if certificate is not None and not Path(certificate).exists():
            say("the coordinator then sends a kit with this site's certificate: pneumofed site init again, with that kit")
        say("read policy.yaml, then: pneumofed site data add, pneumofed site preflight, pneumofed site start")
        return
    if not (name and coordinator):
        raise ConfigError("give --kit FILE, or --name NAME --coordinator HOST:PORT [--ca FILE]")
    _tell_of_key(init_by_hand(folder, name, coordinator, ca), name, has_ca=ca is not None)


@app.command("preflight")
def site_preflight(site: Site = Path(), json_: Json = False) -> None:
    """Check everything that a run needs, and say how to mend what is wrong.

    Exit code: 0 nothing is wrong, 10 environment, 11 certificates or keys, 12 connection, 13 data, 14 policy; the first of these if
    there are several. Warnings do not fail.
    """
    from pneumofed.client.site.folder import SiteFolder
    from pneumofed.client.site.preflight import exit_code, findings_table, run_checks

    findings = run_checks(SiteFolder.open(site))
    if json_:
        print_json([asdict(finding) for finding in findings])
    else:
        console.print(findings_table(findings))
    raise typer.Exit(exit_code(findings))


@app.command("approve")
def site_approve(
    app_hash: Annotated[str | None, typer.Argument(help="SHA-256 of an app bundle.", metavar="[HASH]")] = None,
    bundle: Annotated[Path | None, typer.Option(help="A bundle file (.fab) whose hash is approved.")] = None,
    installed: Annotated[
        bool, typer.Option("--installed", help="Approve the code that is installed here, in every version.")
    ] = False,
    list_: Annotated[bool, typer.Option("--list", help="Show what is approved.")] = False,
    remove: Annotated[bool, typer.Option("--remove", help="Take the approval back.")] = False,
    site: Site = Path(),
) -> None:
    """Approve code that may run here, by the hash of its bundle; edits policy.yaml."""
    from pneumofed.client.site.approval import INSTALLED, approve_app, hash_app_file, installed_hash, revoke, study_files
    from pneumofed.client.site.folder import SiteFolder
    from pneumofed.common.audit.log import APP_APPROVED, APP_REVOKED
    from pneumofed.common.errors import ConfigError

    folder = SiteFolder.open(site)
    if list_:
        for known in folder.policy.approved_apps:
            say(f"installed  {installed_hash(folder.work)}" if known == INSTALLED else known)
        return
    given = [value for value in (app_hash, bundle and hash_app_file(bundle), INSTALLED if installed else None) if value]
    if len(given) != 1:
        raise ConfigError("give one of HASH, --bundle FILE, --installed, --list")
    for held in study_files(bundle) if bundle else ():
        say(f"it holds the study's own code {held}: read it with `unzip -p {bundle} {held}`")
    done = revoke(folder.policy_file, given[0]) if remove else approve_app(folder.policy_file, given[0])
    if done:
        folder.audit.record(APP_REVOKED if remove else APP_APPROVED, app=given[0])
    say(f"{given[0]}: {'no longer approved' if remove else 'approved'}" + ("" if done else ", as before"))


@app.command("start")
def site_start(
    site: Site = Path(),
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay in the foreground, for systemd and containers.")] = False,
) -> None:
    """Connect to the coordinator and answer its runs, within the policy."""
    from pneumofed.client.site.folder import SiteFolder
    from pneumofed.client.site.service import run_in_foreground, start_service

    folder = SiteFolder.open(site)
    if foreground:
        run_in_foreground(folder)
    pid = start_service(folder, say)
    say(f"{folder.config.name} runs as process {pid}; log: {folder.work / 'supernode.log'}")


@app.command("status")
def site_status(site: Site = Path(), json_: Json = False) -> None:
    """Show how the site is: process, health, last reply, audit log, refusals. Exits with 3 if it does not run."""
    from pneumofed.client.site.folder import SiteFolder
    from pneumofed.client.site.service import read_status

    found = read_status(SiteFolder.open(site))
    if json_:
        print_json(asdict(found))
    else:
        _show_status(found)
    raise typer.Exit(0 if found.process == "running" else NOT_RUNNING)


@app.command("stop")
def site_stop(site: Site = Path()) -> None:
    """Stop answering: the SuperNode ends, gently and then not."""
    from pneumofed.client.site.folder import SiteFolder
    from pneumofed.client.site.service import stop_service

    folder = SiteFolder.open(site)
    say(f"{folder.config.name} {'stopped' if stop_service(folder) else 'did not run'}")


@app.command("dossier")
def site_dossier(
    run: Annotated[
        str, typer.Argument(help="The run: its token, the first digits of it, or the study's name.", show_default="the only run")
    ] = "",
    bundle: Annotated[Path | None, typer.Option(help="The released model, for what its card says of its use.")] = None,
    trusted: Trusted = None,
    attack: Annotated[Path | None, typer.Option(help="Folder or attack.json of `pneumofed privacy attack`.")] = None,
    anchored_by: Annotated[
        Path | None,
        typer.Option(help="The coordinator's audit log: who took part, and whether it knows lines that are gone here."),
    ] = None,
    site: Site = Path(),
    json_: Json = False,
) -> None:
    """Write one page for who must sign for the hospital: what left in a run, by which rule, what was refused and spent, and what is open.

    Exit code: 0 the page is written, 1 it is too, but the audit log or the ledger cannot be relied on, as the page says first.
    """
    from pneumofed.client.site.dossier import Handed, build_dossier
    from pneumofed.client.site.dossier_page import dossier_json, problems_of, write_dossier
    from pneumofed.client.site.dossier_sources import read_attack_bench, read_coordinator_log, read_model
    from pneumofed.client.site.folder import SiteFolder

    folder = SiteFolder.open(site)

    def hand_over(token: str, terms: Mapping[str, Any] | None) -> Handed:
        return Handed(
            read_model(bundle, trusted or [], token) if bundle else None,
            read_attack_bench(attack, terms) if attack else None,
            read_coordinator_log(anchored_by, folder.audit.path, folder.config.name, token) if anchored_by else None,
        )

    found = build_dossier(folder, run, hand_over)
    page, problems = write_dossier(found, folder), problems_of(found)
    if json_:
        print_json(dossier_json(found))
    else:
        say(f"dossier: {page}")
        for problem in problems:
            say(problem, style="red")
    raise typer.Exit(FAILURE if problems else 0)


def _tell_of_key(public: Path, name: str, has_ca: bool) -> None:
    from pneumofed.common.wire.keys import key_fingerprint, read_public_key

    say(f"send to the coordinator: {public} (public; keys/node stays here and is never sent)")
    say(f"and compare on the telephone: {key_fingerprint(read_public_key(public))}")
    if not has_ca:
        say(f"ask the coordinator for the certificate authority and put it into {public.parent / 'ca.crt'}")
    say(f"when the coordinator has admitted {name}: pneumofed site preflight")


def _show_status(found: Any) -> None:
    health = "answers" if found.serving else "does not answer"
    say(f"{found.site}: {found.process}" + (f" (process {found.pid}), {health}" if found.pid else ""))
    say(f"coordinator: {found.coordinator}")
    if found.last_answer:
        last = found.last_answer
        say(f"last reply: {last['work']}, round {last['round']} of run {last['run']}, {last['time'][:19]}Z")
    say(f"audit log: {found.audit_problem or counted(found.audit_lines, 'line') + f', unbroken, head {found.audit_head}'}")
    refusals = ", ".join(f"{rule} {count}" for rule, count in found.refusals_today.items())
    say(f"refusals today: {refusals or 'none'}")


privacy_app = typer.Typer(no_args_is_help=True, help="The privacy budget of a hospital's data.")


@privacy_app.command("show")
def privacy_show(site: Site = Path(), json_: Json = False) -> None:
    """Show what was spent of the budget, on which data, by which study and run, what remains, and how many evaluations and surveys were
    answered."""
    from pneumofed.client.federation.evaluations import read_evaluations
    from pneumofed.client.federation.exposure import statistics_sentence, survey_sentence
    from pneumofed.client.federation.policy import local_now, policy_of
    from pneumofed.client.federation.survey import read_surveys
    from pneumofed.client.privacy.ledger import open_ledger
    from pneumofed.client.privacy.ledger_report import accounts, runs_table
    from pneumofed.client.site.folder import SiteFolder

    config = SiteFolder.open(site).config
    limits = policy_of(config)
    found = accounts(open_ledger(config).lineages(), limits)
    if json_:
        print_json([asdict(account) for account in found])
        return
    if not found:
        limit = "no limit is set" if limits.max_epsilon is None else f"the limit is epsilon {limits.max_epsilon:g}"
        say(f"nothing was spent; {limit}")
    for account in found:
        say(account.sentence())
        console.print(runs_table(account))
    say(statistics_sentence(limits))
    say(survey_sentence(limits))
    for sentence in (*read_evaluations(Path(config.work_dir)).sentences(local_now()), *read_surveys(Path(config.work_dir))):
        say(sentence)


@privacy_app.command("plan")
def privacy_plan(
    experiment: Annotated[Path, typer.Argument(help="YAML file of the experiment.")],
    site: Site = Path(),
    out: Annotated[
        Path | None,
        typer.Option(help="Picture of epsilon over the rounds (PNG).", show_default="epsilon-NAME.png in the work folder"),
    ] = None,
    json_: Json = False,
) -> None:
    """Show what a run would spend here on top of what was spent, and draw it. Reads the images; trains and counts nothing.

    Exit code: 0 all rounds are within the budget, 1 the site would refuse the run or one of its rounds.
    """
    from pneumofed.client.federation.policy import policy_of
    from pneumofed.client.privacy.ledger_report import draw_forecast, forecast
    from pneumofed.client.site.folder import SiteFolder
    from pneumofed.common.config.experiment import ExperimentConfig
    from pneumofed.common.config.reader import build_config, read_yaml

    config = SiteFolder.open(site).config
    run = build_config(ExperimentConfig, read_yaml(experiment), experiment.name)
    found = forecast(config, run, policy_of(config))
    picture = out or Path(config.work_dir) / f"epsilon-{run.name}.png"
    draw_forecast(found, picture)
    if json_:
        print_json(asdict(found))
    else:
        for sentence in found.sentences():
            say(sentence)
        say(f"picture: {picture}")
    raise typer.Exit(FAILURE if found.refused_from is not None else 0)


@privacy_app.command("verify")
def privacy_verify(site: Site = Path(), json_: Json = False) -> None:
    """Check the ledger: each entry as it was written, every epsilon by the other accountant, each answered round counted.

    Exit code: 0 it holds, 1 it does not.
    """
    from pneumofed.client.privacy.ledger_report import verify_ledger
    from pneumofed.client.site.folder import SiteFolder

    report = verify_ledger(SiteFolder.open(site).config)
    if json_:
        print_json({**asdict(report), "intact": report.intact})
    else:
        for problem in report.problems:
            say(problem, style="red")
        say(report.sentence())
    raise typer.Exit(0 if report.intact else FAILURE)
