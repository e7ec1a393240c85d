"""What each strategy costs and holds: speed and peak memory of every preset beside `single`, bytes of each rank, traffic.

python scripts/strategies.py [--devices 2 4] [--models transformer lstm] [--steps 6] [--out strategies]

Every run has processes of its own. Writes OUT.md (tables), OUT.json and OUT.png.
"""

import argparse
import json
from pathlib import Path

from measure import composed, measure

SIZES = {
    "transformer": ["model=transformer", "model.width=384", "model.depth=6", "model.heads=6", "optim=adamw"],
    "lstm": ["model=lstm", "model.width=512", "model.depth=4", "optim=adamw"],
}
COMMON = ["global_batch=16", "sequence=128", "device=cpu", "logger=csv", "val_every=100000", "checkpoint_every=100000"]
PRESETS = {  # strategy -> number of devices it needs at least
    "ddp": 2, "fsdp": 2, "tensor": 2, "pipeline": 2, "gpipe": 2, "interleaved": 2, "zero_bubble": 2, "hsdp": 4,
    "fsdp_tensor": 4, "pipeline_ddp": 4, "pipeline_fsdp": 4, "pipeline_tensor": 4,
}  # fmt: skip
MORE = {"fsdp, accumulate 4": ("fsdp", ["strategy.accumulate_grad_batches=4"]),
        "fsdp, accumulate 4, reduced once": ("fsdp", ["strategy.accumulate_grad_batches=4",
                                                      "strategy.reduce_every_micro_batch=false"])}  # fmt: skip


def main() -> None:
    from leanlm.config.checks import check
    from leanlm.launch.processes import launch
    from leanlm.training.data import tokens

    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--models", nargs="+", default=list(SIZES))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", default="strategies")
    asked = parser.parse_args()
    tokens(check(composed([*COMMON, *SIZES[asked.models[0]]])))
    found: dict[str, dict] = {}
    for model in asked.models:
        jobs = [("single", 1, "single", [])]
        for devices in asked.devices:
            jobs += [(name, devices, name, []) for name, least in PRESETS.items() if least <= devices]
            jobs += [(name, devices, *how) for name, how in MORE.items() if devices == 2]
        for name, devices, strategy, more in jobs:
            overrides = [*COMMON, *SIZES[model], f"strategy={strategy}", f"devices={devices}", *more]
            if check_stages(model, overrides):
                continue
            result = launch(measure, (overrides, asked.steps), devices, isolate=True)
            found.setdefault(model, {})[f"{name} ({devices})"] = result
            print(f"{model:12} {name:34} {devices}  {result['milliseconds']:7.0f} ms  "
                  f"{[round(peak / 2**20) for peak in result['peak']]} MiB", flush=True)  # fmt: skip
    Path(f"{asked.out}.json").write_text(json.dumps(found, indent=1))
    Path(f"{asked.out}.md").write_text(tables(found))
    picture(found, Path(f"{asked.out}.png"))
    print(tables(found))


def check_stages(model: str, overrides: list[str]) -> bool:
    """Whether a preset cannot work with this model (more stages than blocks)."""
    from leanlm.common.errors import UserError
    from leanlm.config.checks import check

    try:
        check(composed(overrides))
    except UserError as error:
        print(f"{model}: {error}")
        return True
    return False


def tables(found: dict[str, dict]) -> str:
    lines = []
    for model, results in found.items():
        alone = results["single (1)"]
        lines += [f"\n{model}, {alone['parameters']:,} parameters\n",
                  "| strategy (devices) | ms a step | of single | peak resident of a rank, MiB | weights | gradients | state | "
                  "activations | traffic of rank 0 a step, MiB |", "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
        for name, one in results.items():
            held = [", ".join(f"{rank[key] / 2**20:.1f}" for rank in one["held"]) for key in one["held"][0]]
            traffic = ", ".join(f"{kind} {calls}x {size / 2**20:.1f}" for kind, (calls, size) in one["traffic"][0].items())
            lines.append(
                f"| {name} | {one['milliseconds']:.0f} | {one['milliseconds'] / alone['milliseconds']:.2f} | "
                f"{', '.join(f'{peak / 2**20:.0f}' for peak in one['peak'])} | {' | '.join(held)} | "
                f"{', '.join(f'{a / 2**20:.0f}' for a in one['activations'])} | {traffic or 'none'} |"
            )
    return "\n".join(lines) + "\n"


def picture(found: dict[str, dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = max(len(results) for results in found.values())
    figure, axes = plt.subplots(
        len(found), 2, figsize=(12, (0.9 + 0.28 * rows) * len(found)), layout="constrained", squeeze=False
    )
    parts = [("parameters", "weights", "C0"), ("gradients", "gradients", "C1"), ("optimizer_state", "optimizer state", "C2")]
    for (model, results), (speed, memory) in zip(found.items(), axes, strict=True):
        names = list(results)
        values = [one["milliseconds"] for one in results.values()]
        speed.bar_label(speed.barh(names, values, color="0.6", height=0.65), [f"{value:,.0f}" for value in values], padding=3)
        speed.set_title(f"{model}: milliseconds a step", fontsize=10)
        left = [0.0] * len(names)
        for key, label, colour in [*parts, ("activations", "activations", "C4")]:
            worst = []
            for one in results.values():
                totals = [sum(rank.values()) + saved for rank, saved in zip(one["held"], one["activations"], strict=True)]
                rank = totals.index(max(totals))
                worst.append((one["activations"][rank] if key == "activations" else one["held"][rank][key]) / 2**20)
            memory.barh(names, worst, left=left, color=colour, height=0.65, label=label)
            left = [a + b for a, b in zip(left, worst, strict=True)]
        memory.set_title(f"{model}: MiB held by the fullest rank", fontsize=10)
        memory.set_yticklabels([])
        for each in (speed, memory):
            each.invert_yaxis()
            each.spines[["top", "right"]].set_visible(False)
            each.margins(x=0.12)
        memory.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
