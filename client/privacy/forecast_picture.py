"""The curve of epsilon over the rounds of a planned run, as a picture."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pneumofed.client.privacy.forecast import Forecast
from pneumofed.common.errors import ConfigError
from pneumofed.common.files import atomic_write

BLUE, ORANGE, RED, GREY = "#1f5fa8", "#c96a12", "#b3261e", "#5f6368"


def draw_forecast(forecast: Forecast, path: Path) -> None:
    """Writes the picture (PNG) to `path`: the run by itself, all runs on the data, the limit, and where the site would refuse.

    Args:
        forecast: of a run at one site.
        path: a file there is replaced.

    Raises:
        ConfigError: the file cannot be written.
    """
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(forecast.rounds, forecast.together, color=ORANGE, marker="o", markersize=3, label=_of_all(forecast))
    axes.plot(forecast.rounds, forecast.alone, color=BLUE, marker="o", markersize=3, label=_of_run(forecast))
    if forecast.limit is not None:
        axes.axhline(forecast.limit, color=RED, linestyle="--", label=f"limit {forecast.limit:g}")
    if forecast.refused_from is not None:
        axes.axvspan(forecast.refused_from - 0.5, forecast.rounds[-1] + 0.5, color=GREY, alpha=0.2, label="refused", linewidth=0)
    axes.set(xlabel="round", ylabel="epsilon", title=f"{forecast.study}: privacy spent", xlim=(0, forecast.rounds[-1] + 0.5))
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    try:
        with atomic_write(path) as file:
            figure.savefig(file, format="png", dpi=150)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}; choose another place with --out") from error


def _of_all(forecast: Forecast) -> str:
    return f"all runs on this data, one {forecast.level}, delta {forecast.judged_delta:.1e}"


def _of_run(forecast: Forecast) -> str:
    return f"this run alone, one {forecast.unit}, delta {forecast.delta:.1e}"
