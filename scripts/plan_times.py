"""Does the planner order plans as a stopwatch does? Plans of several problems, predicted, then run in real processes here.

python scripts/plan_times.py --into runs/times.jsonl               runs the problems that the file has not, and prints the table
python scripts/plan_times.py --plans 4 --only 0 2 --into ...       fewer plans, some problems

Of each problem: the plan that `strategy=auto` takes, and others spread evenly over the rough order of all that fit, with every
count of micro-batches. They are run in rounds, so that a machine that is slower for a while is so for all; a plan's time is
that of its fastest step, of some 20 seconds in each round. The rank correlation is Spearman's.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from plan_accuracy import whole_run
from torchmetrics.functional import spearman_corrcoef

from leanlm.common.files import CONF
from leanlm.config.checks import check
from leanlm.config.schema import Settings
from leanlm.planning.candidates import Estimate, Rough, families
from leanlm.planning.hardware.devices import this_machine
from leanlm.planning.predict import predict
from leanlm.planning.report import arguments
from leanlm.planning.search import search
from leanlm.planning.simulation.step import stages
from leanlm.strategies.plan import Plan
from leanlm.training.data import tokens

SECONDS, FEWEST, MOST = 20.0, 6, 32  # of a run's steps together; how many they are
# small: a virtual machine may lend its host the pages that were free for seconds, and getting them back takes long
PROBLEMS = [
    "model=gpt2 model.width=384 model.depth=6 global_batch=8 sequence=128",
    "model=lstm model.width=512 model.depth=2 global_batch=32 sequence=64",
    "model=llama model.width=384 model.depth=4 global_batch=8 sequence=128 data.tokenizer=word data.vocabulary=8000",
    "model=gpt2 model.width=384 model.depth=6 global_batch=8 sequence=128 devices=2",
    "model=lstm model.width=512 model.depth=4 global_batch=32 sequence=32 devices=2 data.tokenizer=word data.vocabulary=8000",
    "model=transformer model.width=256 model.depth=8 global_batch=16 sequence=128 devices=4",
]


def spread(settings: Settings, vocabulary: int, devices: int, count: int) -> list[Plan]:
    """Plans that fit, evenly over the rough order."""
    device = this_machine()
    rough = Estimate(settings, vocabulary, device)
    whole = stages(settings.config, Plan(), vocabulary)
    ordered: list[tuple[Rough, Plan]] = []
    for plans in families(settings, devices, whole, device, ()):
        ordered += [(rough(plan), plan) for plan in plans if rough(plan).bytes < device.share(devices).memory]
    ordered.sort(key=lambda pair: pair[0].seconds)
    last = len(ordered) - 1
    return [ordered[round(i * last / (count - 1))][1] for i in range(min(count, len(ordered)))]


def measure(overrides: list[str], folder: Path) -> float:
    """Seconds of the fastest step but the first.

    Raises:
        RuntimeError: the run failed; with the end of its errors.
    """
    command = [sys.executable, "-m", "leanlm.train", *overrides, f"run_dir={folder}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise RuntimeError(done.stderr[-1500:])
    with open(folder / "metrics.csv") as file:
        rates = [float(row["tokens_per_second"]) for row in csv.DictReader(file) if row.get("tokens_per_second")]
    return 1 / max(rates[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", type=int, nargs="*", default=range(len(PROBLEMS)))
    parser.add_argument("--into", type=Path, default=Path("runs/times.jsonl"))
    asked = parser.parse_args()
    asked.into.parent.mkdir(parents=True, exist_ok=True)
    known = [json.loads(line) for line in asked.into.read_text().splitlines()] if asked.into.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        common = [*whole_run(Path(folder), FEWEST), "log_every=1"]
        for number in asked.only:
            if PROBLEMS[number] in [record["problem"] for record in known]:
                continue
            overrides = PROBLEMS[number].split() + common
            with initialize_config_dir(str(CONF), version_base="1.3"):
                single = [part for part in overrides if not part.startswith("devices=")]
                settings = check(compose("train", overrides=single))
            devices = int(dict(part.split("=", 1) for part in overrides).get("devices", 1))
            vocabulary = tokens(settings).tokenizer.vocabulary
            chosen = search(settings, vocabulary, this_machine(), devices, wanted=4).fitting[0].plan
            plans = [chosen, *(plan for plan in spread(settings, vocabulary, devices, asked.plans) if plan != chosen)]
            size = settings.config.global_batch * settings.config.sequence
            record: dict = {"problem": PROBLEMS[number], "plans": []}
            for plan in plans:
                predicted = predict(replace(settings, plan=plan), vocabulary, this_machine()).seconds
                record["plans"].append({"plan": arguments(plan), "predicted": predicted, "runs": []})
            for turn in range(asked.rounds):
                for i, plan in enumerate(record["plans"]):
                    run = Path(folder, f"{number}-{i}-{turn}")
                    steps = max(FEWEST, min(MOST, round(SECONDS / plan["predicted"])))
                    length = [f"{key}={steps}" for key in ("max_steps", "val_every", "checkpoint_every")]
                    try:
                        plan["runs"].append(size * measure(overrides + plan["plan"].split() + length, run))
                    except (RuntimeError, subprocess.TimeoutExpired) as error:
                        print(f"{plan['plan']}: {error}", flush=True)
                        continue
                    print(f"predicted {plan['predicted']:.3f} s, measured {plan['runs'][-1]:.3f} s: {plan['plan']}", flush=True)
            record["plans"] = [plan for plan in record["plans"] if plan["runs"]]
            known.append(record)
            with open(asked.into, "a") as file:
                file.write(json.dumps(record) + "\n")
    report(known)


def report(records: list[dict]) -> None:
    for record in records:
        predicted = torch.tensor([plan["predicted"] for plan in record["plans"]])
        measured = torch.tensor([min(plan["runs"]) for plan in record["plans"]])
        print(f"{record['problem']}: {len(measured)} plans, rank correlation {spearman_corrcoef(predicted, measured):.2f}, "
              f"auto's {measured[0] / measured.min():.2f} times the fastest", end="")  # fmt: skip
        rounds = torch.tensor([plan["runs"][:2] for plan in record["plans"] if len(plan["runs"]) > 1])
        print(f"; of the first two rounds with each other {spearman_corrcoef(*rounds.T):.2f}" if len(rounds) > 1 else "")


if __name__ == "__main__":
    main()
