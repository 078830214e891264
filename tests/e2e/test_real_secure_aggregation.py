"""Secure aggregation between real processes over TLS: each step finds the secrets of the one before in the site's folder."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest

from pneumofed.server.runs.checkpoints import read_checkpoint
from tests.e2e.real import RealFederation, kaggle_source
from tests.tiny import draw_manifest, there

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
NAMES = ("north", "river", "hill", "lake")


def test_the_sum_over_tls_is_the_plain_mean_and_a_lost_site_is_survived(tmp_path: Path) -> None:
    manifests = {name: draw_manifest(tmp_path / f"drawn-{name}", 24, seed=number) for number, name in enumerate(NAMES)}
    sources = {name: kaggle_source(manifest, tmp_path / f"kaggle-{name}") for name, manifest in manifests.items()}
    federation = RealFederation(tmp_path, sources)
    try:
        federation.start()
        federation.run("plain", rounds=1)
        # As many as all images of a site, and no least weight: each counts as in the plain mean, however its own key splits its patients.
        weights = {"max_examples": 48, "largest_weight": 1.0}
        for name in NAMES:
            federation.change_yaml(federation.site(name) / "policy.yaml", max_weight_in_sum=1.0)
        federation.run("secret", rounds=1, secure_aggregation={"enabled": True, **weights})
        line = federation.run_folder("secret").read_history()[0]
        assert list(there(line.secure_sum).summed) == sorted(NAMES)
        assert there(line.secure_sum).dropped == {}
        secret, plain = (read_checkpoint(federation.run_folder(name).last_checkpoint).arrays for name in ("secret", "plain"))
        rounding = 4 * float(np.finfo(np.float32).eps) * float(np.abs(plain.parameters).max())  # of the plain mean, in float32
        assert np.abs(secret.parameters - plain.parameters).max() <= there(there(line.secure_sum).error_bound) + rounding
        for name in NAMES:
            assert not (federation.site(name) / "work" / "secure_sum" / "session.json").exists()
        federation.submit("lossy", rounds=1, secure_aggregation={"enabled": True})
        federation.wait_for("lossy", "answered", 1, site="hill", task="shares")
        federation.signal_site("hill", signal.SIGKILL)
        assert federation.wait("lossy")["state"] == "succeeded"
        told = there(federation.run_folder("lossy").read_history()[0].secure_sum)
        assert set(told.dropped) == {"hill"}
    finally:
        federation.stop()
