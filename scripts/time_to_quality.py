"""Training clock to reach the quality of nanoGPT's CPU line on Tiny Shakespeare, both sides in one run.

    python scripts/time_to_quality.py --nanogpt CHECKOUT [--rounds 1]

nanoGPT trains for its 2,000 steps; its clock is the sum of the step times it prints, so its evaluations do not count.
Its last model is scored on the whole validation set, each character once, in windows of 64. Then each of leanlm's
experiments trains to its end; its clock is `seconds` and its score `loss` of result.json, measured on the same
characters. Needs LEANLM_DATA or a network.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table
from step_time import NANOGPT, prepare_nanogpt

EXPERIMENTS = {  # name -> (loss to reach, share of nanoGPT's clock)
    "shakespeare_transformer": (1.898, 1 / 4),
    "shakespeare_lstm": (1.898, 1 / 7),
    "shakespeare_lstm_large": (1.55, 1.0),
}

SCORE = """
import pickle, sys, numpy as np, torch, torch.nn.functional as F
from model import GPT, GPTConfig
saved = torch.load("out-shakespeare-char/ckpt.pt", weights_only=False)
gpt = GPT(GPTConfig(**saved["model_args"]))
gpt.load_state_dict(saved["model"])
gpt.eval()
text = torch.from_numpy(np.fromfile("data/shakespeare_char/val.bin", dtype=np.uint16).astype(np.int64))
read = torch.cat((torch.tensor([0]), text[:-1]))  # the first character has a line end before it
nats = 0.0
with torch.no_grad():
    for i in range(0, len(text), 64):
        logits = gpt(read[None, i : i + 64], text[None, i : i + 64])[0][0]
        nats += float(F.cross_entropy(logits, text[i : i + 64], reduction="sum"))
print("SCORE", nats / len(text), saved["iter_num"])
"""


def nanogpt(copy: Path) -> tuple[float, float]:
    """Seconds of training and loss on the whole validation set."""
    options = [*NANOGPT.split(), "--max_iters=2000"]
    done = subprocess.run([sys.executable, "train.py", *options], cwd=copy, check=True, capture_output=True, text=True)
    times = [float(ms) for ms in re.findall(r"^iter [1-9]\d*: .* time ([\d.]+)ms", done.stdout, re.MULTILINE)]
    evaluations = len(re.findall(r"^step \d+: train loss", done.stdout, re.MULTILINE))
    times = sorted(times)[: len(times) - evaluations]  # a step after an evaluation has its time in it
    scored = subprocess.run([sys.executable, "-c", SCORE], cwd=copy, check=True, capture_output=True, text=True)
    loss, step = scored.stdout.split("SCORE ")[1].split()
    assert int(step) == 2000, f"its best model is of step {step}"
    return sum(times) / 1e3, float(loss)


def leanlm(experiment: str, folder: Path) -> tuple[float, float]:
    command = [sys.executable, "-m", "leanlm.train", f"experiment={experiment}", "device=cpu", f"run_dir={folder}"]
    subprocess.run(command, check=True, capture_output=True)
    result = json.loads((folder / "result.json").read_text())
    return result["seconds"], result["loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--rounds", type=int, default=1)
    asked = parser.parse_args()
    clocks: dict[str, list[float]] = {}
    losses: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        copy = prepare_nanogpt(asked.nanogpt, Path(name))
        for number in range(asked.rounds):
            for which in ("nanoGPT", *EXPERIMENTS):
                seconds, loss = nanogpt(copy) if which == "nanoGPT" else leanlm(which, Path(name) / f"{which}-{number}")
                clocks.setdefault(which, []).append(seconds)
                losses[which] = loss
    table = Table("", "seconds of training (each round)", "of nanoGPT's", "validation loss", "demand", "")
    for which, seconds in clocks.items():
        share = statistics.median(a / b for a, b in zip(seconds, clocks["nanoGPT"], strict=True))
        demand, verdict = "", ""
        if which in EXPERIMENTS:
            loss, most = EXPERIMENTS[which]
            demand = f"{loss} in {most:.3f}x"
            verdict = "met" if losses[which] <= loss and share <= most else "NOT met"
        each = "  ".join(f"{value:.1f}" for value in seconds)
        table.add_row(which, each, f"{share:.3f}x", f"{losses[which]:.4f}", demand, verdict)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
