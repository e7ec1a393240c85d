"""Time from the shell to the end of the shortest commands: python scripts/startup.py [--rounds 5]"""

import argparse
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
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
