"""Peak memory while a text bigger than memory is tokenised: python scripts/prepare_memory.py [--gigabytes 2]

Writes a file of English-like lines, prepares it with each tokenizer in a process of its own, whose peak resident memory
and time are printed, and removes everything.
"""

import argparse
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

PREPARE = """
import resource, sys
from pathlib import Path
from leanlm.data.corpus import text
from leanlm.data.tokens import prepare
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tokens = prepare(text(sys.argv[1]), sys.argv[2], 8192)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print("RESULT", sum(len(split) for split in tokens.splits.values()), before * 1024, peak * 1024)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--tokenizers", nargs="+", default=["byte", "char", "word", "bpe"])
    asked = parser.parse_args()
    table = Table("tokenizer", "text", "tokens", "seconds", "peak memory", "of which before it began")
    with tempfile.TemporaryDirectory() as name:
        file = Path(name, "text.txt")
        draw = random.Random(0)
        words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(1, 9))) for _ in range(20000)]
        block = "".join(" ".join(draw.choices(words, k=12)) + ".\n" for _ in range(20000)).encode()
        with open(file, "wb") as out:
            while out.tell() < asked.gigabytes * 1e9:
                out.write(block)
        for tokenizer in asked.tokenizers:
            begin = time.perf_counter()
            env = {**os.environ, "LEANLM_CACHE": str(Path(name, tokenizer)), "RAYON_NUM_THREADS": "2"}
            done = subprocess.run(
                [sys.executable, "-c", PREPARE, str(file), tokenizer], capture_output=True, text=True, env=env
            )
            if done.returncode:
                sys.exit(done.stderr)
            count, before, peak = map(int, re.findall(r"\d+", done.stdout.split("RESULT")[1]))
            seconds = time.perf_counter() - begin
            print(f"{tokenizer}: {seconds:.0f} s, peak {peak / 2**20:.0f} MiB", flush=True)
            table.add_row(
                tokenizer, f"{file.stat().st_size / 1e9:.1f} GB", f"{count:,}", f"{seconds:.0f}",
                f"{peak / 2**20:.0f} MiB", f"{before / 2**20:.0f} MiB",
            )  # fmt: skip
            subprocess.run(["rm", "-rf", str(Path(name, tokenizer))], check=True)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
