"""Noise by its moments and its independence; keys by what they depend on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

from pneumofed.common.errors import ConfigError
from pneumofed.common.privacy import randomness
from pneumofed.common.privacy.randomness import NOISE_KEY_FILE, RandomStream, data_fingerprint, own_secret, round_key
from tests.client.federation.test_training import tiny_data

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))


def test_normals_have_the_moments_of_a_normal() -> None:
    values = RandomStream(KEY).normal(1_000_001)
    assert len(values) == 1_000_001
    moments = [float((values**power).mean()) for power in (1, 2, 3, 4)]
    assert np.allclose(moments, [0, 1, 0, 3], atol=[0.005, 0.008, 0.02, 0.06])
    assert scipy.stats.kstest(values[:100_000].numpy(), "norm").pvalue > 1e-4
    assert values.abs().max() > 4.4


def test_normals_of_one_call_of_two_calls_and_of_two_keys_are_independent() -> None:
    stream = RandomStream(KEY)
    first, second, other = stream.normal(200_000), stream.normal(200_000), RandomStream(OTHER).normal(200_000)
    pairs = [(first, second), (first, other), (first[:-1], first[1:]), (first[:100_000], first[100_000:]), (first**2, second**2)]
    assert all(abs(float(torch.corrcoef(torch.stack(pair))[0, 1])) < 0.012 for pair in pairs)


def test_uniforms_fill_the_unit_interval() -> None:
    values = RandomStream(KEY).uniform(200_000)
    assert values.min() >= 0
    assert values.max() < 1
    assert scipy.stats.kstest(values, "uniform").pvalue > 1e-4


def test_a_stream_is_pure_in_its_key_and_its_calls() -> None:
    one, same = RandomStream(KEY), RandomStream(KEY)
    assert torch.equal(one.normal(10), same.normal(10))
    assert torch.equal(one.normal(7), same.normal(7))
    assert len(one.normal(0)) == 0
    with pytest.raises(ValueError, match="key size"):
        RandomStream(b"short")


def test_a_round_key_depends_on_the_secret_and_every_part() -> None:
    keys = [round_key(KEY, parts) for parts in (["a", "b"], ["ab", ""], ["a", "c"], ["a"], ["a", "b", ""])]
    assert len({*keys, round_key(OTHER, ["a", "b"])}) == 6
    assert round_key(KEY, ["a", "b"]) == keys[0]


def test_a_fingerprint_changes_with_any_pixel_label_patient_or_file(monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiny_data(4)
    decoded_otherwise = data.pixels.copy()
    decoded_otherwise[3, 31, 31] ^= 1
    changed = [
        dataclasses.replace(data, pixels=decoded_otherwise),
        dataclasses.replace(data, labels=data.labels[::-1].copy()),
        dataclasses.replace(data, patients=("0", "0", "2", "3")),
        dataclasses.replace(data, digests=("0", "1", "2", "x")),
        data.subset([0, 1, 2]),
    ]
    prints = [data_fingerprint(other) for other in (data, *changed)]
    assert len(set(prints)) == 6
    monkeypatch.setattr(randomness, "_IMAGES_AT_ONCE", 3)
    assert [data_fingerprint(other) for other in (data, *changed)] == prints


def test_a_site_keeps_one_secret_that_others_cannot_read(tmp_path: Path) -> None:
    secret = own_secret(tmp_path / "a")
    assert own_secret(tmp_path / "a") == secret != own_secret(tmp_path / "b")
    assert (tmp_path / "a" / NOISE_KEY_FILE).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("content", "mode"), [(b"short", 0o600), (KEY, 0o644)])
def test_a_damaged_or_open_secret_is_refused(tmp_path: Path, content: bytes, mode: int) -> None:
    (tmp_path / NOISE_KEY_FILE).write_bytes(content)
    (tmp_path / NOISE_KEY_FILE).chmod(mode)
    with pytest.raises(ConfigError, match="0600"):
        own_secret(tmp_path)
