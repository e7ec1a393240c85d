"""The memory ladder: what each technique saves on one device, and what it costs, beside a plain run of the same work.

    python scripts/ladder.py [--problems gpt2 long] [--nanogpt CHECKOUT] [--steps 4] [--out ladder]

`gpt2` is GPT-2 124M (vocabulary 50,304) on 4 x 512 tokens in float32, beside nanoGPT's model and optimizer if a checkout is
given; `gpt2 on 2` is the same on two processes; `long` is an LSTM of width 512 on one sequence of 16,384 tokens, with
back-propagation through all of it. Every rung runs in processes of its own. Writes OUT.md, OUT.json and OUT.png.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from strategies import composed, measure, resident

QUIET = ["device=cpu", "logger=csv", "val_every=100000", "checkpoint_every=100000"]
GPT2 = ["model=gpt2", "optim=adamw", "global_batch=4", "sequence=512", "clip=1", *QUIET]
LONG = [
    "model=lstm",
    "model.width=512",
    "model.depth=1",
    "optim=adamw",
    "global_batch=1",
    "sequence=16384",
    "val_lanes=1",
    *QUIET,
]
TWO = ["strategy.replicate=2", "devices=2"]
SHARD = ["strategy.shard=2", "devices=2"]
PROBLEMS: dict[str, tuple[list[str], int | None, list[tuple[str, list[str]]]]] = {
    "gpt2": (
        GPT2,
        50304,
        [
            ("plain", []),
            ("micro-batches of one row", ["strategy.accumulate_grad_batches=4"]),
            ("+ recompute blocks", ["strategy.accumulate_grad_batches=4", "strategy.recompute=blocks"]),
            ("rows + optimizer state in a file", ["strategy.accumulate_grad_batches=4", "strategy.offload=optimizer"]),
            ("rows + all in a file", ["strategy.accumulate_grad_batches=4", "strategy.offload=all"]),
            ("rows + bf16 state", ["strategy.accumulate_grad_batches=4", "strategy.optimizer_state=bf16"]),
            ("rows + int8 state", ["strategy.accumulate_grad_batches=4", "strategy.optimizer_state=int8"]),
            ("rows + int4 state", ["strategy.accumulate_grad_batches=4", "strategy.optimizer_state=int4"]),
        ],
    ),
    "gpt2 on 2": (
        GPT2,
        50304,
        [
            ("ddp", TWO),
            ("ddp, ZeRO-1, one row", [*TWO, "strategy.zero1=true", "strategy.accumulate_grad_batches=2"]),
            ("fsdp", SHARD),
            ("fsdp, one row", [*SHARD, "strategy.accumulate_grad_batches=2"]),
            ("+ recompute blocks", [*SHARD, "strategy.accumulate_grad_batches=2", "strategy.recompute=blocks"]),
        ],
    ),
    "long": (LONG, None, [("plain", []), ("windows", ["strategy.recompute_window=-1"])]),
}


def nanogpt(checkout: Path, steps: int) -> dict[str, Any]:
    """nanoGPT's model and optimizer in its own loop: one forward pass of 4 x 512 tokens a step."""
    sys.path.insert(0, str(checkout))
    import torch
    from model import GPT, GPTConfig

    from leanlm.callbacks.record import peak_memory

    torch.manual_seed(0)
    net = GPT(GPTConfig(block_size=512, vocab_size=50304, n_layer=12, n_head=12, n_embd=768, dropout=0.0, bias=True))
    optimizer = net.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cpu")
    base, times = resident(), []
    for _ in range(steps):
        tokens = torch.randint(256, (4, 513))
        begin = time.perf_counter()
        _, loss = net(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - begin)
    return {"milliseconds": 1000 * statistics.median(times[1:]), "peak": [peak_memory()], "base": [base], "exactness": "-"}


def table(found: dict[str, dict[str, dict]]) -> str:
    lines = []
    for problem, rungs in found.items():
        first = next(iter(rungs.values()))
        columns = ["rung", "peak resident, MiB", "of the first row", "added by the steps, MiB", "weights", "gradients", "state"]
        columns += ["ms a step", "of the first row", "exactness"]
        lines += ["", problem, "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for name, one in rungs.items():
            peak, base = max(one["peak"]), max(one["base"])
            held = one["held"][0] if "held" in one else {}
            parts = [f"{held[key] / 2**20:.0f}" if held else "" for key in ("parameters", "gradients", "optimizer_state")]
            lines.append(
                f"| {name} | {peak / 2**20:.0f} | {peak / max(first['peak']):.2f} | {(peak - base) / 2**20:.0f} | "
                f"{' | '.join(parts)} | {one['milliseconds']:.0f} | {one['milliseconds'] / first['milliseconds']:.2f} | "
                f"{one['exactness']} |"
            )
    return "\n".join(lines) + "\n"


def picture(found: dict[str, dict[str, dict]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = [len(rungs) for rungs in found.values()]
    figure, grid = pyplot.subplots(len(found), 2, figsize=(12, 1.2 + 0.45 * sum(sizes)), squeeze=False, height_ratios=sizes)
    for (problem, rungs), (left, right) in zip(found.items(), grid, strict=True):
        names = list(rungs)[::-1]
        for axis, key, scale, title in ((left, "peak", 2**20, "peak resident, MiB"), (right, "milliseconds", 1, "ms a step")):
            values = [(max(rungs[name][key]) if key == "peak" else rungs[name][key]) / scale for name in names]
            colours = ["0.6" if rungs[name]["exactness"] == "-" else
                       "C1" if rungs[name]["exactness"] == "changes" else "C0" for name in names]  # fmt: skip
            axis.bar_label(axis.barh(names, values, color=colours), fmt="{:,.0f}", padding=3)
            axis.set_title(f"{problem}: {title}", fontsize=10)
            axis.margins(x=0.15)
            axis.spines[["top", "right"]].set_visible(False)
        right.set_yticks([])
    figure.suptitle("blue: the same curve; orange: it may move; grey: the reference", fontsize=9, y=0.995)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    from leanlm.config import check
    from leanlm.launch import launch
    from leanlm.prepare import tokens

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
            results["nanoGPT, 1 process"] = launch(nanogpt, (asked.nanogpt.resolve(), asked.steps), 1, isolate=True)
        for name, how in rungs:
            settings = check(composed([*common, *how]))
            one = launch(measure, ([*common, *how], asked.steps, vocabulary), settings.plan.world, isolate=True)
            results[name] = {**one, "exactness": settings.plan.exactness}
            print(f"{problem:10} {name:34} {one['milliseconds']:7.0f} ms  {max(one['peak']) / 2**20:.0f} MiB", flush=True)
    Path(f"{asked.out}.json").write_text(json.dumps(found, indent=1))
    Path(f"{asked.out}.md").write_text(table(found))
    picture(found, Path(f"{asked.out}.png"))
    print(table(found))


if __name__ == "__main__":
    main()
