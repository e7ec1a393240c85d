"""Pictures of a run."""

from pathlib import Path

from leanlm.common.run_folder import Run


def loss_curve(runs: dict[str, Run], path: Path) -> None:
    """Training and validation loss over steps, one colour for each run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    lowest, highest = float("inf"), 0.0
    for i, (name, run) in enumerate(runs.items()):
        rows = run.rows()
        train = [(row["step"], row["train_loss"]) for row in rows if "train_loss" in row]
        validation = [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]
        colour = f"C{i % 10}"
        alone = len(runs) == 1
        if train:
            axes.plot(
                *zip(*train, strict=True),
                color=colour,
                alpha=0.45 if validation else 1,
                lw=1,
                label="training" if alone else None,
            )
        if validation:
            axes.plot(
                *zip(*validation, strict=True),
                "o-",
                color="C1" if alone else colour,
                ms=4,
                lw=1.5,
                label="validation" if alone else name,
            )
        values = [loss for _, loss in train + validation]
        if values:
            settled = [loss for step, loss in train + validation if step > 0.02 * rows[-1]["step"]] or values
            lowest, highest = min(lowest, *values, *settled), max(highest, *settled)
    if highest > lowest:
        room = 0.05 * (highest - lowest)
        axes.set_ylim(lowest - room, highest + room)  # the first few steps would flatten the rest
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def bars(results: dict[str, dict], path: Path) -> None:
    """Speed and the largest rank's peak memory of several runs, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(results)
    measures = {
        "tokens per second": [results[name]["tokens_per_second"] for name in names],
        "peak memory of a rank (MiB)": [max(results[name]["peak_memory_bytes"]) / 2**20 for name in names],
        "validation loss (nats per token)": [results[name]["loss"] for name in names],
    }
    figure, rows = plt.subplots(1, 3, figsize=(11, 1.2 + 0.4 * len(names)), sharey=True, layout="constrained")
    for axes, (title, values) in zip(rows, measures.items(), strict=True):
        drawn = axes.barh(names, values, color="C0", height=0.6)
        axes.bar_label(drawn, [f"{value:,.3f}" if value < 20 else f"{value:,.0f}" for value in values], padding=3)
        axes.set_title(title, fontsize=10)
        axes.set_xlim(0, 1.25 * max(values))
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_visible(False)
    rows[0].invert_yaxis()
    figure.savefig(path, dpi=120)
    plt.close(figure)
