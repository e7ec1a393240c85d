"""Does `strategy=auto` keep its word? Random models and budgets, run in a control group that enforces the budget.

python scripts/plan_budgets.py --draws 30 --seed 1 --into runs/budgets.jsonl     adds to the file, and prints the outcomes

Needs Linux, and the right to make a control group (root, or a folder given to this user). Where auto says that nothing fits,
the plan with the smallest peak that it looked at is run all the same: the kernel must end it.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from plan_accuracy import whole_run

from leanlm.planning.hardware.devices import this_machine

STEPS = 3
MODELS = [
    "model=gpt2 model.width=384 model.depth=6",
    "model=gpt2 model.width=768 model.depth=8",
    "model=llama model.width=512 model.depth=8",
    "model=transformer model.width=512 model.depth=6",
    "model=lstm model.width=1024 model.depth=2",
    "model=gru model.width=1024 model.depth=2",
    "model=lstm model.width=512 model.depth=4 data.tokenizer=word data.vocabulary=8000",
]


def draw(rng: random.Random) -> tuple[list[str], int]:
    """Overrides, and a budget in bytes: from a little more than the process itself takes to what most of these models need."""
    devices = rng.choice([1, 1, 2])
    found = [*rng.choice(MODELS).split(), f"devices={devices}", f"global_batch={rng.choice([8, 16, 32])}"]
    found += [f"sequence={rng.choice([128, 256])}", f"optim={rng.choice(['adamw', 'muon', 'sgd'])}"]
    one, several, launcher = this_machine().process
    floor = launcher + (one if devices == 1 else devices * several)
    return found, floor + devices * round(2 ** rng.uniform(26.5, 31))  # 90 MiB to 2 GiB for each


class Limit:
    """A control group with a limit of bytes: version 1 or 2, whichever the system has."""

    def __init__(self, size: int) -> None:
        root = Path("/sys/fs/cgroup")
        first = (root / "memory").is_dir()
        self.path = (root / "memory" if first else root) / f"leanlm-{os.getpid()}"
        self.path.mkdir()
        (self.path / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(size))
        swap = self.path / ("memory.memsw.limit_in_bytes" if first else "memory.swap.max")
        if swap.exists():
            swap.write_text(str(size) if first else "0")

    def run(self, command: list[str]) -> tuple[int, str, str]:
        """Exit status, standard output and error of a command within the limit."""
        join = ["sh", "-c", f'echo $$ > {self.path}/cgroup.procs && exec "$@"', "sh", *command]
        process = subprocess.Popen(join, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        try:
            out, error = process.communicate(timeout=600)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, error = process.communicate()
            error += "\ntook more than 600 s"
        return process.returncode, out, error

    def close(self) -> None:
        for number in (self.path / "cgroup.procs").read_text().split():
            os.kill(int(number), signal.SIGKILL)
        try:
            self.path.rmdir()
        except OSError:  # its last process is going
            subprocess.run(["sleep", "1"], check=True)
            self.path.rmdir()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--into", type=Path, default=Path("runs/budgets.jsonl"))
    asked = parser.parse_args()
    asked.into.parent.mkdir(parents=True, exist_ok=True)
    rng = random.Random(asked.seed)
    with tempfile.TemporaryDirectory() as folder:
        common = whole_run(Path(folder), STEPS)
        for number in range(asked.draws):
            overrides, budget = draw(rng)
            record = once([*overrides, *common], budget, Path(folder, f"run{number}"))
            with open(asked.into, "a") as file:
                file.write(json.dumps({"overrides": overrides, "budget": budget, **record}) + "\n")
            print(f"{number + 1}/{asked.draws} {budget >> 20} MiB {' '.join(overrides)}: {record['outcome']}", flush=True)
    report([json.loads(line) for line in asked.into.read_text().splitlines()])


def once(overrides: list[str], budget: int, path: Path) -> dict:
    command = [sys.executable, "-m", "leanlm.train", *overrides, f"run_dir={path}"]
    limit = Limit(budget)
    try:
        status, out, error = limit.run([*command, "strategy=auto", f"device.memory={budget}"])
        if status == 0:
            result = json.loads((path / "result.json").read_text())
            peaks = {key: max(result[f"{key}_memory_bytes"]) for key in ("peak", "predicted_peak")}
            again = " after replanning" if "planning for less" in out + error else ""
            return {"outcome": "trained" + again, "plan": result["plan"], **peaks}
        refused = re.search(r"no plan fits .*? needs .*? \((.*?)\)", error.replace("\n", " "))
        if status != 2 or refused is None:
            return {"outcome": "died", "error": error[-2000:]}
        smallest = [part for part in refused[1].split() if "=" in part]
        status, _, error = limit.run([*command[:-1], *smallest, f"run_dir={path}-smallest"])
        return {"outcome": "nothing fits" + (", but the smallest did" if status == 0 else ""), "smallest": smallest}
    finally:
        limit.close()


def report(records: list[dict]) -> None:
    outcomes = [record["outcome"] for record in records]
    print("\n".join(f"{outcomes.count(one)} of {len(outcomes)}: {one}" for one in sorted(set(outcomes))))


if __name__ == "__main__":
    main()
