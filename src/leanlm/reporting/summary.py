"""What a run prints when it ends."""

from typing import Any

from leanlm.common.run_folder import Run


def summary(result: dict[str, Any], sample: str | None, run: Run) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    peak = ", ".join(f"{peak / 2**20:,.0f} MiB" for peak in result["peak_memory_bytes"])
    if "predicted_peak_memory_bytes" in result:
        peak += ", predicted " + ", ".join(f"{size / 2**20:,.0f} MiB" for size in result["predicted_peak_memory_bytes"])
    for name, value in (
        ("validation loss", f"{result['loss']:.4f} nats per token"),
        ("perplexity", f"{result['perplexity']:.2f}"),
        *((name.replace("_", " "), f"{result[name]:.3f}") for name in ("accuracy", "bits_per_byte") if name in result),
        ("speed", f"{result['tokens_per_second']:,.0f} tokens/s, {result['seconds']:.0f} s of training"),
        ("peak memory", peak),
        ("parameters", f"{result['parameters']:,}"),
        *((name, _source(one)) for name, one in result.get("sources", {}).items()),
        ("run", str(run.path)),
    ):
        table.add_row(f"[bold]{name}", Text(value))  # a path may hold what rich takes for markup
    console = Console(highlight=False)
    if sample is not None:
        console.rule("a sample")
        console.print(sample, markup=False, soft_wrap=True)
        console.rule()
    console.print(table)


def _source(one: dict[str, float]) -> str:
    shares = f"{one['share_of_rows']:.2%} of rows, {one['share_of_tokens']:.2%} of tokens"
    return f"{shares}, validation loss {one['loss']:.4f}"
