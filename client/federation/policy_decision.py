"""May this run here? The one decision on what a coordinator asks, from the hospital's policy and what is true at the site.

    decide(policy, request, ArrivalFacts)   no data is read yet: the run's own privacy, strategy, model, masks, time of day
    decide(policy, request, RoundsBegun)    under the lock of the count, before a training round is counted
    decide(policy, request, TrainingData)   once the data is known, before anything is computed from it
    decide(policy, request, ValidationAsked)  under the lock of the count of evaluations, before one is computed
    decide(policy, request, Spending)       under the lock of the ledger, before an entry is written

Each rule is one small function that names the key of policy.yaml on which it rests, and returns a refusal or None; the first that
refuses decides. Nothing here reads a file or a clock, so that the same question has the same answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, time
from typing import Literal

from pneumofed.client.federation.sum_terms import broken_term
from pneumofed.common.config.choices import COUNTS_STEPS, PrivacyUnit
from pneumofed.common.config.experiment import STUDY_CODE, ExperimentConfig, SecureAggregationConfig
from pneumofed.common.config.parties import DELTA_CEILING, SitePolicy, SurveyField, hospital_delta
from pneumofed.common.errors import PolicyError

Work = Literal["query", "train", "evaluate"]
"""Enrolment, training, evaluation."""
LIMITS: tuple[Literal["max_epsilon", "max_epsilon_per_study"], ...] = ("max_epsilon", "max_epsilon_per_study")


@dataclass(frozen=True)
class RunRequest:
    """What the coordinator asks. What is None is not part of the request, and no policy that restricts it permits it."""

    work: Work
    run: str
    round: int
    study: str
    """Name of the experiment."""
    private: bool
    """Whether each site's training is differentially private."""
    strategy: str | None = None
    model: str | None = None
    study_loss: str | None = None
    """Name of a study's own loss; None where the loss is one of the list."""
    secure_aggregation: bool = False
    sum_terms: SecureAggregationConfig | None = None
    """Of its secure sums; None where it has none."""
    unit: PrivacyUnit | None = None
    """What a private run protects."""
    target_epsilon: float | None = None
    """None too where the run names its noise, so that only the ledger can judge it."""
    delta: float | None = None
    """None too where it follows from the site's number of patients."""
    validation_share: float | None = None
    alone: bool = False
    """Whether the site is to train by itself before it evaluates."""
    survey: tuple[SurveyField, ...] = ()
    """What a survey asks for, which is a query: nothing is trained or evaluated, and it counts with no other work."""

    @classmethod
    def of(
        cls,
        experiment: ExperimentConfig,
        work: Work,
        run: str,
        round_number: int,
        *,
        alone: bool = False,
        survey: tuple[SurveyField, ...] = (),
    ) -> RunRequest:
        """The request that a message with `experiment` makes.

        Args:
            experiment: what the coordinator sent.
            work: the kind of the message.
            run: the run's token.
            round_number: 0 outside the rounds.
            alone: whether the site is to train by itself.
            survey: what a survey asks for.
        """
        privacy, private = experiment.privacy, experiment.privacy.mechanism != "none"
        planned = private and privacy.noise_multiplier is None
        return cls(
            work=work,
            run=run,
            round=round_number,
            study=experiment.name,
            private=private,
            strategy=experiment.strategy.name,
            model=experiment.model.name,
            study_loss=experiment.loss.name if STUDY_CODE.fullmatch(experiment.loss.name) else None,
            secure_aggregation=experiment.secure_aggregation.enabled,
            sum_terms=experiment.secure_aggregation if experiment.secure_aggregation.enabled else None,
            unit=privacy.unit if private else None,
            target_epsilon=privacy.target_epsilon if planned else None,
            delta=privacy.delta if private else None,
            validation_share=experiment.training.validation_fraction,
            alone=alone,
            survey=survey,
        )


@dataclass(frozen=True)
class ArrivalFacts:
    """What is true when a message comes: the local time."""

    now: datetime


@dataclass(frozen=True)
class RoundsBegun:
    """How many training rounds were begun in the last 24 hours."""

    number: int


@dataclass(frozen=True)
class TrainingData:
    """How many patients the site would train on, and how many it has: None where no delta is to be judged."""

    patients: int
    of_site: int | None = None


@dataclass(frozen=True)
class ValidationAsked:
    """How many validation patients an answer would be about, and how many answers left: within a day, and about these very patients."""

    patients: int
    today: int
    of_data: int
    what: str = "validation patients"
    """Who they are; a survey is about all of the site's patients."""


@dataclass(frozen=True)
class Spending:
    """Epsilon of the site's data with what is asked counted, for one unit of `level` at `delta`."""

    lineage: float
    """Of everything that was spent on the data."""
    study: float
    """Of what was spent on it under the request's name of the experiment."""
    level: PrivacyUnit
    delta: float
    patients: int
    """Of the site, training and validation together: their number decides the hospital's delta."""


Facts = ArrivalFacts | RoundsBegun | TrainingData | ValidationAsked | Spending


@dataclass(frozen=True)
class Decision:
    """Whether the policy permits a request; if not, the key of policy.yaml that refuses it, and why in words for the site itself."""

    permit: bool
    rule: str = ""
    reason: str = ""

    def enforce(self) -> None:
        """Does nothing where the request is permitted.

        Raises:
            PolicyError: it is not; names the rule.
        """
        if not self.permit:
            raise PolicyError(self.rule, self.reason)


def decide(policy: SitePolicy, request: RunRequest, facts: Facts) -> Decision:
    """Decides on `request` by the rules that `facts` allow to be judged.

    Law: pure, and a policy that is stricter in any key permits nothing that is refused under the laxer one.

    Args:
        policy: the hospital's.
        request: what the coordinator asks.
        facts: what is true at the site at this point of the message.
    """
    return next(_refusals(policy, request, facts), Decision(permit=True))


def _refusals(policy: SitePolicy, request: RunRequest, facts: Facts) -> Iterator[Decision]:
    """What refuses the request, first things first."""
    found: list[Decision | None]
    match facts:
        case ArrivalFacts() if request.survey and request.work == "query":
            found = [rule(policy, request) for rule in ON_A_SURVEY]
        case ArrivalFacts():
            found = [rule(policy, request) for rule in ON_ARRIVAL] + [refuse_in_quiet_hours(policy, request, facts)]
        case RoundsBegun():
            found = [refuse_many_rounds(policy, facts)]
        case TrainingData():
            limit = None if facts.of_site is None else hospital_delta(policy, facts.of_site)
            found = [refuse_few_patients(policy, request, facts), refuse_delta(policy, request, limit)]
        case ValidationAsked():
            found = [refuse_evaluation(policy, facts)]
        case Spending():
            limit = hospital_delta(policy, facts.patients)
            found = [refuse_unit(policy, request), refuse_delta(policy, request, limit), refuse_budget(policy, request, facts)]
    return (refusal for refusal in found if refusal is not None)


def refuse_planned_epsilon(policy: SitePolicy, request: RunRequest) -> Decision | None:
    """Refuses, where a limit is set, a run that is not private or plans more. The ledger judges what comes on top of earlier runs.

    Args:
        policy: `max_epsilon` and `max_epsilon_per_study`, None for no limit.
        request: a run that names its noise plans no epsilon, and is left to the ledger.

    Returns:
        The refusal, or None where the rule permits the request.
    """
    for rule in LIMITS:
        limit = getattr(policy, rule)
        if limit is None:
            continue
        if not request.private:
            return Decision(False, rule, f"the run is not differentially private; the limit is epsilon {limit:g}")
        if request.target_epsilon is not None and request.target_epsilon > limit:
            return Decision(False, rule, f"the run plans epsilon {request.target_epsilon:g}; the limit is {limit:g}")
    return None


def refuse_unit(policy: SitePolicy, request: RunRequest) -> Decision | None:
    """Refuses a private run that protects less than the hospital asks for.

    Args:
        policy: `min_unit`: a patient protects more than an image.
        request: what its privacy is of; a run that is not private is not judged by this rule.

    Returns:
        The refusal, or None where the rule permits the request.
    """
    if policy.min_unit == "patient" and request.unit == "image":
        return Decision(False, "min_unit", "the run protects single images; the policy asks for patients")
    return None


def refuse_delta(policy: SitePolicy, request: RunRequest, limit: float | None = None) -> Decision | None:
    """Refuses a private run that plans with a larger delta than the hospital's.

    Args:
        policy: `max_delta`; unset, the hospital's delta follows from its patients.
        request: one without a delta takes the site's own.
        limit: the hospital's delta; None where its patients are not known yet, so that only its largest value can be judged.

    Returns:
        The refusal, or None where the rule permits the request.
    """
    if limit is None:
        limit = DELTA_CEILING if policy.max_delta is None else policy.max_delta
    if request.delta is not None and request.delta > limit:
        sentence = f"the run plans with delta {request.delta:g}; at most {limit:.3g} is allowed"
        return Decision(False, "max_delta", sentence)
    return None


def refuse_strategy(policy: SitePolicy, request: RunRequest) -> Decision | None:
    """Refuses a strategy that is not in the list.

    Args:
        policy: `strategies`, None for all.
        request: without a strategy it is refused where there is a list.

    Returns:
        The refusal, or None where the rule permits the request.
    """
    if policy.strategies is not None and request.strategy not in policy.strategies:
        allowed = ", ".join(policy.strategies) or "none"
        return Decision(False, "strategies", f"the run uses {request.strategy}; allowed are {allowed}")
    return None


def refuse_uncounted_steps(policy: SitePolicy, request: RunRequest) -> Decision | None:
    """Refuses a strategy that computes a site's steps from its number of images where that number has noise.

    Args:
        policy: `count_noise`, None for exact numbers.
        request: its strategy.

    Returns:
        The refusal, or None where the rule permits the request.
    """
    if policy.count_noise is not None and request.strategy in COUNTS_STEPS:
        return Decision(False, "count_noise", f"{request.strategy} needs the exact number of images, which has noise here")
    return None


def refuse_model(policy: SitePolicy, request: RunRequest) -> Decision | None:
    """Refuses a network that is not in the list, and a study's own loss that is not: both are code of the study.

    Args:
        policy: `models`, None for all.
        request: without a model it is refused where there is a list.

    Returns:
        The refusal, or None where the rule permits the request.
    """
    if policy.models is None:
        return None
    allowed = ", ".join(policy.models) or "none"
    if not _is_listed(policy.models, request.model):
        return Decision(False, "models", f"the run trains {request.model}; allowed are {allowed}")
    if request.study_loss is not None and not _is_listed(policy.models, request.study_loss):
        return Decision(False, "models", f"the run's loss is {request.study_loss}; allowed are {allowed}")
    return None


def _is_listed(models: Sequence[str], name: str | None) -> bool:
    """A study's own code is listed by the word, or by the first digits of its hash."""
    if name is None or not STUDY_CODE.fullmatch(name):
        return name in models
    return any(entry == "study" or (entry.startswith("study:") and name.startswith(entry)) for entry in models)


def refuse_without_masks(policy: SitePolicy, request: RunRequest) -> Decision | None:
    """Refuses a run in which the coordinator could see this site's own update.

    Args:
        policy: `require_secure_aggregation`.
        request: whether the run uses it.

    Returns:
        The refusal, or None where the rule permits the request.
    """
    if policy.require_secure_aggregation and not request.secure_aggregation:
        return Decision(False, "require_secure_aggregation", "the run does not use secure aggregation")
    return None


def refuse_sum_terms(policy: SitePolicy, request: RunRequest) -> Decision | None:
    """Refuses secure sums on terms that hide less than the hospital asks for. The number of sites is judged in the steps of a sum.

    Args:
        policy: `min_sum_threshold`, `max_weight_in_sum` and `max_sum_step`.
        request: the terms; a run without secure aggregation has none.

    Returns:
        The refusal, or None where the rule permits the request.
    """
    broken = broken_term(policy, request.sum_terms) if request.sum_terms else None
    return Decision(False, *broken) if broken else None


def refuse_validation_share(policy: SitePolicy, request: RunRequest) -> Decision | None:
    """Refuses a run that keeps too few or too many of the patients for validation.

    Args:
        policy: `min_validation_share` and `max_validation_share`.
        request: without a share it is not judged.

    Returns:
        The refusal, or None where the rule permits the request.
    """
    share = request.validation_share
    if share is not None and share < policy.min_validation_share:
        sentence = f"the run validates on {share:.3g} of the patients; at least {policy.min_validation_share:g} is asked for"
        return Decision(False, "min_validation_share", sentence)
    if share is not None and share > policy.max_validation_share:
        sentence = f"the run validates on {share:.3g} of the patients; at most {policy.max_validation_share:g} is allowed"
        return Decision(False, "max_validation_share", sentence)
    return None


def refuse_alone(policy: SitePolicy, request: RunRequest) -> Decision | None:
    """Refuses training by itself where the hospital does not allow it.

    Args:
        policy: `train_alone`.
        request: counts only if it asks for that.

    Returns:
        The refusal, or None where the rule permits the request.
    """
    if request.alone and not policy.train_alone:
        return Decision(False, "train_alone", "the run asks this site to train once by itself, which its policy does not allow")
    return None


def refuse_survey(policy: SitePolicy, request: RunRequest) -> Decision | None:
    """Refuses a survey of which the policy lets no table leave, or none of this site by itself.

    Args:
        policy: `survey`, and `withhold`, whose data report tells of labels too.
        request: the fields that are asked for; those that may not leave are left out of the answer, as long as one may.

    Returns:
        The refusal, or None where the rule permits the request.
    """
    if policy.require_secure_aggregation:
        sentence = "a survey shows this site's own counts, and its policy asks for sums over sites"
        return Decision(False, "require_secure_aggregation", sentence)
    if "data_report" in policy.withhold:
        return Decision(False, "withhold", "the data report is withheld, and a survey is one")
    if not set(request.survey) & set(policy.survey):
        allowed = ", ".join(policy.survey) or "nothing"
        return Decision(False, "survey", f"the survey asks for {', '.join(request.survey)}; allowed is {allowed}")
    return None


def refuse_survey_without_noise(policy: SitePolicy, request: RunRequest) -> Decision | None:
    """Refuses, where a limit of epsilon is set, a survey whose counts would leave without noise.

    Args:
        policy: `max_epsilon` and `max_epsilon_per_study`; `count_noise` gives noise, which the ledger counts, and `open_statistics` lets
            statistics leave without.
        request: a survey.

    Returns:
        The refusal, or None where the rule permits the request.
    """
    for rule in LIMITS:
        if getattr(policy, rule) is not None and policy.count_noise is None and not policy.open_statistics:
            return Decision(False, rule, "a survey's counts would leave without noise (count_noise, open_statistics)")
    return None


def refuse_in_quiet_hours(policy: SitePolicy, request: RunRequest, facts: ArrivalFacts) -> Decision | None:
    """Refuses work in a round at a quiet time. Enrolment is answered: a site that is busy now may still be counted on later in the run.

    Args:
        policy: `quiet_hours`, each HH:MM-HH:MM in local time.
        request: one for enrolment is never refused here.
        facts: the local time.

    Returns:
        The refusal, or None where the rule permits the request.
    """
    if request.work == "query":
        return None
    for hours in policy.quiet_hours:
        if _within(facts.now.time(), hours):
            return Decision(False, "quiet_hours", f"it is {facts.now:%H:%M} here, within the quiet hours {hours}")
    return None


def refuse_many_rounds(policy: SitePolicy, facts: RoundsBegun) -> Decision | None:
    """Refuses a training round beyond the day's number.

    Args:
        policy: `max_rounds_per_day`.
        facts: the rounds that were begun, without the one that is asked for.

    Returns:
        The refusal, or None where the rule permits the request.
    """
    if facts.number >= policy.max_rounds_per_day:
        sentence = f"{facts.number} rounds in the last 24 hours, the limit is {policy.max_rounds_per_day}"
        return Decision(False, "max_rounds_per_day", sentence)
    return None


def refuse_few_patients(policy: SitePolicy, request: RunRequest, facts: TrainingData) -> Decision | None:
    """Refuses the site's part where its training set holds too few patients.

    Args:
        policy: `min_patients`, and `min_patients_private` for a private run: of few patients no delta is small enough.
        request: whether the run is private.
        facts: the patients of the training set.

    Returns:
        The refusal, or None where the rule permits the request.
    """
    floors = {"min_patients": policy.min_patients}
    if request.private:
        floors["min_patients_private"] = policy.min_patients_private
    for rule, least in floors.items():
        if facts.patients < least:
            return Decision(False, rule, f"{facts.patients} training patients, at least {least} are needed")
    return None


def refuse_evaluation(policy: SitePolicy, facts: ValidationAsked) -> Decision | None:
    """Refuses statistics of few validation patients, and those of too many questions.

    Args:
        policy: `min_validation_patients`, `max_evaluations_per_day` and `max_evaluations_per_data`.
        facts: without the answer that is asked for.

    Returns:
        The refusal, or None where the rule permits the request.
    """
    if facts.patients < policy.min_validation_patients:
        sentence = f"{facts.patients} {facts.what}, at least {policy.min_validation_patients} are needed"
        return Decision(False, "min_validation_patients", sentence)
    if facts.today >= policy.max_evaluations_per_day:
        sentence = f"{facts.today} evaluations in the last 24 hours, the limit is {policy.max_evaluations_per_day}"
        return Decision(False, "max_evaluations_per_day", sentence)
    if facts.of_data >= policy.max_evaluations_per_data:
        sentence = f"{facts.of_data} evaluations on the same patients, the limit is {policy.max_evaluations_per_data}"
        return Decision(False, "max_evaluations_per_data", sentence)
    return None


def refuse_budget(policy: SitePolicy, request: RunRequest, facts: Spending) -> Decision | None:
    """Refuses what would bring the epsilon of the data above a limit.

    Args:
        policy: `max_epsilon` and `max_epsilon_per_study`, None for no limit.
        request: named in the refusal.
        facts: epsilon with the request counted.

    Returns:
        The refusal, or None where the rule permits the request.
    """
    for rule, after in zip(LIMITS, (facts.lineage, facts.study), strict=True):
        limit = getattr(policy, rule)
        if limit is not None and after > limit:
            would = f"round {request.round} of {request.study} would bring epsilon to {after:.4g}"
            return Decision(False, rule, f"{would} ({facts.level}, delta {facts.delta:.3g}); the limit is {limit:g}")
    return None


ON_ARRIVAL: tuple[Callable[[SitePolicy, RunRequest], Decision | None], ...] = (
    refuse_planned_epsilon,
    refuse_unit,
    refuse_delta,
    refuse_strategy,
    refuse_uncounted_steps,
    refuse_model,
    refuse_without_masks,
    refuse_validation_share,
    refuse_sum_terms,
    refuse_alone,
)
"""Judged by the request only, in this order."""
ON_A_SURVEY = (refuse_survey_without_noise, refuse_survey)
"""The same of a survey, in which no network and no strategy has a part."""


def _within(now: time, hours: str) -> bool:
    """Whether `now` lies in `hours` (HH:MM-HH:MM, the end not included); the same time twice is the whole day."""
    start, end = (time.fromisoformat(part) for part in hours.split("-"))
    if start < end:
        return start <= now < end
    return now >= start or now < end
