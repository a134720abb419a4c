"""Figures as PNG files."""

from pathlib import Path

from matplotlib.figure import Figure

from training.tables.commands.files import atomic_write
from training.tables.commands.outputs import MARK


DPI = 120


def write_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, cut to what is drawn."""
    with atomic_write(path) as place:
        figure.savefig(place, format="png", dpi=DPI, bbox_inches="tight", metadata={"Software": MARK})
