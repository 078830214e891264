"""Partitions: complete, disjoint, patient-safe, pure, and skewed as their kind says."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pneumofed.common.data.manifest import ImageRecord, Manifest
from pneumofed.common.errors import ConfigError
from pneumofed.simulation.hospitals.partition import PartitionKind, label_skew, partition, partition_rows

KINDS: tuple[PartitionKind, ...] = ("iid", "dirichlet", "quantity", "scanner")
LABELS = ("normal", "bacterial", "viral")
Arguments = tuple[PartitionKind, float, int]


def build(labels_of_patients: list[list[str]]) -> Manifest:
    records = [
        ImageRecord(Path(f"/data/{patient}-{k}.png"), f"p{patient}", label)
        for patient, labels in enumerate(labels_of_patients)
        for k, label in enumerate(labels)
    ]
    return Manifest(tuple(records))


def patients_of(parts: list[Manifest], label: str) -> list[int]:
    return [len({record.patient for record in part.records if record.label == label}) for part in parts]


manifests = st.lists(st.lists(st.sampled_from(LABELS), min_size=1, max_size=3), min_size=1, max_size=40).map(build)
arguments = st.tuples(st.sampled_from(KINDS), st.sampled_from([1e-3, 0.05, 0.5, 1e6]), st.integers(0, 2**62))
SIZES = {"normal": 200, "bacterial": 300, "viral": 100}
many = build([[label] * (1 + i % 3) for label, patients in SIZES.items() for i in range(patients)])


@settings(max_examples=150, deadline=None)
@given(manifest=manifests, args=arguments, data=st.data())
def test_every_image_is_in_one_hospital_every_patient_in_one_and_none_is_empty(
    manifest: Manifest, args: Arguments, data: st.DataObject
) -> None:
    kind, alpha, seed = args
    hospitals = data.draw(st.integers(1, len(set(manifest.patients))))
    parts = partition(manifest, hospitals, kind, alpha, seed)
    assert len(parts) == hospitals and all(len(part) for part in parts)
    assert Counter(record for part in parts for record in part.records) == Counter(manifest.records)
    sites = [set(part.patients) for part in parts]
    assert sum(map(len, sites)) == len(set.union(*sites))


@settings(max_examples=60, deadline=None)
@given(manifest=manifests, args=arguments, shuffler=st.randoms())
def test_the_order_of_the_rows_does_not_matter(manifest: Manifest, args: Arguments, shuffler: random.Random) -> None:
    kind, alpha, seed = args
    shuffled = list(manifest.records)
    shuffler.shuffle(shuffled)
    hospitals = min(4, len(set(manifest.patients)))
    assert partition(Manifest(tuple(shuffled)), hospitals, kind, alpha, seed) == partition(manifest, hospitals, kind, alpha, seed)


@pytest.mark.parametrize("kind", KINDS)
def test_another_seed_deals_otherwise(kind: PartitionKind) -> None:
    assert partition(many, 5, kind, 0.5, 1) != partition(many, 5, kind, 0.5, 2)


@pytest.mark.parametrize("hospitals", [2, 7, 10])
def test_iid_hospitals_differ_by_one_patient_at_most_in_each_class_and_in_all(hospitals: int) -> None:
    parts = partition(many, hospitals, "iid", 1.0, 3)
    for counts in (*(patients_of(parts, label) for label in LABELS), [len(set(part.patients)) for part in parts]):
        assert max(counts) - min(counts) <= 1


def test_scanner_deals_as_iid_so_that_the_two_differ_in_the_scanners_alone() -> None:
    assert partition(many, 4, "scanner", 1.0, 5) == partition(many, 4, "iid", 1.0, 5)


def test_quantity_skews_sizes_but_keeps_the_mix_of_classes() -> None:
    parts = partition(many, 6, "quantity", 0.5, 0)
    sizes = [len(set(part.patients)) for part in parts]
    assert max(sizes) > 3 * min(sizes)
    for label, patients in SIZES.items():
        assert all(abs(count - patients / 600 * size) <= 2 for count, size in zip(patients_of(parts, label), sizes, strict=True))


def test_the_smaller_alpha_the_larger_the_label_skew() -> None:
    def mean_skew(kind: PartitionKind, alpha: float) -> float:
        return sum(label_skew(partition_rows(partition(many, 8, kind, alpha, seed))) for seed in range(5)) / 5

    skews = [mean_skew("dirichlet", alpha) for alpha in (0.05, 0.5, 5.0, 1e6)]
    assert skews[1] > 3 * mean_skew("quantity", 0.5)
    assert skews == sorted(skews, reverse=True)
    assert skews[0] > 0.2 and skews[-1] < 0.005


def test_dirichlet_shares_have_the_mean_and_variance_of_the_distribution() -> None:
    alpha, hospitals, normals = 0.5, 4, build([["normal"]] * 100)
    shares = [len(part) / 100 for seed in range(300) for part in partition(normals, hospitals, "dirichlet", alpha, seed)]
    mean, variance = 1 / hospitals, (1 / hospitals) * (1 - 1 / hospitals) / (hospitals * alpha + 1)
    assert sum(shares) / len(shares) == pytest.approx(mean)
    assert sum((share - mean) ** 2 for share in shares) / len(shares) == pytest.approx(variance, rel=0.15)


def test_a_patient_counts_as_the_class_of_most_of_their_images() -> None:
    manifest = build([["viral", "viral", "normal"]] * 10 + [["normal"]] * 10)
    parts = partition(manifest, 10, "iid", 1.0, 0)
    assert all(Counter(part.labels) == {"viral": 2, "normal": 2} for part in parts)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hospitals": 601}, ["601", "600 patients", "at most 600"]),
        ({"hospitals": 0}, ["at least 1"]),
        ({"kind": "dirichlett"}, ["did you mean 'dirichlet'"]),
        ({"alpha": 0.0}, ["alpha", "0.001"]),
        ({"alpha": float("nan")}, ["alpha", "nan"]),
    ],
)
def test_what_cannot_be_dealt_is_refused_with_what_to_do(changes: dict, words: list[str]) -> None:
    given_arguments = {"hospitals": 3, "kind": "dirichlet", "alpha": 0.5, "seed": 0} | changes
    with pytest.raises(ConfigError) as caught:
        partition(many, **given_arguments)
    assert all(word in str(caught.value) for word in words)


def test_alpha_does_not_matter_where_it_is_not_used() -> None:
    assert partition(many, 3, "iid", 0.0, 0) == partition(many, 3, "iid", 1.0, 0)


def test_summary_counts_what_is_there_and_label_skew_is_the_mean_divergence() -> None:
    normal, viral = build([["normal"], ["normal", "normal"]]), build([["viral"] * 3])
    rows = partition_rows([normal, viral])
    assert [(row.images, row.patients, row.classes) for row in rows] == [
        (3, 2, {"normal": 3, "viral": 0}),
        (3, 1, {"normal": 0, "viral": 3}),
    ]
    # one pure half against an even pool: JSD = H(3/4, 1/4) - H(1/2, 1/2) / 2 = 0.8113 - 0.5
    assert label_skew(rows) == pytest.approx(0.31128, abs=1e-4)
    assert label_skew(partition_rows([many, many])) == pytest.approx(0.0, abs=1e-12)
