"""What a search found, for people and for programs."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanlm.config.words import pasted
from leanlm.planning.choice import Choice
from leanlm.planning.hardware.devices import MARGIN, Device
from leanlm.reporting.pictures import new_figure
from leanlm.strategies.plan import Plan

if TYPE_CHECKING:  # which have imported Lightning, when there is something to report
    from leanlm.planning.predict import Prediction
    from leanlm.planning.search import Answer

PLANS_OF_A_TABLE = 6  # so many columns find room in 80 characters
FREES = {  # part -> what makes it smaller
    "weights": "strategy.shard or strategy.tensor over more devices",
    "gradients": "strategy.shard, or strategy.step_in_backward with clip=0",
    "state": "strategy.shard, strategy.zero1, strategy.offload=optimizer, or allow=[optim.state]",
    "activations": "strategy.recompute=blocks, or more strategy.accumulate_grad_batches",
    "logits": "more strategy.accumulate_grad_batches, or model.cutoffs",
    "buffers": "fewer devices along strategy.tensor",
    "temporaries": "more strategy.accumulate_grad_batches",
    "process": "fewer processes on this machine",
}


def arguments(choice: Choice) -> str:
    """The overrides that write a plan, and what was chosen with it."""
    written = [
        f"strategy.{key}={str(value).lower().replace(' ', '') if isinstance(value, bool | list) else value}"
        for key, value in choice.asdict().items()
        if key != "auto" and value != getattr(Plan, key)
    ]
    return " ".join([*written, *choice.changed])


def command(plan: Choice, overrides: Sequence[str]) -> str:
    """The command line that trains with a plan, as a shell takes it. `overrides`: more of it, as a person types them."""
    return pasted("leanlm.train", *overrides, *arguments(plan).split())


def reason(found: "Prediction") -> str:
    """Why a plan does not fit: by how much, its largest part, and what would make that smaller."""
    need = found.fullest
    largest = max(need.parts, key=need.parts.__getitem__)
    if found.tight and need.peak <= need.memory:
        return f"{mib(need.memory - need.peak)} are left, less than the {MARGIN:.0%} that are kept free: it may fit"
    if found.tight:
        return f"{mib(need.peak - need.memory)} too much, which dropping pages of libraries may give: it may fit, slowly"
    return f"{mib(need.over)} too much; {largest} take {mib(need.parts[largest])}: {FREES.get(largest, 'a larger device')}"


def budgets(device: Device, devices: int) -> str:
    """Bytes of each of several devices."""
    mine = device.share(devices)
    return ", ".join(map(mib, mine.memories)) if mine.memories else f"{devices} x {mib(mine.memory)}"


def enough(found: "Prediction") -> list[int]:
    """Bytes that each device would need for a plan, margin included."""
    return [round(found.of_rank(rank).peak / (1 - MARGIN)) for rank in range(found.plan.world)]


def mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB" if size < 10 * 2**30 else f"{size / 2**30:,.1f} GiB"


def as_dict(found: "Prediction", tokens: int, overrides: Sequence[str]) -> dict[str, Any]:
    """A prediction with plain types: bytes, seconds, tokens/s."""
    return {
        "plan": found.plan.asdict(),
        "exactness": found.plan.exactness,
        "peak_memory_bytes": {need.rank: need.peak for need in found.needs},
        "parts_bytes": found.fullest.parts,
        "headroom_bytes": found.fullest.memory - found.fullest.peak,
        "seconds": found.seconds,
        "tokens_per_second": tokens / found.seconds,
        "command": command(found.plan, overrides),
    }


def show(answer: "Answer", device: Device, devices: int, tokens: int, overrides: Sequence[str]) -> None:
    """Print what a search found, in tables of 80 columns."""
    budget, fitting = budgets(device, devices), answer.fitting
    if fitting:
        print(f"plans that fit, fastest first: {budget} on {device.name}")
        for first in range(0, len(fitting), PLANS_OF_A_TABLE):
            _print_table(fitting[first : first + PLANS_OF_A_TABLE], first + 1, tokens)
        print("bytes in MiB, of the rank with the least room\n")
        for number, found in enumerate(fitting, 1):
            print(f"{number}: {command(found.plan, overrides)}")
    else:
        print(f"no plan fits {budget} with {MARGIN:.0%} of it kept free")
    print(f"{answer.simulated} of {answer.candidates} plans were simulated, the likeliest first")
    for title, tight in (("plans that may fit", True), ("plans that do not fit", False)):
        some = [found for found in answer.others if found.tight == tight]
        if some:
            print(f"\n{title}:")
        for found in some:
            print(f"{arguments(found.plan)}: needs {mib(found.fullest.peak)}, {reason(found)}")
    least = answer.least
    needed = f"{mib(max(enough(least)))} per device" if device.alike else ", ".join(map(mib, enough(least)))
    plan = arguments(least.plan) or "one device"
    print(f"\nthe smallest budget that would do, of the plans looked at:\n{needed}, with {plan}")


def _print_table(plans: "list[Prediction]", first: int, tokens: int) -> None:
    """A column for each plan, of which the first has this number."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    needs = [found.fullest for found in plans]
    sizes = {"peak": [need.peak for need in needs], "headroom": [need.memory - need.peak for need in needs]}
    sizes |= {part: [need.parts[part] for need in needs] for part in needs[0].parts if any(need.parts[part] for need in needs)}
    rows = {name: [f"{size / 2**20:,.0f}" for size in its] for name, its in sizes.items()} | {
        "step s": [f"{found.seconds:.3g}" for found in plans],
        "tokens/s": [f"{tokens / found.seconds:,.0f}" for found in plans],
        "exactness": [found.plan.exactness for found in plans],
    }
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for name in ("", *(str(first + i) for i in range(len(plans)))):
        table.add_column(name, justify="right" if name else "left")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    Console(highlight=False).print(table)


def draw(answer: "Answer", path: Path) -> None:
    """Bars of the parts of each plan on its fullest rank, and a line at the budget of that."""
    plans = [*answer.fitting, *answer.others]
    figure = new_figure(figsize=(11, 1.8 + 0.45 * len(plans)))
    axes, ends = figure.add_subplot(), [0.0] * len(plans)
    for part in plans[0].fullest.parts:
        sizes = [found.fullest.parts[part] / 2**30 for found in plans]
        axes.barh(range(len(plans)), sizes, left=ends, label=part)
        ends = [end + size for end, size in zip(ends, sizes, strict=True)]
    limits = [found.fullest.memory / 2**30 for found in plans]
    rows = [row + edge for row in range(len(plans)) for edge in (-0.5, 0.5)]
    axes.plot([limit for limit in limits for _ in range(2)], rows, color="black", linestyle="--", label="budget")
    names = [(arguments(found.plan) or "one device").replace("strategy.", "").replace("_grad_batches", "") for found in plans]
    labels = [f"{name}  ({found.seconds:.3g} s)" for name, found in zip(names, plans, strict=True)]
    axes.set_yticks(range(len(plans)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("GiB on the rank with the least room")
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=120)
