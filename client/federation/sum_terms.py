"""The terms of a secure sum that a hospital accepts. The coordinator sets them; each site judges them before it answers a step.

    broken_term(policy, terms)          when a message comes: what can be said before the number of sites is known
    broken_term(policy, terms, sites)   with the sites whose signed keys the site has checked
    too_few(policy, sites)              again for those who shared their secrets, and for those whose vectors are summed

Pure, as `client.federation.policy_decision`, which names the rules of all other kinds.
"""

from __future__ import annotations

from pneumofed.common.config.experiment import SecureAggregationConfig
from pneumofed.common.config.parties import SitePolicy
from pneumofed.common.secure_aggregation.masking import LEAST_SITES, neighbours_needed
from pneumofed.common.secure_aggregation.quantization import coarsest_step, largest_share

Broken = tuple[str, str]
"""(key of policy.yaml, what is wrong in words for the site itself)"""


def broken_term(policy: SitePolicy, terms: SecureAggregationConfig, sites: int | None = None) -> Broken | None:
    """Finds the first term that the policy does not accept.

    Law: a policy that is stricter in any key accepts nothing that is refused under the laxer one.

    Args:
        policy: the hospital's floors and ceilings.
        terms: the run's; those of a run without secure aggregation are nobody's business.
        sites: how many vectors may be in the sum; None while that is not known. Neighbours, which are too many for small sums anyway,
            are judged then only.

    Returns:
        None where all are accepted.
    """
    if not terms.enabled:
        return None
    if terms.threshold < policy.min_sum_threshold:
        said = f"secure_aggregation.threshold is {terms.threshold:g}; at least {policy.min_sum_threshold:g} is asked for"
        return "min_sum_threshold", said
    if sites is None:  # the step grows with their number
        least = max(LEAST_SITES, policy.min_sites_in_sum)
        return _judge_share(policy, terms.largest_weight) or _judge_step(policy, terms, least)
    return (
        too_few(policy, sites)
        or _judge_neighbours(policy, terms, sites)
        or _judge_share(policy, largest_share(terms, sites))
        or _judge_step(policy, terms, sites)
    )


def too_few(policy: SitePolicy, sites: int) -> Broken | None:
    """Finds whether a sum has too few sites.

    Args:
        policy: `min_sites_in_sum`.
        sites: in the sum, this one included.
    """
    if sites >= policy.min_sites_in_sum:
        return None
    return "min_sites_in_sum", f"{sites} sites are in the sum; at least {policy.min_sites_in_sum} are asked for"


def _judge_neighbours(policy: SitePolicy, terms: SecureAggregationConfig, sites: int) -> Broken | None:
    needed = neighbours_needed(sites, terms.threshold)
    asked = min(policy.min_neighbours if policy.min_neighbours is not None else needed, sites - 1)
    have = min(terms.neighbours if terms.neighbours is not None else needed, sites - 1)
    if have >= asked:
        return None
    return "min_neighbours", f"each site shares masks with {have} others; at least {asked} are asked for among {sites} sites"


def _judge_share(policy: SitePolicy, share: float) -> Broken | None:
    if share <= policy.max_weight_in_sum:
        return None
    said = f"one site could be {share:.3g} of the sum; at most {policy.max_weight_in_sum:g} is allowed"
    return "max_weight_in_sum", f"{said} (secure_aggregation.largest_weight, and enough sites)"


def _judge_step(policy: SitePolicy, terms: SecureAggregationConfig, sites: int) -> Broken | None:
    if (step := coarsest_step(terms, sites)) > policy.max_sum_step:
        said = f"with {sites} sites an update is rounded to steps of {step:.3g}; at most {policy.max_sum_step:g} is allowed"
        return "max_sum_step", f"{said} (a smaller secure_aggregation.clip_norm, or bits: 64)"
    return None
