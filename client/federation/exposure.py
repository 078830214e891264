"""What a policy lets leave, in words, and which of its rules each key of an experiment meets.

RULED and HARMLESS name every key of `ExperimentConfig` once. A new key needs an entry before its test passes, so that nobody adds a switch
with which the coordinator opens a hospital.
"""

from __future__ import annotations

from typing import get_args

from pneumofed.client.federation.policy_decision import ON_A_SURVEY, RunRequest
from pneumofed.client.federation.requests import is_limited, rule_against_own_model, withheld_of
from pneumofed.common.config.parties import SitePolicy, SurveyField

RULED: dict[str, tuple[str, ...]] = {
    "name": ("max_epsilon", "max_epsilon_per_study"),
    "task": ("min_validation_patients", "max_evaluations_per_data"),
    "rounds": ("max_rounds_per_day", "max_epsilon"),
    **dict.fromkeys(("model.name", "loss.name"), ("models",)),
    "model.clinical": ("min_validation_patients", "max_evaluations_per_day", "withhold", "count_noise", "max_epsilon"),
    "training.validation_fraction": ("min_validation_share", "max_validation_share"),
    **dict.fromkeys(("training.local_epochs", "training.local_steps"), ("max_epsilon",)),
    "strategy.name": ("strategies",),
    "personal.method": (
        "min_validation_patients",
        "max_evaluations_per_day",
        "max_evaluations_per_data",
        "withhold",
        "max_epsilon",
    ),
    "evaluation.every_rounds": ("max_evaluations_per_day", "max_evaluations_per_data"),
    "evaluation.validate_every_rounds": ("max_evaluations_per_day", "max_evaluations_per_data"),
    "evaluation.fraction_sites": ("max_evaluations_per_day", "max_evaluations_per_data"),
    "evaluation.with_training": ("max_evaluations_per_day", "max_evaluations_per_data"),
    "evaluation.alone": (
        "train_alone",
        "max_evaluations_per_day",
        "max_evaluations_per_data",
        "min_validation_patients",
        "withhold",
        "max_epsilon",
    ),
    "evaluation.cross_site": (
        "share_own_model",
        "train_alone",
        "min_patients",
        "max_evaluations_per_day",
        "max_evaluations_per_data",
        "min_validation_patients",
        "withhold",
        "max_epsilon",
        "require_secure_aggregation",
    ),
    "evaluation.hospital_reference": (
        "max_evaluations_per_day",
        "max_evaluations_per_data",
        "min_validation_patients",
        "withhold",
    ),
    "privacy.mechanism": ("max_epsilon", "max_epsilon_per_study", "min_patients_private"),
    "privacy.unit": ("min_unit",),
    "privacy.target_epsilon": ("max_epsilon", "max_epsilon_per_study"),
    "privacy.noise_multiplier": ("max_epsilon", "max_epsilon_per_study"),
    "privacy.delta": ("max_delta",),
    "privacy.expected_batch_size": ("max_epsilon", "max_epsilon_per_study"),
    "privacy.open_metrics": ("max_epsilon", "open_statistics", "withhold"),
    "secure_aggregation.enabled": ("require_secure_aggregation", "min_sites_in_sum"),
    "secure_aggregation.threshold": ("min_sum_threshold",),
    "secure_aggregation.neighbours": ("min_neighbours",),
    **dict.fromkeys(("secure_aggregation.clip_norm", "secure_aggregation.bits"), ("max_sum_step",)),
    **dict.fromkeys(("secure_aggregation.max_examples", "secure_aggregation.largest_weight"), ("max_weight_in_sum",)),
}
"""Key of the experiment -> keys of policy.yaml that limit what it makes leave."""

HARMLESS: dict[str, tuple[str, ...]] = {
    "who is in validation is drawn by the site's own key; noise and sampling come from its own secret": (
        "seed",
        "training.split_seed",
        "privacy.secure_noise",
    ),
    "how an update is computed: without privacy an update may hold all of the images whatever this is, and with privacy the ledger counts "
    "its noise and steps whatever this is": (
        *("parent", "image.size_px", "image.fit", "image.slices", "training.micro_batch_size"),
        *(f"augmentation.{key}" for key in ("rotation_deg", "shift_fraction", "scale_fraction", "brightness", "contrast")),
        *(
            f"augmentation.{key}"
            for key in ("noise_std", "horizontal_flip_probability", "style", "erase_borders", "erase_markers")
        ),
        *(f"model.{key}" for key in ("in_channels", "norm", "weight_standardization", "scattering_scale", "weights", "freeze")),
        *("model.head_first_rounds", "model.fine_tune_factor"),
        *(f"loss.{key}" for key in ("class_weights", "max_class_weight", "logit_adjustment", "focal_gamma")),
        "loss.label_smoothing",
        *(f"training.{key}" for key in ("optimizer", "learning_rate", "weight_decay", "momentum", "adam_epsilon", "batch_size")),
        *(f"training.{key}" for key in ("schedule", "warmup_fraction", "final_factor", "proximal_mu", "max_grad_norm")),
        *(f"training.{key}" for key in ("precision", "early_fraction", "batch_statistics_fraction")),
        *(f"privacy.{key}" for key in ("max_grad_norm", "physical_batch_size", "augmentation_multiplicity", "ema_decay")),
        *("privacy.accountant", "strategy.update_precision"),
    ),
    "how the hospital's own model is trained, which never leaves it": ("personal.proximal_lambda", "personal.epochs"),
    "what the coordinator does with what it was sent, or for how long it waits": (
        *(
            f"strategy.{key}"
            for key in ("weight_by", "fraction_train", "min_sites", "wait_for_sites", "wait_timeout_sec", "round_timeout_sec")
        ),
        *(f"strategy.{key}" for key in ("enough_sites", "buffer", "ema_decay", "max_update_norm_factor", "server_learning_rate")),
        *(f"strategy.{key}" for key in ("server_momentum", "beta_1", "beta_2", "tau", "trim_fraction", "malicious_sites")),
        *(f"central_privacy.{key}" for key in ("enabled", "clip_norm", "target_epsilon", "noise_multiplier", "delta")),
        *(
            f"evaluation.{key}"
            for key in ("alone_timeout_sec", "bootstrap_samples", "confidence", "batch_size", "threshold_policy", "target")
        ),
        *(f"training.plateau.{key}" for key in ("monitor", "factor", "patience_rounds", "min_delta")),
        *("early_stopping.patience_rounds", "early_stopping.min_delta"),
        *("secure_aggregation.stage_timeout_sec", "secure_aggregation.grace_sec"),
    ),
}
"""Why a key makes nothing more leave -> the keys."""


def describe_exposure(policy: SitePolicy) -> list[str]:
    """Says in sentences what the policy lets leave.

    Args:
        policy: the hospital's.
    """
    own = [own_model_sentence(policy)] if policy.train_alone and policy.share_own_model else []
    return [_updates(policy), _numbers(policy), statistics_sentence(policy), survey_sentence(policy), *own]


def own_model_sentence(policy: SitePolicy) -> str:
    """Says when the model that the site trains alone leaves, and why it never does where another key stands against it.

    Args:
        policy: the hospital's; one without `share_own_model` and `train_alone` gives no such model.
    """
    against = rule_against_own_model(policy)
    if against:
        return f"the model that this site trains alone stays here ({against})"
    return (
        "in a run with evaluation.cross_site the model that this site trains alone goes to the other hospitals (share_own_model)"
    )


def survey_sentence(policy: SitePolicy) -> str:
    """Says what a survey before training is told, or which key refuses it.

    Args:
        policy: the hospital's.
    """
    asked = RunRequest("query", "", 0, "", private=False, survey=get_args(SurveyField))
    refusal = next((found for rule in ON_A_SURVEY if (found := rule(policy, asked))), None)
    if refusal is not None:
        return f"surveys are refused ({refusal.rule})"
    noise = ", with noise that the ledger counts" if policy.count_noise else ""
    return f"a survey is told patients by {', '.join(policy.survey)}, in tens and without cells of fewer than ten{noise} (survey)"


def statistics_sentence(policy: SitePolicy) -> str:
    """Says what leaves of the validation patients, and which key decides it.

    Args:
        policy: the hospital's.
    """
    if "validation_statistics" in policy.withhold:
        return "no validation statistics leave (withhold)"
    if is_limited(policy) and not policy.open_statistics:
        return "no validation statistics leave, since max_epsilon is set and they have no noise (open_statistics lets them)"
    return (
        f"validation statistics leave without noise, of {policy.min_validation_patients} patients at least, in {policy.score_bins} bins, "
        f"{policy.max_evaluations_per_day} times a day and {policy.max_evaluations_per_data} times on the same patients at most"
    )


def _updates(policy: SitePolicy) -> str:
    if is_limited(policy):
        limit = min(value for value in (policy.max_epsilon, policy.max_epsilon_per_study) if value is not None)
        return f"updates leave of private runs only, up to epsilon {limit:g}"
    masked = "under masks" if policy.require_secure_aggregation else "also in the clear"
    return f"updates leave {masked} and without noise: whoever can read one can learn much about images (max_epsilon limits it)"


def _numbers(policy: SitePolicy) -> str:
    counts = "numbers of images leave " + ("with noise" if policy.count_noise else "as they are (count_noise)")
    report = "without" if "data_report" in withheld_of(policy, policy.min_validation_patients) else "with"
    return f"{counts}, {report} a report of what was found, left out and of which class"
