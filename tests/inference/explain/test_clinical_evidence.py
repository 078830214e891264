"""What an answer rests on: parts that add up, and by hand where the network is a line."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.config.reader import build_config
from pneumofed.common.imaging.augment import normalize
from pneumofed.common.models.build import build_model
from pneumofed.common.models.fusion import ClinicalNetwork
from pneumofed.inference.explain.clinical import explain_jointly

COLUMNS = [
    {"name": "temperature", "unit": "°C", "low": 34, "high": 43},
    {"name": "symptoms", "kind": "codes", "codes": ["fever", "cough"]},
    {"name": "smoker", "kind": "binary"},
]
NAN = float("nan")


def network_of(fusion: str) -> ClinicalNetwork:
    experiment = build_config(
        ExperimentConfig, {"model": {"name": "small_cnn"}, "clinical": {"columns": COLUMNS, "fusion": fusion}}
    )
    network = build_model(experiment.model, "binary", seed=0)
    assert isinstance(network, ClinicalNetwork)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


@pytest.mark.parametrize("fusion", ["concatenate", "film"])
def test_image_and_values_add_up_and_what_is_not_known_adds_nothing(fusion: str) -> None:
    network, image = network_of(fusion), torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(2))
    values = np.array([38.5, 1, 0, NAN], np.float32)
    schema = build_config(ExperimentConfig, {"clinical": {"columns": COLUMNS, "fusion": fusion}}).clinical
    assert schema is not None
    found = explain_jointly(network, image, values, schema)
    with torch.no_grad():
        logits = network(normalize(image, 1), torch.from_numpy(values)[None])[0]
    assert found.score == pytest.approx(float(logits[1] - logits[0]), abs=1e-4)
    assert set(found.values) == {"temperature", "symptoms"} and found.unknown == ("smoker",)
    assert abs(found.error) < 0.05 * max(1.0, abs(found.score - found.empty))
    assert found.to_json()["error"] == found.error
    assert (
        "temperature 38.5 °C" in found.lines()[0]
        and "symptoms fever" in found.lines()[0]
        and "Not known: smoker" in found.lines()[0]
    )


def test_a_value_adds_its_slope_where_the_network_is_nearly_a_line() -> None:
    """With a reader near zero tanh is a line, so the part of a value is the change of the log-odds that it makes."""
    network, image = network_of("concatenate"), torch.full((1, 1, 32, 32), 0.4)
    with torch.no_grad():
        network.fusion.reader.weight.mul_(1e-3)
        network.fusion.reader.bias.zero_()
    schema = build_config(ExperimentConfig, {"clinical": {"columns": COLUMNS}}).clinical
    assert schema is not None
    values = np.array([40.0, NAN, NAN, 1], np.float32)
    found = explain_jointly(network, image, values, schema)

    def log_odds(given: np.ndarray) -> float:
        with torch.no_grad():
            logits = network(normalize(image, 1), torch.from_numpy(given)[None])[0].double()
        return float(logits[1] - logits[0])

    for name, slot in {"temperature": 0, "smoker": 3}.items():
        without = values.copy()
        without[slot] = NAN
        assert found.values[name] == pytest.approx(log_odds(values) - log_odds(without), rel=0.02, abs=2e-5)
