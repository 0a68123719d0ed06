"""Writing the figures of an analysis, all in one look."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write(figures: "Callable[[], Iterable[tuple[str, Figure]]]", out: Path, font_scale: float) -> list[Path]:
    """Draw the named figures and write each as PNG and SVG into the folder; return the files."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    import seaborn as sns

    out.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    with sns.axes_style("ticks"), sns.plotting_context("paper", font_scale=font_scale):
        for name, figure in figures():
            for suffix in ("png", "svg"):
                paths.append(out / f"{name}.{suffix}")
                figure.savefig(paths[-1], dpi=150)
    return paths
