"""Peak memory while a text bigger than memory is tokenised: python scripts/prepare_memory.py [--gigabytes 2] [--lines 5000000]

Writes a file of English-like lines, or of so many lines of JSON with a prompt and a completion, prepares it (these also in rows
of 512 tokens) with each tokenizer in a process of its own, whose peak resident memory
and time are printed, and removes everything.
"""

import argparse
import json
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
from leanlm.data.corpus import jsonl, text
from leanlm.data.packing import packed
from leanlm.data.tokens import prepare
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
documents = sys.argv[1].endswith(".jsonl")
tokens = prepare((jsonl if documents else text)(sys.argv[1]), sys.argv[2], 8192)
splits = tokens.splits
if documents:
    splits = {name: packed(each, f"{tokens.fingerprint}-{name}", 512, 1, lambda *_: None) for name, each in splits.items()}
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print("RESULT", sum(map(len, splits.values())), before * 1024, peak * 1024)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--lines", type=int, help="of JSON, instead of a text of so many gigabytes")
    parser.add_argument("--tokenizers", nargs="+", default=["byte", "char", "word", "bpe"])
    asked = parser.parse_args()
    table = Table("tokenizer", "text", "tokens", "seconds", "peak memory", "of which before it began")
    with tempfile.TemporaryDirectory() as name:
        file = Path(name, "pairs.jsonl" if asked.lines else "text.txt")
        draw = random.Random(0)
        words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(1, 9))) for _ in range(20000)]
        block = "".join(" ".join(draw.choices(words, k=12)) + ".\n" for _ in range(20000)).encode()
        with open(file, "wb") as out:
            if asked.lines:
                lines = [json.dumps({"prompt": " ".join(draw.choices(words, k=draw.randint(5, 30))),
                                     "completion": " ".join(draw.choices(words, k=draw.randint(3, 20)))}) + "\n"
                         for _ in range(20000)]  # fmt: skip
                out.writelines(lines[i % len(lines)].encode() for i in range(asked.lines))
            while not asked.lines and out.tell() < asked.gigabytes * 1e9:
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
