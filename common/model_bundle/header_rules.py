"""Rules that need no model: what the file itself says against a frontal chest radiograph."""

from __future__ import annotations

from common.data.sources.collect import is_frontal
from common.image_types import ImageInfo
from common.model_bundle.judgement import Reason

MAX_ASPECT = 2.5
"""Longer side to shorter side. Detectors for the chest are 35 x 43 or 43 x 43 cm (1.23 and 1); a leg or a spine is longer."""
MAX_COLOUR = 0.1
"""Mean distance of the largest to the smallest of red, green and blue, in [0, 1]: a tinted scan of a film, or one with coloured arrows,
stays below; photographs in colour are above."""

_RADIOGRAPHY = frozenset({"CR", "DX", "DR", "RG", "XR", "OT", "SC"})
"""Modality (0008,0060), PS3.3, C.7.3.1.1.1: computed and digital radiography, scanned film (RG), names out of use that archives still
hold (DR, XR), and those that tell nothing (OT, SC)."""
_OTHER_PARTS = frozenset(
    (
        *("ABDOMEN", "ANKLE", "ARM", "BREAST", "CALCANEUS", "CALF", "CLAVICLE", "COCCYX", "COLON", "CSPINE", "ELBOW"),
        *("EXTREMITY", "FEMUR", "FINGER", "FOOT", "FOREARM", "HAND", "HEAD", "HEEL", "HIP", "HUMERUS", "JAW", "KNEE"),
        *("LEG", "LSPINE", "LSSPINE", "MANDIBLE", "MAXILLA", "NECK", "NOSE", "ORBIT", "PATELLA", "PELVIS", "SACRUM", "SCAPULA"),
        *("SCOLIOSIS", "SHOULDER", "SINUS", "SKULL", "SPINE", "SSPINE", "TEETH", "THIGH", "THUMB", "TIBIA", "TLSPINE"),
        *("TMJ", "TOE", "TSPINE", "WRIST", "ZYGOMA"),
    )
)
"""Body Part Examined (0018,0015), PS3.16, annex L, of other examinations. Whatever else stands there passes: sites write their own
words, in their own language."""


def header_reasons(info: ImageInfo) -> tuple[Reason, ...]:
    """What in the file's own account speaks against a frontal chest radiograph; empty where it says nothing."""
    sides, parts = (info.height_px, info.width_px), set((info.body_part or "").split())
    rules = (
        (Reason.NOT_A_RADIOGRAPH, bool(info.modality) and info.modality not in _RADIOGRAPHY),
        (Reason.NOT_THE_CHEST, "CHEST" not in parts and bool(_OTHER_PARTS & parts)),
        (Reason.NOT_FRONTAL, not is_frontal(info.view or "")),
        (Reason.COLOUR, info.colour > MAX_COLOUR),
        (Reason.SHAPE, max(sides) > MAX_ASPECT * min(sides)),
    )
    return tuple(reason for reason, applies in rules if applies)
