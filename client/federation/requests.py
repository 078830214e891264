"""One message at a site that has a policy: recorded when it comes, checked, and what leaves is recorded before it leaves."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast, get_args

from pneumofed.client.federation.policy import UNRESTRICTED, Clock, count_round, local_now, policy_of
from pneumofed.client.federation.policy_decision import ArrivalFacts, RunRequest, TrainingData, Work, decide
from pneumofed.client.federation.site_data import SiteData, load_site
from pneumofed.client.site.folder import APP_VARIABLE, COORDINATOR_VARIABLE
from pneumofed.common.audit.hash_chain import canonical
from pneumofed.common.audit.log import (
    ANSWER_EVENT,
    FAILURE_EVENT,
    MALFORMED_EVENT,
    REFUSAL_EVENT,
    REQUEST_EVENT,
    AuditLog,
    hash_experiment,
)
from pneumofed.common.config.parties import SiteConfig, SitePolicy
from pneumofed.common.data.cache import load_digests
from pneumofed.common.data.manifest import read_manifest
from pneumofed.common.errors import MessageError, PneumofedError, PolicyError
from pneumofed.common.secure_aggregation.protocol import read_step
from pneumofed.common.wire.instructions import Instruction, unpack_instruction
from pneumofed.common.wire.messages import attach_head, describe_content


def audit_log(config: SiteConfig) -> AuditLog:
    return AuditLog(Path(config.work_dir) / "audit.jsonl", config.name)


Handler = Callable[[Instruction, SiteConfig, SitePolicy], Any]
"""Makes the content of a reply, under the policy as it stood when the message came."""


def answer_request(instruction: Instruction, config: SiteConfig, work: Work, handler: Handler) -> Any:
    """Returns the handler's reply content. Where the site has a policy, nothing is read against it and nothing leaves unrecorded.

    The policy is read here, once, and handed down: an edit while the message is answered is for the next one.

    Args:
        instruction: what the coordinator asks.
        config: the site's own.
        work: the kind of the message.
        handler: makes the content.

    Raises:
        PolicyError: the policy forbids it; no data was read, except for the count of patients.
    """
    if config.policy is None:
        return handler(instruction, config, UNRESTRICTED)
    log, asked = audit_log(config), {"work": work, "run": instruction.run, "round": instruction.round}
    if instruction.step:
        step = read_step(instruction.step)  # read before by `read_request`, hence sound
        asked |= {"secure_sum": f"{step.purpose} {step.stage}"}
    try:
        log.record(REQUEST_EVENT, **asked, **_who_asks(instruction))
        policy = policy_of(config)
        admit(instruction, config, policy, work)
        content = handler(instruction, config, policy)
        leaving = describe_content(content)
        data = {"data": hash_data(config)} if _reads_data(instruction) else {}
        attach_head(content, log.record(ANSWER_EVENT, **asked, **data, **leaving))
        return content
    except PolicyError as error:
        log.record(REFUSAL_EVENT, **asked, rule=error.rule, detail=str(error))
        raise
    except Exception as error:
        log.record(FAILURE_EVENT, **asked, error=type(error).__name__)
        raise


def read_request(content: Any, kind: str, config: SiteConfig) -> tuple[Instruction, Work]:
    """Reads a message of the coordinator; one that is malformed leaves a line in the audit log of a site that has a policy.

    Args:
        content: of the message, not trusted.
        kind: Flower's type of it, such as `train` or `train.default`.
        config: the site's own.

    Raises:
        MessageError: it does not follow the agreed format.
        ConfigError: its experiment does not fit this version's schema.
    """
    work = kind.partition(".")[0]
    try:
        if work not in get_args(Work):
            raise MessageError(f"expected a message of type {', '.join(get_args(Work))}")
        instruction = unpack_instruction(content)
        if instruction.step:
            read_step(instruction.step)
    except PneumofedError as error:
        if config.policy is not None:
            facts = {"work": work} if work in get_args(Work) else {}
            audit_log(config).record(MALFORMED_EVENT, **facts, error=type(error).__name__)
        raise
    return instruction, cast(Work, work)


def admit(instruction: Instruction, config: SiteConfig, policy: SitePolicy, work: Work, clock: Clock = local_now) -> None:
    """Refuses what can be refused before any data is read; a training round that passes is counted.

    Args:
        instruction: what the coordinator asks.
        config: the site's own.
        policy: the site's, as it stood when the message came.
        work: the kind of the message.
        clock: returns the local time.

    Raises:
        PolicyError, BudgetError: names the rule.
    """
    request, now = _request(instruction, work), clock()
    decide(policy, request, ArrivalFacts(now)).enforce()
    if work != "train":
        return
    if request.private:
        from pneumofed.client.privacy.spending import check_budget  # Opacus costs a second to import

        check_budget(config, policy, instruction.experiment, instruction.run)
    count_round(policy, request, Path(config.work_dir), now)  # last: a refused round does not count


def open_site_data(instruction: Instruction, config: SiteConfig, policy: SitePolicy, work: Work) -> SiteData:
    """Loads the site's data for the instruction's experiment.

    Args:
        instruction: what the coordinator asks.
        config: the site's own.
        policy: the site's, as it stood when the message came.
        work: the kind of the message.

    Raises:
        PolicyError: it holds fewer training patients than the policy asks for.
        DataError: as `load_site`.
    """
    site = load_site(config, instruction.experiment)
    decide(policy, _request(instruction, work), TrainingData(len(set(site.train.patients)), site.patients)).enforce()
    return site


def hash_data(config: SiteConfig) -> str:
    """Computes the SHA-256 over label and content digest of the manifest's images, in any order; the same data gives the same hash."""
    records = read_manifest(Path(config.manifest)).records
    digests = load_digests([record.path for record in records], Path(config.work_dir) / "cache", workers=1)
    rows = sorted([record.label or "", str(digest)] for record, digest in zip(records, digests, strict=True))
    return hashlib.sha256(canonical(rows)).hexdigest()


def _request(instruction: Instruction, work: Work) -> RunRequest:
    alone = instruction.first is not None
    return RunRequest.of(instruction.experiment, work, instruction.run, instruction.round, alone=alone)


def _reads_data(instruction: Instruction) -> bool:
    """False for the steps of secure aggregation in which only keys and shares are exchanged."""
    return instruction.step is None or read_step(instruction.step).stage == "mask"


def _who_asks(instruction: Instruction) -> dict[str, Any]:
    heads = {"heads": {"coordinator": instruction.audit_head}} if instruction.audit_head else {}
    return {
        "coordinator": os.environ.get(COORDINATOR_VARIABLE, "unknown"),
        "app": os.environ.get(APP_VARIABLE, "unknown"),
        "config": hash_experiment(instruction.experiment),
        **heads,
    }
