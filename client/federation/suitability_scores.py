"""A site's answer on how its validation patients score in a model's suitability tests: counts on a coarse grid, of patients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import nn

from pneumofed.client.federation.disclosure import Disclosure
from pneumofed.client.federation.evaluations import admit_evaluation
from pneumofed.client.federation.policy_decision import RunRequest
from pneumofed.client.federation.requests import open_site_data
from pneumofed.common.config.parties import SiteConfig, SitePolicy
from pneumofed.common.errors import MessageError
from pneumofed.common.model_bundle.pooled_scores import SCORE_BINS, count_scores, pack_counts
from pneumofed.common.model_bundle.suitability import SUITABILITY_TESTS, score_images
from pneumofed.common.models.compute import build_compute
from pneumofed.common.models.features import compute_features
from pneumofed.common.wire.instructions import Instruction
from pneumofed.common.wire.messages import Evaluation


def count_patients(
    instruction: Instruction, config: SiteConfig, policy: SitePolicy, model: nn.Module, layout_digest: str
) -> Evaluation:
    """Counts the validation patients by score, one image of each. It is admitted and withheld as an evaluation is, and counts as
    one for each test.

    Args:
        instruction: with the suitability whose densities are asked about.
        config: the site's own.
        policy: the site's, as it stood when the message came.
        model: with the global weights, as the bundle has them.
        layout_digest: of `model`.

    Raises:
        PolicyError: too many were asked for, or the answer and an earlier one would tell a few patients apart.
        MessageError: the densities do not fit the network.
    """
    experiment, suitability = instruction.experiment, instruction.suitability
    if suitability is None:
        raise MessageError("the instruction holds no suitability")
    site = open_site_data(instruction, config, policy, "evaluate")
    releases = Disclosure.of(site, experiment, policy)
    presence, counts = releases.presence(layout_digest), np.zeros((len(SUITABILITY_TESTS), SCORE_BINS), np.int64)
    if not releases.withholds("validation_statistics") and len(site.validation.labels):
        if config.policy is not None:
            request = RunRequest.of(experiment, "evaluate", instruction.run, instruction.round)
            tests = len(SUITABILITY_TESTS)
            admitted = admit_evaluation(site.validation, request, policy, Path(config.work_dir), answers=tests)
            site = replace(site, validation=admitted)
        first = {patient: row for row, patient in reversed(list(enumerate(site.validation.patients)))}
        chosen = site.validation.subset(sorted(first.values()))
        compute = build_compute(config.device, "fp32", config.threads)
        features = compute_features(compute.place(model), chosen, compute, experiment.model.in_channels)
        if suitability.features.mean.shape != (features.shape[1],):
            raise MessageError("the suitability is of another network")
        counts = count_scores(score_images(suitability, np.asarray(chosen.pixels, np.float32) / np.float32(255.0), features))
    return Evaluation(presence, int(counts[0].sum()), {}, pack_counts(counts))
