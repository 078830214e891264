"""Tasks of any list of classes: what a configuration may hold, and which label is which class."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from pneumofed.common.audit.log import hash_experiment
from pneumofed.common.config.classes import class_index, classes_of, in_words, parse_task, positive_word, task_words
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.config.reader import build_config, experiment_from_json
from pneumofed.common.data.manifest import LABELS
from pneumofed.common.errors import ConfigError

OWN = ("normal", "pneumonia", "tuberculosis")


def experiment(task: Any) -> ExperimentConfig:
    return build_config(ExperimentConfig, {"task": task})


def test_a_list_of_classes_comes_back_from_files_and_the_wire() -> None:
    one = experiment(list(OWN))
    assert classes_of(one.task) == OWN
    assert experiment_from_json(one.model_dump_json()) == one
    assert experiment(yaml.safe_load(yaml.safe_dump(one.model_dump()))["task"]) == one
    assert task_words(one.task) == "normal/pneumonia/tuberculosis"
    assert parse_task("normal, pneumonia,tuberculosis") == OWN


def test_a_named_task_is_the_same_however_it_is_written() -> None:
    for name, classes in (("binary", ["normal", "pneumonia"]), ("three_class", ["normal", "bacterial", "viral"])):
        assert experiment(classes).task == name
        assert hash_experiment(experiment(classes)) == hash_experiment(experiment(name))
        assert f'"task":"{name}"' in experiment(classes).model_dump_json()
    assert hash_experiment(experiment(list(OWN))) != hash_experiment(experiment("binary"))


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        (["normal"], "task: expected 2 to 20 classes, 1 is there"),
        (["normal", *(f"c{k}" for k in range(20))], "expected 2 to 20 classes, 21 are there"),
        (["normal", "tuberculosis", "tuberculosis"], "class 'tuberculosis' is there twice"),
        (["tuberculosis", "normal"], "the first class must be 'normal', not 'tuberculosis'"),
        (["normal", "TB"], "class 'TB': expected a word of lower case letters"),
        (["normal", "a/b"], "class 'a/b': expected a word"),
        (["normal", "tuberculosis\n"], "expected a word"),
        (["normal", 3], "class 3: expected a word"),
        (["normal", "bacteria"], "class 'bacteria' is read as 'bacterial' in every table"),
        (["normal", "unsure"], "has a meaning of its own"),
        (["normal", "pneumonia", "viral"], "'pneumonia' and 'viral' are no two classes"),
        ({"classes": list(OWN)}, "expected binary, three_class or a list of classes"),
        ("three_clas", "did you mean 'three_class'"),
    ],
)
def test_what_is_no_list_of_classes_is_refused_with_one_sentence(task: Any, sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        experiment(task)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_causes_are_pneumonias_where_nobody_asks_for_them() -> None:
    assert [class_index(label, OWN) for label in (*LABELS, "tuberculosis", "tb")] == [0, 1, 1, 1, 2, None]
    assert class_index("pneumonia", ("normal", "viral", "tuberculosis")) is None


def test_only_own_classes_are_called_findings() -> None:
    assert [positive_word(classes_of(task)) for task in ("binary", "three_class", OWN)] == ["pneumonia", "pneumonia", "finding"]
    sentence = "images with pneumonia; depends on the share of pneumonia"
    assert in_words(sentence, classes_of("three_class")) == sentence
    assert in_words(sentence, OWN) == "images with a finding; depends on the share of findings"
