"""Time from the shell to the end of the shortest commands, and what torch.compile adds to the start of the default run.

python scripts/startup.py [--rounds 5]
"""

import argparse
import csv
import statistics
import subprocess
import sys
import tempfile
import time

from rich.console import Console
from rich.table import Table

COMMANDS = {  # arguments -> seconds demanded
    "leanlm.train max_steps=1": 12.0,
    "leanlm.train --help": 4.0,
    "leanlm.train model.width=7 seed=x": 3.0,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    table = Table("command", "seconds (each round)", "median", "demanded", "")
    with tempfile.TemporaryDirectory() as folder:
        for command, limit in COMMANDS.items():
            seconds = []
            for _ in range(rounds + 1):
                begin = time.perf_counter()
                subprocess.run([sys.executable, "-m", *command.split()], cwd=folder, capture_output=True)
                seconds.append(time.perf_counter() - begin)
            seconds = seconds[1:]  # the first one fills the caches of a machine that was just started
            median = statistics.median(seconds)
            each = "  ".join(f"{value:.1f}" for value in seconds)
            table.add_row(command, each, f"{median:.1f}", f"{limit:g}", "met" if median <= limit else "NOT met")
    console = Console(width=110)
    console.print(table)
    table = Table("strategy.compile", "first step, s", "steps after it, ms (median)")
    for value in ("false", "true"):
        first, later = steps(value)
        table.add_row(value, f"{first:.1f}", f"{later:.1f}")
    console.print(table)


def steps(compiled: str) -> tuple[float, float]:
    """Seconds of the first step of the default run, milliseconds of those after it."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["leanlm.train", "max_steps=100", "log_every=1", "logger=csv", "device=cpu", f"strategy.compile={compiled}"]
        command += ["val_every=100000", "checkpoint_every=100000", f"run_dir={folder}/run"]
        subprocess.run([sys.executable, "-m", *command], check=True, capture_output=True)
        with open(f"{folder}/run/metrics.csv") as file:
            rates = [float(row["tokens_per_second"]) for row in csv.DictReader(file) if row["tokens_per_second"]]
    seconds = [16 * 128 / rate for rate in rates]
    return seconds[0], 1000 * statistics.median(seconds[2:])


if __name__ == "__main__":
    main()
