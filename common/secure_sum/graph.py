"""Who shares masks with whom, and how many must stay: both computed by each site from what all sites signed.

Up to `ALL_PAIRS` sites everyone is everyone's neighbour (Bonawitz et al. 2017). Beyond, each has k neighbours, k/2 on either side of a ring
in random order (SecAgg+: Bell et al. 2020, section 3), so that costs grow with the logarithm of the number of sites.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection
from functools import lru_cache

from common.privacy_config import SecureAggregationConfig

LEAST_SITES = 3
"""Of two sites, each learns the other's update from the sum."""
ALL_PAIRS = 16
COLLUDING, DROPPED = 0.2, 0.2
"""Shares of the sites for which the number of neighbours is chosen where there are more than `ALL_PAIRS`."""
PRIVACY_BITS, LIVENESS_BITS = 40, 10
"""A sum falls apart into sums of fewer sites, or a secret is learnt, with probability 2^-40; it cannot be had, with 2^-10."""


def threshold(sites: int, fraction: float) -> int:
    """How many of `sites` must stay: `fraction` of them rounded up, at least three."""
    return max(LEAST_SITES, math.ceil(round(fraction * sites, 9)))


def neighbourhoods(sites: Collection[str], cfg: SecureAggregationConfig, seed: bytes) -> dict[str, list[str]]:
    """For each site the sites that hold shares of its secrets, sorted: its neighbours and itself.

    Symmetric. Pure in (set of sites, settings, seed); `seed` should hold what no single party chose.
    """
    wanted = cfg.neighbours if cfg.neighbours is not None else neighbours_needed(len(sites), cfg.threshold)
    if wanted >= len(sites) - 1:
        return {site: sorted(sites) for site in sites}
    ring = sorted(sites, key=lambda site: hashlib.sha256(seed + site.encode()).digest())
    reach = range(-(wanted // 2), wanted // 2 + 1)
    return {site: sorted(ring[(place + step) % len(ring)] for step in reach) for place, site in enumerate(ring)}


@lru_cache(maxsize=64)
def neighbours_needed(sites: int, fraction: float) -> int:
    """The smallest even number of neighbours that keeps the probabilities above; all others where none does.

    With `out` sites colluding or dropped, the others fall apart only where two runs of k/2 sites of the ring are all out.
    """
    if sites <= ALL_PAIRS:
        return sites - 1
    colluding, dropped = math.ceil(COLLUDING * sites), math.ceil(DROPPED * sites)
    out = min(colluding + dropped, sites)
    for k in range(4, sites - 1, 2):
        stay = threshold(k + 1, fraction)
        parted = math.comb(sites, 2) * math.comb(out, k) / math.comb(sites, k)
        learnt = sites * at_least(stay, colluding, sites - 1, k)
        stuck = sites * at_least(k + 2 - stay, dropped, sites - 1, k)
        if max(parted, learnt) <= 2.0**-PRIVACY_BITS and stuck <= 2.0**-LIVENESS_BITS:
            return k
    return sites - 1


def at_least(count: int, marked: int, of: int, drawn: int) -> float:
    """Probability that `drawn` of `of` things, of which `marked` are marked, hold `count` marked ones or more (hypergeometric)."""
    ways = sum(math.comb(marked, m) * math.comb(of - marked, drawn - m) for m in range(count, min(marked, drawn) + 1))
    return ways / math.comb(of, drawn)
