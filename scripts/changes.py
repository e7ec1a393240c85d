"""What the techniques that change numbers do to the result: validation loss of the default experiment, several seeds.

    python scripts/changes.py [--steps 1000] [--seeds 1 2 3] [--out changes] [--only fp32 int8]

Each row is the default experiment (`python -m leanlm.train`) with AdamW or, where its name says so, with another
optimizer. Seeds give the initial weights and the order of rows, the same in every row, so that differences are taken
seed by seed. Writes OUT.md and OUT.json; runs that OUT.json already holds are not run again.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ADAMW = ["optim=adamw", "optim.lr=4e-3", "optim.schedule=wsd", "optim.final=0"]
ROWS = {  # name -> overrides, the row that it is compared with
    "fp32": (ADAMW, "fp32"),
    "bf16-mixed": ([*ADAMW, "precision=bf16-mixed"], "fp32"),
    "bf16": ([*ADAMW, "precision=bf16"], "fp32"),
    "bf16-stochastic": ([*ADAMW, "precision=bf16-stochastic"], "fp32"),
    "optim.state=bf16": ([*ADAMW, "optim.state=bf16"], "fp32"),
    "optim.state=int8": ([*ADAMW, "optim.state=int8"], "fp32"),
    "optim.state=int4": ([*ADAMW, "optim.state=int4"], "fp32"),
    "adafactor": (["optim=adafactor"], "fp32"),
    "muon (the default)": ([], "fp32"),
}


def run(overrides: list[str], seed: int, steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, "-m", "leanlm.train", *overrides, f"seed={seed}", f"max_steps={steps}", f"val_every={steps}",
                   f"checkpoint_every={steps}", "device=cpu", "logger=csv", f"run_dir={name}/run"]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)
        result = json.loads(Path(name, "run", "result.json").read_text())
    return {key: result[key] for key in ("loss", "seconds", "held_bytes", "peak_memory_bytes")}


def table(found: dict[str, dict[str, dict]], seeds: list[str]) -> str:
    columns = ["", "validation loss (mean, spread of the seeds)", "difference (mean, spread)", "of", "optimizer state, bytes"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, (_, base) in ROWS.items():
        if name not in found or not all(seed in found[name] and seed in found.get(base, {}) for seed in seeds):
            continue
        losses = [found[name][seed]["loss"] for seed in seeds]
        apart = [found[name][seed]["loss"] - found[base][seed]["loss"] for seed in seeds]
        state = found[name][seeds[0]]["held_bytes"][0]["optimizer_state"]
        change = "" if name == base else f"{statistics.mean(apart):+.4f}, {max(apart) - min(apart):.4f}"
        lines.append(f"| {name} | {statistics.mean(losses):.4f}, {max(losses) - min(losses):.4f} | {change} | "
                     f"{'' if name == base else base} | {state:,} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", nargs="+", default=["1", "2", "3"])
    parser.add_argument("--only", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--out", default="changes")
    asked = parser.parse_args()
    file = Path(f"{asked.out}.json")
    found: dict[str, dict[str, dict]] = json.loads(file.read_text()) if file.is_file() else {}
    for name in asked.only:
        for seed in asked.seeds:
            if seed not in found.setdefault(name, {}):
                found[name][seed] = run(ROWS[name][0], int(seed), asked.steps)
                file.write_text(json.dumps(found, indent=1))
                print(f"{name}, seed {seed}: {found[name][seed]['loss']:.4f}", flush=True)
    Path(f"{asked.out}.md").write_text(table(found, asked.seeds))
    print(table(found, asked.seeds))


if __name__ == "__main__":
    main()
