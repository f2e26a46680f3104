"""Writes a page of the site beside a document."""

from pathlib import Path

from bench.cli import ROOT, run_module

# of pages that have charts with logarithmic axes
LOG_CHARTS = [ROOT / "bench" / "stages" / "page" / f"log_charts.{kind}" for kind in ("css", "js")]


def write_page(source: Path, page: str, *parts: Path) -> Path:
    """Writes a page beside the document `source`: that of the lives, or one of these parts. Returns
    its path.
    """
    path = source.with_name(page)
    run_module(["stages.runs.watch", str(source), str(path), *map(str, parts)])
    return path
