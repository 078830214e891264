"""Pneumonia on a schematic chest: what fills the lungs' air.

An opacity is the share of the air that is gone, float32 [H, W] in [0, 1]. Bacterial pneumonia is drawn as one lobar
consolidation with soft borders and air bronchograms; viral pneumonia as bilateral interstitial lines and patches (the classic
radiographic contrast, e.g. Kermany et al. 2018, Cell 172, figure S6). Severity runs from nearly invisible to plain.
"""

from __future__ import annotations

import numpy as np

from simulation.anatomy import Chest
from simulation.fields import Map, bump, distance, smooth_noise, soft_step


def bacterial(chest: Chest, severity: float, rng: np.random.Generator) -> Map:
    """One lobe's consolidation; `severity` in [0, 1] sets both its extent and its density."""
    side = rng.choice((-1.0, 1.0))
    centre, reach = rng.uniform(0.15, 0.95), 0.17 + 0.25 * severity
    across = rng.uniform(0.10, 0.50)
    radius = distance(chest.hilum_distance - across, 1.1 * (chest.depth - centre))
    lobe = soft_step(reach - radius - 0.10 * _noise(chest.lung, 9, rng), 0.06)
    bronchi = 1.0 - 0.5 * chest.vessels
    return (chest.side == side) * lobe * bronchi * (0.45 + 0.50 * severity)


def viral(chest: Chest, severity: float, rng: np.random.Generator) -> Map:
    """Interstitial lines and faint patches in both lungs, denser around the hila; `severity` in [0, 1]."""
    lines = bump(_noise(chest.lung, 32, rng), 0.35)
    patches = np.clip(_noise(chest.lung, 9, rng), 0.0, 2.0) / 2.0
    central = bump(chest.hilum_distance, 0.55)
    return severity * np.clip(0.40 * lines * (0.4 + central) + 0.80 * patches + 0.35 * central, 0.0, 1.0)


def _noise(like: Map, cells: int, rng: np.random.Generator) -> Map:
    """Smooth noise whose features are 1 / `cells` of the longer side of `like`."""
    longer = max(like.shape)
    height, width = like.shape
    return smooth_noise((height, width), (max(2, round(cells * height / longer)), max(2, round(cells * width / longer))), rng)
