"""The memory ladder: what each technique saves, what it costs, and what it does to the loss, beside the same work done plainly.

    python scripts/ladder.py [--problems gpt2 long] [--nanogpt CHECKOUT] [--steps 4] [--out ladder]

`gpt2` is GPT-2 124M (vocabulary 50,304) on 4 x 512 tokens in float32, beside nanoGPT's model and optimizer if a checkout is
given; `gpt2 on 2` is the same on two processes; `long` is an LSTM of width 512 on one sequence of 16,384 tokens, with
back-propagation through all of it. Every rung runs in processes of its own: `--steps` of them are timed, then the process is
looked at in one more. Writes OUT.md, OUT.json and OUT.png.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from measure import composed, measure, resident, watched

QUIET = ["device=cpu", "logger=csv", "val_every=100000", "checkpoint_every=100000", "strategy.return_freed_memory=false"]
GPT2 = ["model=gpt2", "optim=adamw", "global_batch=4", "sequence=512", *QUIET]
LONG = ["model=lstm", "model.width=512", "model.depth=1", "optim=adamw", "global_batch=1", "sequence=16384", "val_lanes=1",
        *QUIET]  # fmt: skip
ROWS, BLOCKS, FREED = {"accumulate_grad_batches": 4}, {"recompute": "blocks"}, {"return_freed_memory": "true"}
FILE, INT8, IN_BACKWARD = {"offload": "optimizer"}, {"optim.state": "int8"}, {"step_in_backward": "true", "clip": 0}
LEAN = ROWS | BLOCKS | FREED
TWO, SHARD, ROW = {"replicate": 2}, {"shard": 2}, {"accumulate_grad_batches": 2}
RUN = ("clip", "precision", "optim.state")
Rungs = dict[str, dict[str, Any]]  # name -> keys of the plan, and those of RUN
PROBLEMS: dict[str, tuple[list[str], int | None, Rungs]] = {
    "gpt2": (
        GPT2,
        50304,
        {
            "plain": {},
            "recompute operators": {"recompute": "operators"},
            "recompute blocks": BLOCKS,
            "recompute blocks, return freed memory": BLOCKS | FREED,
            "rows one at a time": ROWS,
            "+ recompute blocks, return freed memory": LEAN,
            "+ optimizer state in a file": LEAN | FILE,
            "no clipping: step in backward, blocks, freed": IN_BACKWARD | BLOCKS | FREED,
            "rows, int8 state": ROWS | INT8,
            "rows, int8 state, blocks, freed": LEAN | INT8,
            "rows, int4 state, blocks, freed": LEAN | {"optim.state": "int4"},
            "bf16-mixed, int8 state, blocks, freed": BLOCKS | FREED | INT8 | {"precision": "bf16-mixed"},
            "bf16-stochastic, int8 state, rows, blocks, freed": LEAN | INT8 | {"precision": "bf16-stochastic"},
        },
    ),
    "gpt2 on 2": (
        GPT2,
        50304,
        {
            "ddp": TWO,
            "ddp, ZeRO-1": TWO | {"zero1": "true"},
            "ddp, ZeRO-1, rows, blocks, freed": TWO | ROW | BLOCKS | FREED | {"zero1": "true"},
            "fsdp": SHARD,
            "fsdp, rows, blocks, freed": SHARD | ROW | BLOCKS | FREED,
            "+ optimizer state in a file": SHARD | ROW | BLOCKS | FREED | FILE,
        },
    ),
    "long": (LONG, None, {"plain": {}, "native kernel": {"rnn_kernel": "native"}, "windows": {"recompute_window": -1}}),
}
TITLES = {"gpt2": "GPT-2 124M, one process", "gpt2 on 2": "GPT-2 124M, two processes", "long": "LSTM, 16,384 tokens"}
PARTS = ("weights", "gradients", "state", "activations", "logits", "rest")


def written(keys: dict[str, Any]) -> list[str]:
    """Keys of a plan as a command line."""
    devices = max(keys.get("replicate", 1), keys.get("shard", 1))
    plan = [f"{'' if key in RUN else 'strategy.'}{key}={value}" for key, value in keys.items()]
    return plan + ([f"devices={devices}"] if devices > 1 else [])


def nanogpt(checkout: Path, steps: int) -> dict[str, Any]:
    """nanoGPT's model and optimizer in its own loop: one forward pass of 4 x 512 tokens a step."""
    sys.path.insert(0, str(checkout))
    import torch
    from model import GPT, GPTConfig

    from leanlm.common.machine import peak_memory

    torch.manual_seed(0)
    net = GPT(GPTConfig(block_size=512, vocab_size=50304, n_layer=12, n_head=12, n_embd=768, dropout=0.0, bias=True))
    optimizer = net.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cpu")
    base, times = resident(), []

    def step() -> None:
        tokens = torch.randint(256, (4, 513))
        begin = time.perf_counter()
        _, loss = net(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - begin)

    for _ in range(steps):
        step()
    peak = peak_memory()
    with watched(list(net.parameters()), optimizer, 50304) as held:
        step()
    found = {"milliseconds": 1000 * statistics.median(times[1:steps]), "peak": [peak], "base": [base], "exactness": "-"}
    return {**found, "at_peak": [held.at_peak]}


def table(found: dict[str, dict[str, dict]]) -> str:
    lines = []
    for problem, rungs in found.items():
        first = next(iter(rungs.values()))
        added = max(first["peak"]) - max(first["base"])
        columns = ["rung", "peak resident, MiB", "of the first", *PARTS, "added by the steps, MiB", "of the first", "ms a step",
                   "of the first", "exactness", "validation loss"]  # fmt: skip
        lines += ["", TITLES[problem], "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for name, one in rungs.items():
            peak, more = max(one["peak"]), max(one["peak"]) - max(one["base"])
            parts = [f"{max(rank[key] for rank in one['at_peak']) / 2**20:.0f}" for key in PARTS]
            loss = f"{one['val_loss']:.6f}" if "val_loss" in one else ""
            lines.append(
                f"| {name} | {peak / 2**20:.0f} | {peak / max(first['peak']):.2f} | {' | '.join(parts)} | "
                f"{more / 2**20:.0f} | {more / added:.2f} | {one['milliseconds']:.0f} | "
                f"{one['milliseconds'] / first['milliseconds']:.2f} | {one['exactness']} | {loss} |"
            )
    return "\n".join(lines) + "\n"


def picture(found: dict[str, dict[str, dict]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = [len(rungs) + 1 for rungs in found.values()]
    figure, grid = pyplot.subplots(
        len(found), 2, figsize=(12, 0.5 + 0.36 * sum(sizes)), squeeze=False, layout="constrained",
        gridspec_kw={"height_ratios": sizes, "width_ratios": [2, 1]},
    )  # fmt: skip
    colours = dict(zip(PARTS, ("C0", "C1", "C2", "C4", "C3", "0.8"), strict=True))
    marks = {"changes": "  *", "-": "", "bitwise": "", "rounding": ""}
    for (problem, rungs), (left, right) in zip(found.items(), grid, strict=True):
        names = [name + marks[one["exactness"]] for name, one in rungs.items()]
        ranks = [max(one["at_peak"], key=lambda rank: rank["all"]) for one in rungs.values()]
        begin = [0.0] * len(names)
        for part in PARTS:
            values = [max(0.0, rank[part] / 2**20) for rank in ranks]
            bars = left.barh(range(len(names)), values, left=begin, color=colours[part], label=part, height=0.7)
            begin = [a + b for a, b in zip(begin, values, strict=True)]
        left.bar_label(bars, [f"{rank['all'] / 2**20:,.0f}" for rank in ranks], padding=3, fontsize=8)
        left.set_yticks(range(len(names)), names, fontsize=9)
        left.set_title(f"{TITLES[problem]}: MiB of the largest process at its peak", fontsize=10, loc="left")
        times = [one["milliseconds"] for one in rungs.values()]
        right.bar_label(right.barh(range(len(names)), times, color="0.6", height=0.7), fmt="{:,.0f}", padding=3, fontsize=8)
        right.set_title("ms a step", fontsize=10, loc="left")
        right.set_yticks([])
        for axis in (left, right):
            axis.margins(x=0.12, y=0.02)
            axis.invert_yaxis()
            axis.spines[["top", "right"]].set_visible(False)
    grid[0][0].legend(frameon=False, fontsize=8, loc="lower right")
    figure.text(0.01, -0.01, "* the loss may differ; all others have the loss of the plain run", fontsize=8)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main() -> None:
    from leanlm.config.checks import check
    from leanlm.launch.processes import launch
    from leanlm.training.data import tokens

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--nanogpt", type=Path)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", default="ladder")
    asked = parser.parse_args()
    found: dict[str, dict[str, dict]] = {}
    for problem in asked.problems:
        common, vocabulary, rungs = PROBLEMS[problem]
        tokens(check(composed(common)))
        results = found.setdefault(problem, {})
        if vocabulary and asked.nanogpt:
            results["nanoGPT"] = launch(nanogpt, (asked.nanogpt.resolve(), asked.steps), 1, isolate=True)
        for name, keys in rungs.items():
            overrides = [*common, *written(keys)]
            devices = check(composed(overrides)).plan.world
            results[name] = one = launch(measure, (overrides, asked.steps, vocabulary), devices, isolate=True)
            print(f"{problem:10} {name:36} {one['milliseconds']:7.0f} ms  {max(one['peak']) / 2**20:.0f} MiB", flush=True)
            Path(f"{asked.out}.json").write_text(json.dumps(found, indent=1))
    Path(f"{asked.out}.md").write_text(table(found))
    picture(found, Path(f"{asked.out}.png"))
    print(table(found))


if __name__ == "__main__":
    main()
