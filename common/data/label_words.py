"""A site's own words for the labels of its images, such as `TB` for `tuberculosis`, and how they become the labels of a manifest.

Every site knows the words of `LABELS` and their synonyms. What else stands in its tables it maps itself, in `label_words` of its site.yaml
or by `--label` of an import. A word that nobody mapped is never guessed: the image is left out and counted. The site's own spelling stays
in its tables and its folder; what leaves are counts of a task's classes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from pneumofed.common.config.classes import check_class_name
from pneumofed.common.data.manifest import LABELS, Manifest, read_label
from pneumofed.common.data.tables import plain_text
from pneumofed.common.errors import ConfigError


@dataclass(frozen=True)
class LabelWords:
    """Which word is which label at one site.

    Attributes:
        own: label by the site's word, which is stripped and in lower case.
    """

    own: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, pairs: Mapping[str, str], source: str) -> LabelWords:
        """Makes the words that `pairs` map.

        Args:
            pairs: a label by the site's word, in any case. A label is a word of `LABELS`, or a class that a run may have
                (`check_class_name`); mapped to itself it is known as it stands.
            source: of the pairs; the error begins with it.

        Raises:
            ConfigError: a label is none that a class may be called, or nearly one of `LABELS` and so a slip; or one word, spelt in two
                cases, has two labels.
        """
        own: dict[str, str] = {}
        for given, label in pairs.items():
            word, name = plain_text(given).lower(), read_label(label)
            if not word:
                raise ConfigError(f"{source}: a word is empty; expected WORD=LABEL")
            _check_label(f"{source}: '{given}' is mapped to '{label}'", name)
            if own.setdefault(word, name) != name:
                raise ConfigError(f"{source}: '{given}' is mapped to '{own[word]}' and to '{name}'; each word has one label")
        return cls(own)

    @classmethod
    def of_classes(cls, classes: Iterable[str]) -> LabelWords:
        """Makes the words under which each of `classes` is known as it stands."""
        return cls({name: name for name in classes})

    def __or__(self, other: LabelWords) -> LabelWords:
        """Returns both's words; where both have one, that of `other` counts."""
        return LabelWords({**self.own, **other.own})

    @property
    def labels(self) -> tuple[str, ...]:
        """All labels that the site's words lead to: `LABELS`, then its own."""
        return tuple(dict.fromkeys((*LABELS, *self.own.values())))

    def read(self, text: str) -> str:
        """Reads the label of a table's cell; a word that is not known stays as it is, stripped and in lower case."""
        word = plain_text(text).lower()
        return self.own.get(word, read_label(word))

    def knows(self, label: str) -> bool:
        """Returns whether `label`, as `read` gives it, is one that these words lead to."""
        return label in LABELS or label in self.own.values()

    def apply(self, manifest: Manifest) -> Manifest:
        """Returns `manifest` with its labels read by these words, as of a table that a site wrote by hand."""
        if not self.own:
            return manifest
        return Manifest(tuple(replace(record, label=self.read(record.label)) for record in manifest.records))


def _check_label(found: str, name: str) -> None:
    """Refuses what no class may be called, and slips such as `bacteral`, which would silently be a class of their own."""
    try:
        check_class_name(name)
    except ValueError as error:
        raise ConfigError(f"{found}: {error}") from None
    near = difflib.get_close_matches(name, LABELS, n=1, cutoff=0.8)
    if near and near[0] != name:
        raise ConfigError(f"{found}; did you mean '{near[0]}'? A label of another meaning needs a word that is less like it")
