"""Delta: the probability with which epsilon may fail to hold. Whose it is: the hospital's, who answers for its patients.

Within delta a mechanism may publish a patient's whole record, so that a budget at a large delta limits nothing. It has to be small against
1 / patients (Ponomareva et al. 2023, "How to DP-fy ML", section 5.2.2), for which n^-1.1 is the usual rule.
"""

from __future__ import annotations

from pneumofed.common.config.parties import SitePolicy

DELTA_CEILING = 1.0e-3
"""No delta is larger unless a hospital writes so: for few patients n^-1.1 is no small number."""


def default_delta(patients: int) -> float:
    """Computes n^-1.1 of so many patients, `DELTA_CEILING` at most: where a run or a policy names no delta.

    Args:
        patients: of the site, training and validation together.
    """
    return min(DELTA_CEILING, max(1, patients) ** -1.1)


def hospital_delta(policy: SitePolicy, patients: int) -> float:
    """Returns the delta at which a hospital's limits hold: its `max_delta`, or where it set none the default of its patients.

    Args:
        policy: the hospital's.
        patients: of the site, training and validation together.
    """
    return default_delta(patients) if policy.max_delta is None else policy.max_delta
