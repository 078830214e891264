"""Beyond fifty hospitals the report shows how they are spread, and one picture holds them all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pneumofed.server.report.many import MOST_SINGLE, distributions, plot_loss_bands, plot_sizes
from pneumofed.server.report.read_run import read_run
from pneumofed.server.report.report import write_report
from tests.server.report.report_runs import RunMaker


def made(folder: Path, hospitals: int) -> Path:
    RunMaker(folder, [f"site-{k:03d}" for k in range(hospitals)]).rounds(2).end("succeeded").simulated()
    return folder


def test_each_number_has_the_quartiles_of_the_hospitals(tmp_path: Path) -> None:
    run = read_run(made(tmp_path, MOST_SINGLE + 2))
    rows = {row.name: row for row in distributions(run)}
    images = [report.images or 0 for report in run.site_reports().values()]
    expected = [f"{value:,.2f}".rstrip("0").rstrip(".") for value in np.quantile(images, [0, 0.25, 0.5, 0.75, 1])]
    assert rows["Images"].values == expected
    assert rows["Rounds trained"].hospitals == MOST_SINGLE + 2


@pytest.mark.usefixtures("drawn")
def test_fifty_hospitals_are_shown_one_by_one_and_more_in_a_table_of_their_spread(tmp_path: Path) -> None:
    assert distributions(read_run(made(tmp_path / "few", MOST_SINGLE))) == []
    page = " ".join(write_report(made(tmp_path / "many", MOST_SINGLE + 1)).read_text(encoding="utf-8").split())
    assert "How the hospitals differ" in page
    assert page.index("How the hospitals differ") < page.index(f"All {MOST_SINGLE + 1} hospitals")


def test_the_bands_are_the_quantiles_of_the_hospitals_that_trained() -> None:
    losses = {f"site-{k}": [float(k), np.nan, float(k) + 1] for k in range(101)}
    figure = plot_loss_bands([1, 2, 3], losses, [50.0, np.nan, 51.0])
    (ax,) = figure.axes
    everyone, middle = (np.asarray(collection.get_paths()[0].vertices, dtype=float) for collection in ax.collections)
    assert (everyone[:, 1].min(), everyone[:, 1].max()) == (0.0, 101.0)
    assert (middle[:, 1].min(), middle[:, 1].max()) == (25.0, 76.0)


def test_the_areas_of_a_thousand_hospitals_are_their_images() -> None:
    generator = np.random.default_rng(0)
    counts = {
        f"site-{k}": {"normal": int(a), "pneumonia": int(b)} for k, (a, b) in enumerate(generator.integers(0, 9, (1000, 2)))
    }
    (ax,) = plot_sizes(counts, ["normal", "pneumonia"]).axes
    tops = [patch.get_data().values for patch in ax.patches]  # type: ignore[attr-defined]
    assert tops[0].sum() == sum(mix["normal"] for mix in counts.values())
    assert tops[1].tolist() == sorted((sum(mix.values()) for mix in counts.values()), reverse=True)


@pytest.mark.parametrize("hospitals", [0, 1])
def test_no_hospital_has_no_spread(hospitals: int, tmp_path: Path) -> None:
    assert distributions(read_run(made(tmp_path, hospitals))) == []


def test_the_history_without_sites_is_the_history_but_for_them(tmp_path: Path) -> None:
    folder = read_run(made(tmp_path, 3)).folder
    whole, slim = folder.read_history(), folder.read_history(sites=False)
    assert [line.without("sites", "drawn") for line in whole] == slim
    assert whole[0].sites
    assert folder.read_history(1) == whole[1:]
