"""Runs beside each other: a table and pictures."""

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from leanlm.common.errors import UserError
from leanlm.common.run_folder import Run
from leanlm.reporting.pictures import bars, loss_curve


def compare(paths: list[Path], into: Path) -> Path:
    """Print a table of finished runs and draw `comparison.png` in the folder `into`; runs without a result are named. A sweep's
    folder stands for its jobs.

    Raises:
        UserError: none of the paths is a finished run.
    """
    from rich.console import Console
    from rich.table import Table

    folders = [job for path in paths for job in ([path] if (path / "config.yaml").is_file() else Run.jobs(path) or [path])]
    names = [folder.resolve().name for folder in folders]
    labels = [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)]
    runs = {label: Run(folder) for label, folder in zip(labels, folders, strict=True)}
    results = {name: run.results() for name, run in runs.items() if run.result.is_file()}
    if not results:
        raise UserError("none of these is the folder of a finished run: " + ", ".join(map(str, paths)))
    base = next(iter(results))
    first = curve(runs[base])
    table = Table(padding=(0, 0), collapse_padding=True)
    for column in ("run", "loss", "perplexity", "tokens/s", "peak MiB", "exactness", "difference*"):
        table.add_column(column, justify="left" if column == "run" else "right", overflow="fold")
    for name, result in results.items():
        shared = [abs(loss - first[step]) for step, loss in curve(runs[name]).items() if step in first]
        same = result["parameters"] == results[base]["parameters"] and shared
        table.add_row(
            name,
            f"{result['loss']:.4f}",
            f"{result['perplexity']:.2f}",
            f"{result['tokens_per_second']:,.0f}",
            f"{max(result['peak_memory_bytes']) / 2**20:,.0f}",
            result["exactness"],
            f"{max(shared):.1e}" if same else "-",
        )
    console = Console(markup=False)
    console.print(table)
    console.print("loss and perplexity are of the validation split, the peak is that of the largest rank")
    console.print(f"* largest difference of the training loss from {base}, where the model has the same size")
    for name in runs.keys() - results.keys():
        console.print(f"{name}: not finished")
    loss_curve({name: runs[name] for name in results}, into / "comparison-loss.png")
    bars(results, into / "comparison.png")
    console.print(f"pictures: {into / 'comparison-loss.png'}, {into / 'comparison.png'}")
    return into / "comparison.png"


def curve(run: Run) -> dict[float, float]:
    """Step -> training loss."""
    return {row["step"]: row["train_loss"] for row in run.rows() if "train_loss" in row}


class CompareSweep(Callback):
    """Hydra callback: one comparison when a sweep has ended."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        paths = Run.jobs(folder)
        if len(paths) > 1 and any(Run(path).result.is_file() for path in paths):
            compare(paths, folder)
