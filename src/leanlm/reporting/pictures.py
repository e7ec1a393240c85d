"""Pictures of runs."""

from pathlib import Path
from typing import Any

from leanlm.common.run_folder import Run

SETTLING = 0.02  # share of the steps whose losses would flatten the rest of a picture


def new_figure(**settings: Any) -> Any:
    """A figure of matplotlib's that is drawn to a file, whatever screen there is."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained", **settings)
    FigureCanvasAgg(figure)
    return figure


def loss_curve(runs: dict[str, Run], path: Path) -> None:
    """Training and validation loss over steps, one colour for each run."""
    figure = new_figure(figsize=(7, 4.2))
    axes, alone = figure.add_subplot(), len(runs) == 1
    lowest, highest = float("inf"), 0.0
    for i, (name, run) in enumerate(runs.items()):
        rows, colour = run.rows(), f"C{i % 10}"
        train, validation = ([(row["step"], row[kind]) for row in rows if kind in row] for kind in ("train_loss", "val_loss"))
        if train:
            label = "training" if alone else None
            axes.plot(*zip(*train, strict=True), color=colour, alpha=0.45 if validation else 1, lw=1, label=label)
        if validation:
            colour, label = ("C1", "validation") if alone else (colour, name)
            axes.plot(*zip(*validation, strict=True), "o-", color=colour, ms=4, lw=1.5, label=label)
        if points := train + validation:
            losses = [loss for _, loss in points]
            settled = [loss for step, loss in points if step > SETTLING * rows[-1]["step"]] or losses
            lowest, highest = min(lowest, *losses, *settled), max(highest, *settled)
    if highest > lowest:
        room = 0.05 * (highest - lowest)
        axes.set_ylim(lowest - room, highest + room)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def bars(results: dict[str, dict], path: Path) -> None:
    """Speed and the largest rank's peak memory of several runs, side by side."""
    measures = {
        "tokens per second": [result["tokens_per_second"] for result in results.values()],
        "peak memory of a rank (MiB)": [max(result["peak_memory_bytes"]) / 2**20 for result in results.values()],
        "validation loss (nats per token)": [result["loss"] for result in results.values()],
    }
    figure = new_figure(figsize=(11, 1.2 + 0.4 * len(results)))
    columns = figure.subplots(1, len(measures), sharey=True)
    for axes, (title, values) in zip(columns, measures.items(), strict=True):
        drawn = axes.barh(list(results), values, color="C0", height=0.6)
        axes.bar_label(drawn, [f"{value:,.3f}" if value < 20 else f"{value:,.0f}" for value in values], padding=3)
        axes.set_title(title, fontsize=10)
        axes.set_xlim(0, 1.25 * max(values))
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_visible(False)
    columns[0].invert_yaxis()
    figure.savefig(path, dpi=120)
