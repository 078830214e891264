"""A survey at the coordinator: every connected site is asked once, before any training, and what it tells is kept in `survey.json`.

run_survey(grid, experiment, settings)   asks, checks and keeps the answers
read_survey(folder)                      reads them again, for the page (`server.report.survey`)

No weights travel and nothing is enrolled. Which tables a site tells is its policy's (`client.federation.survey`).
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from flwr.app import Message, MessageType
from flwr.serverapp import Grid
from pydantic import Field

from pneumofed.common.audit.log import SURVEY_EVENT
from pneumofed.common.config.experiment import ExperimentConfig, Fraction, Section
from pneumofed.common.config.parties import CoordinatorConfig, SurveyField
from pneumofed.common.errors import ConfigError, MessageError, RoundError
from pneumofed.common.files import write_file
from pneumofed.common.wire.instructions import Instruction, pack_instruction
from pneumofed.common.wire.survey import SurveyAnswer, own_classes, survey_fields, unpack_survey
from pneumofed.server.federation.enrolment import list_reasons
from pneumofed.server.federation.messaging import Messenger
from pneumofed.server.runs.events import RunLog

logger = logging.getLogger(__name__)

SURVEY_FILE = "survey.json"


class SurveyResult(Section):
    """What a survey brought. `absent` says of each other site, or node, why it told nothing."""

    name: str
    asked: tuple[SurveyField, ...]
    validation_fraction: Fraction
    """Share of the patients that the planned run keeps for validation."""
    written: str
    answers: dict[str, SurveyAnswer] = Field(default_factory=dict)
    absent: dict[str, str] = Field(default_factory=dict)
    phantom: bool = False
    """Whether the images are drawn."""
    classes: tuple[str, ...] = ()
    """The planned run's own, by which patients were counted; empty for the labels of the named tasks."""


def run_survey(grid: Grid, experiment: ExperimentConfig, settings: CoordinatorConfig) -> SurveyResult:
    """Asks every connected site, and keeps what they tell in the folder that the settings name.

    Args:
        grid: Flower's way to the connected nodes.
        experiment: of the planned run: its validation patients, and how long to wait and for how many sites (`strategy`).
        settings: folder, audit log, and what is asked.

    Raises:
        ConfigError: nothing is asked, or the experiment hides single sites.
        RoundError: no site told anything; why is kept all the same.
    """
    asked = tuple(settings.survey or ())
    if not asked:
        raise ConfigError("a survey asks for one field at least")
    check_survey(experiment, asked)
    folder = Path(settings.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    run_log = RunLog.of(settings, secrets.token_hex(8))
    answers, absent, heads = _ask(grid, experiment, asked, run_log)
    result = SurveyResult(
        name=folder.name,
        asked=asked,
        validation_fraction=experiment.training.validation_fraction,
        written=f"{datetime.now(UTC):%d %B %Y, %H:%M} UTC",
        answers=answers,
        absent=absent,
        classes=own_classes(experiment.task),
    )
    write_survey(folder, result)
    if run_log.audit:
        run_log.audit.record(SURVEY_EVENT, run=run_log.run, asked=list(asked), sites=sorted(answers), heads=heads)
    if not answers:
        raise RoundError(f"no site told anything. {list_reasons(absent, nobody='No node is connected; start the sites.')}")
    return result


def check_survey(experiment: ExperimentConfig, asked: Sequence[SurveyField] = ()) -> None:
    """Refuses a survey of an experiment that hides single sites, and a question that is about no images of its kind.

    Args:
        experiment: of the planned run; with `image.slices` CT volumes are counted.
        asked: the fields.

    Raises:
        ConfigError: it hides them, or one is.
    """
    known = survey_fields(volumes=experiment.image.slices > 0)
    if others := [field for field in asked if field not in known]:
        kind = "CT volumes" if experiment.image.slices else "radiographs"
        raise ConfigError(f"a survey of {kind} (image.slices) has no {others[0]}; ask for {', '.join(known)}")
    if experiment.secure_aggregation.enabled:
        raise ConfigError(
            "a survey shows each site's own counts, which secure_aggregation hides: ask with secure_aggregation.enabled=false; sites "
            "that require it tell nothing"
        )


def write_survey(folder: Path, result: SurveyResult) -> None:
    """Writes the result into a survey's folder.

    Args:
        folder: of the survey.
        result: what is kept.
    """
    write_file(folder / SURVEY_FILE, (result.model_dump_json(indent=2) + "\n").encode())


def read_survey(folder: Path) -> SurveyResult:
    """Reads what a survey brought.

    Raises:
        ConfigError: the folder holds no survey, or a damaged one.
    """
    path = folder / SURVEY_FILE
    if not path.is_file():
        raise ConfigError(f"{folder} holds no survey: there is no {SURVEY_FILE}")
    try:
        return SurveyResult.model_validate_json(path.read_bytes())
    except ValueError:
        raise ConfigError(f"{path} is damaged; ask again under another name") from None


def _ask(
    grid: Grid, experiment: ExperimentConfig, asked: tuple[SurveyField, ...], run_log: RunLog
) -> tuple[dict[str, SurveyAnswer], dict[str, str], dict[str, str]]:
    """Answers by site, reasons by site or node, heads of the sites' audit logs."""
    cfg = experiment.strategy
    deadline = time.monotonic() + cfg.wait_timeout_sec
    while len(list(grid.get_node_ids())) < max(1, cfg.wait_for_sites) and time.monotonic() < deadline:
        time.sleep(0.2)
    head = run_log.audit.head() if run_log.audit else None
    content = pack_instruction(Instruction(experiment, run_log.run, 0, audit_head=head, survey=asked))
    nodes = {f"node {node}": node for node in grid.get_node_ids()}
    messages = {name: Message(content, dst_node_id=node, message_type=MessageType.QUERY) for name, node in nodes.items()}
    answers: dict[str, SurveyAnswer] = {}
    absent: dict[str, str] = {}
    heads: dict[str, str] = {}

    def take(node: str, message: Message) -> bool:
        try:
            presence, answer = unpack_survey(message.content, asked, own_classes(experiment.task))
        except MessageError as error:
            absent[node] = f"MessageError: {error}"
            return False
        if presence.site in answers:
            absent[node] = f"another node already answers as {presence.site}"
            return False
        answers[presence.site] = answer
        if presence.audit_head:
            heads[presence.site] = presence.audit_head
        return True

    failures = Messenger(grid, run_log.activity).exchange(messages, "survey", 0, cfg.round_timeout_sec, take)
    absent |= {failure.site or node: str(failure) for node, failure in failures.items()}
    for site, reason in absent.items():
        logger.warning("%s tells nothing: %s", site, reason)
    return dict(sorted(answers.items())), dict(sorted(absent.items())), heads
