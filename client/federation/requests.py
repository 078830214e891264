"""One message at a site that has a policy: recorded when it comes, checked, and what leaves is recorded before it leaves.

What leaves beside the update, and what the policy makes of it (`Disclosure`):

    numbers of images          exact; with noise, where the policy names `count_noise`; under masks in secure aggregation
    the data report            as it is; `withhold: [data_report]` leaves only the numbers above
    metrics of training        as they are, in private training only those without data; `withhold: [training_metrics]` keeps them
    validation statistics      coarse, counted and of enough patients (`client.federation.evaluations`), or under masks; `withhold:
                               [validation_statistics]` sends those of no image
    those of the site's own model  by the same rules, or not at all: never in secure aggregation, which sums those of one model, and in
                               private training with `privacy.open_metrics` only
    the model trained alone    with `evaluation.cross_site` and `share_own_model` only, where its statistics may leave too
    suitability scores         of validation patients, in 64 bins, as validation statistics and by the same rules

Where the policy sets a limit of epsilon, what comes from the raw data without noise is withheld: the data report, metrics with data
whatever `privacy.open_metrics` says, and validation statistics, these two unless `open_statistics` lets them go. The numbers of
images are what differential privacy here treats as known; `count_noise` counts them too.

The time that an answer takes is seen by who waits for it; no policy hides that.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from pneumofed.client.federation.held_model import restore_model
from pneumofed.client.federation.policy import UNRESTRICTED, Clock, count_round, hash_policy, local_now, policy_of
from pneumofed.client.federation.policy_decision import LIMITS, ArrivalFacts, RunRequest, TrainingData, Work, decide
from pneumofed.client.federation.site_data import SPLIT_KEY_FILE, SiteData, load_site
from pneumofed.client.site.folder import APP_VARIABLE, COORDINATOR_VARIABLE
from pneumofed.common.audit.log import (
    ANSWER_EVENT,
    FAILURE_EVENT,
    MALFORMED_EVENT,
    REFUSAL_EVENT,
    REQUEST_EVENT,
    AuditLog,
    canonical,
    hash_experiment,
)
from pneumofed.common.config.choices import Withheld
from pneumofed.common.config.classes import classes_of, task_words
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.config.parties import SiteConfig, SitePolicy
from pneumofed.common.data.cache import load_digests
from pneumofed.common.data.manifest import read_manifest
from pneumofed.common.errors import MessageError, PneumofedError, PolicyError
from pneumofed.common.privacy.randomness import own_secret
from pneumofed.common.secure_aggregation.protocol import read_step
from pneumofed.common.wire.instructions import Instruction, unpack_instruction
from pneumofed.common.wire.messages import Presence, attach_head, describe_content

OPEN_METRICS = ("steps", "learning_rate", "train_sec")
"""Metrics of a private round that leave without noise: the first two are the plan's own, seconds show how many units were drawn."""
SPENDING_METRICS = ("epsilon", "noise_multiplier")
COUNT_METRICS = ("steps", "images_per_sec")
"""Metrics from which the number of training images can be computed."""


@dataclass(frozen=True)
class Disclosure:
    """What of `site` may leave in a run. `train` is the number of training images that it states, 1 at least."""

    site: SiteData
    policy: SitePolicy
    train: int
    report: Mapping[str, Any]

    @classmethod
    def of(cls, site: SiteData, experiment: ExperimentConfig, policy: SitePolicy) -> Disclosure:
        """Selects what `policy` lets leave of what the experiment asks for.

        Args:
            site: the site's data.
            experiment: of the run.
            policy: the site's, as it stood when the message came.

        Raises:
            PolicyError, BudgetError: the ledger cannot be used, or has no budget for noised counts.
        """
        kept_back = withheld_of(policy, len(set(site.validation.patients)))
        withheld = {"withheld": sorted(kept_back)} if kept_back else {}
        if experiment.secure_aggregation.enabled:  # counts go under the masks, and the presence states none
            return cls(site, policy, max(1, len(site.train.labels)), withheld)
        counts = _counts(site, experiment, policy)
        report = {} if policy.count_noise or "data_report" in kept_back else dict(site.public_report)
        return cls(site, policy, counts["train"], {**report, **counts, **withheld})

    def presence(self, layout: str) -> Presence:
        """Who the site is, with the counts that may leave."""
        return Presence(self.site.name, layout, self.report)

    def metrics(self, training: Mapping[str, float]) -> dict[str, float]:
        """Selects those of `training` that may leave; what was spent on privacy always may."""
        metrics = dict(training)
        if self.withholds("training_metrics"):
            metrics = {name: value for name, value in metrics.items() if name in SPENDING_METRICS}
        if not shows_statistics(self.policy):
            metrics = {name: value for name, value in metrics.items() if name in (*SPENDING_METRICS, *OPEN_METRICS)}
        if self.policy.count_noise:
            metrics = {name: value for name, value in metrics.items() if name not in COUNT_METRICS}
        return metrics

    def withholds(self, kind: Withheld) -> bool:
        return kind in withheld_of(self.policy, len(set(self.site.validation.patients)))

    def shows_personal(self, experiment: ExperimentConfig) -> bool:
        """Whether statistics of the site's own model may leave, once they are counted as one more answer.

        That model is trained without noise, so that in a private run they tell of the training images what no epsilon is counted for, as
        the training loss does; `privacy.open_metrics` asks for both, and the policy has the last word on both.
        """
        return experiment.personal.is_on and self.shows_unnoised(experiment)

    def shows_unnoised(self, experiment: ExperimentConfig) -> bool:
        """Whether statistics of a model that the site trains without noise beside the run's may leave, once they are counted."""
        if experiment.secure_aggregation.enabled:
            return False
        noised = experiment.privacy.mechanism != "none"
        return not self.withholds("validation_statistics") and (experiment.privacy.open_metrics or not noised)

    def shares_own_model(self, experiment: ExperimentConfig) -> bool:
        """Whether the model that the site trained alone may leave: where the run asks for it, the policy says so by its own key, and its
        statistics may leave, since the validation patients choose which round's weights it has.

        Args:
            experiment: of the run; one that is private in any way, or sums under masks, never gets it, whatever its own checks say.
        """
        hidden = experiment.privacy.mechanism != "none" or experiment.central_privacy.enabled
        if hidden or not experiment.evaluation.cross_site or not self.policy.share_own_model:
            return False
        return not rule_against_own_model(self.policy) and self.shows_unnoised(experiment)


def is_limited(policy: SitePolicy) -> bool:
    """Whether the policy sets a limit of epsilon."""
    return any(getattr(policy, limit) is not None for limit in LIMITS)


def shows_statistics(policy: SitePolicy) -> bool:
    """Whether numbers that were counted on the data without noise may leave: not beside a limit of epsilon, unless the hospital says so."""
    return policy.open_statistics or not is_limited(policy)


def rule_against_statistics(policy: SitePolicy) -> str:
    """Names the key of policy.yaml by which no validation statistics leave, however many patients there are; empty where they may."""
    if "validation_statistics" in policy.withhold:
        return "withhold"
    return "" if shows_statistics(policy) else next(limit for limit in LIMITS if getattr(policy, limit) is not None)


def rule_against_own_model(policy: SitePolicy) -> str:
    """Names the key of policy.yaml by which the model that the site trained alone never leaves; empty where `share_own_model` decides.

    Args:
        policy: the site's.
    """
    if "validation_statistics" in policy.withhold:
        return "withhold"
    if policy.require_secure_aggregation:
        return "require_secure_aggregation"
    return next((limit for limit in LIMITS if getattr(policy, limit) is not None), "")


def withheld_of(policy: SitePolicy, validation_patients: int) -> set[Withheld]:
    """Decides what is kept back whatever a run asks for.

    Args:
        policy: the site's.
        validation_patients: of the site now.
    """
    kept: set[Withheld] = set(policy.withhold)
    if is_limited(policy):
        kept.add("data_report")
    if validation_patients < policy.min_validation_patients or not shows_statistics(policy):
        kept.add("validation_statistics")
    return kept


def _counts(site: SiteData, experiment: ExperimentConfig, policy: SitePolicy) -> dict[str, Any]:
    """Training and validation images; with noise they come with the deviation and the classes, which cost nothing more."""
    exact = {"train": len(site.train.labels), "validation": len(site.validation.labels)}
    if not policy.count_noise:
        return exact
    from pneumofed.client.privacy.ledger import noised_counts  # Opacus costs a second to import

    *classes, validation = noised_counts(site, experiment, policy)
    shares = dict(zip(classes_of(experiment.task), classes, strict=True))
    return {"train": max(1, sum(classes)), "validation": validation, "classes": shares, "count_noise": policy.count_noise}


PRIVACY_TERMS = ("unit", "target_epsilon", "noise_multiplier", "delta")
"""Keys of `privacy` that the audit log keeps of a private run."""


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
    if instruction.survey:
        asked |= {"survey": list(instruction.survey)}
    if instruction.clinical:
        asked |= {"clinical": "sums of numbers"}
    try:
        log.record(REQUEST_EVENT, **asked, **_who_asks(instruction))
        policy = policy_of(config)
        asked |= {"policy": hash_policy(policy)}
        admit(instruction, config, policy, work)
        content = handler(instruction, config, policy)
        leaving = describe_content(content)
        clinical = instruction.experiment.clinical is not None
        data = {"data": hash_data(config, clinical=clinical)} if _reads_data(instruction) else {}
        attach_head(content, log.record(ANSWER_EVENT, **asked, **data, **leaving))
        return content
    except Exception as error:
        _record_unanswered(log, asked, error)
        raise


def record_not_judged(instruction: Instruction, config: SiteConfig, error: Exception) -> None:
    """Records why a model was not judged that came with a training message, which is answered all the same.

    Args:
        instruction: with the round whose model it is.
        config: the site's own; one without a policy has no audit log.
        error: why.
    """
    if config.policy is not None:
        asked: dict[str, Any] = {"work": "evaluate", "run": instruction.run, "round": instruction.round}
        _record_unanswered(audit_log(config), asked, error)


def _record_unanswered(log: AuditLog, asked: Mapping[str, Any], error: Exception) -> None:
    if isinstance(error, PolicyError):
        log.record(REFUSAL_EVENT, **asked, rule=error.rule, detail=str(error))
    else:
        log.record(FAILURE_EVENT, **asked, error=type(error).__name__)


def read_request(content: Any, kind: str, config: SiteConfig) -> tuple[Instruction, Work]:
    """Reads a message of the coordinator; one that is malformed leaves a line in the audit log of a site that has a policy.

    Args:
        content: of the message, not trusted.
        kind: Flower's type of it, such as `train` or `train.default`.
        config: the site's own.

    Raises:
        MessageError: it does not follow the agreed format.
        ConfigError: its experiment does not fit this version's schema.
        HeldModelError: it refers to weights that are not kept here.
    """
    work = kind.partition(".")[0]
    try:
        if work not in get_args(Work):
            raise MessageError(f"expected a message of type {', '.join(get_args(Work))}")
        instruction = restore_model(config, unpack_instruction(content))
        if instruction.step:
            read_step(instruction.step)
        if instruction.survey and (work != "query" or instruction.step):  # its rules are others than those of work in a run
            raise MessageError("expected a survey by itself, in a message of type query")
        if instruction.clinical and (work != "query" or instruction.step or instruction.survey):
            raise MessageError("expected the question for clinical sums by itself, in a message of type query")
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
        from pneumofed.client.privacy.ledger import check_budget  # Opacus costs a second to import

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


def hash_data(config: SiteConfig, *, clinical: bool = False) -> str:
    """Computes a keyed hash of label and content digest of the manifest's images, in any order; the same data gives the same hash.

    The log's head, which leaves with each answer, is a hash over it: without the site's own key (`SPLIT_KEY_FILE`) whoever knows all
    images but one could try which head that one gives.

    Args:
        config: the site's own.
        clinical: whether the manifest's further columns, age, sex and view count too, for a run that uses clinical values.
    """
    records = read_manifest(Path(config.manifest)).records
    digests = load_digests([record.path for record in records], Path(config.work_dir) / "cache", workers=1, series=True)
    values = [repr((one.age_years, one.sex, one.view, sorted(one.others))) if clinical else "" for one in records]
    rows = sorted(
        [one.label or "", str(digest), *filter(None, [more])] for one, digest, more in zip(records, digests, values, strict=True)
    )
    return hmac.digest(own_secret(Path(config.work_dir), SPLIT_KEY_FILE), canonical(rows), "sha256").hex()


def _request(instruction: Instruction, work: Work) -> RunRequest:
    alone = instruction.first is not None
    return RunRequest.of(instruction.experiment, work, instruction.run, instruction.round, alone=alone, survey=instruction.survey)


def _reads_data(instruction: Instruction) -> bool:
    """False for the steps of secure aggregation in which only keys and shares are exchanged."""
    return instruction.step is None or read_step(instruction.step).stage == "mask"


def _who_asks(instruction: Instruction) -> dict[str, Any]:
    heads = {"heads": {"coordinator": instruction.audit_head}} if instruction.audit_head else {}
    return {
        "coordinator": os.environ.get(COORDINATOR_VARIABLE, "unknown"),
        "app": os.environ.get(APP_VARIABLE, "unknown"),
        "config": hash_experiment(instruction.experiment),
        "study": instruction.experiment.name,
        "terms": describe_terms(instruction.experiment),
        **heads,
    }


def describe_terms(experiment: ExperimentConfig) -> dict[str, Any]:
    """Lists what a run asks of a site, for the audit log: enough to say later what was asked, where only its hash is left of the rest."""
    privacy = experiment.privacy
    private = {} if privacy.mechanism == "none" else privacy.model_dump(include=set(PRIVACY_TERMS))
    return {
        "rounds": experiment.rounds,
        "task": task_words(experiment.task),
        "network": experiment.model.name,
        "strategy": experiment.strategy.name,
        "mechanism": privacy.mechanism,
        "secure_aggregation": experiment.secure_aggregation.enabled,
        **{key: value for key, value in private.items() if value is not None},
        **({"parent": experiment.parent} if experiment.parent else {}),
    }
