"""Waits for a run that `strategy=auto` chose, and has it planned again should memory end.

It takes the place of the process that chose, and imports nothing but Python: torch would take a share of the budget.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

from leanlm.launch.signals import KILLED, handled, stopping

OUT_OF_MEMORY = 128 + KILLED  # exit status of a run whose memory ended, whoever noticed
PREDICTED, ATTEMPT = "LEANLM_PREDICTED", "LEANLM_ATTEMPT"  # as JSON; which time it is planned, from 0
SIZE = 8 << 20  # bytes of this process, without the pages of libraries (measured: 7.2 MiB)
TRAIN = (sys.executable, "-m", "leanlm.train")


def instead(
    run: list[str], again: list[str] | None, resume: list[str], checkpoints: Path, environment: dict[str, str]
) -> NoReturn:
    """Go on as a process that only waits for a run.

    Args:
        run: its overrides.
        again: overrides with which it is planned again, should memory end before there is a checkpoint; None: it is not.
        resume: the same if there is one.
        checkpoints: folder of the run's.
        environment: what both get.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    asked = json.dumps([run, again, resume, str(checkpoints)])
    os.execve(sys.executable, [sys.executable, "-m", "leanlm.launch.supervisor", asked], os.environ | environment)


def main() -> None:
    run, again, resume, checkpoints = json.loads(sys.argv[1])
    attempt = os.environ.pop(ATTEMPT)
    child = subprocess.Popen([*TRAIN, *run])
    handled(stopping(), lambda number, _: child.send_signal(number))
    status = child.wait()
    if status not in (-KILLED, OUT_OF_MEMORY) or again is None:
        sys.exit(status if status >= 0 else 128 - status)
    print("memory ended: planning for less; the curve goes on from the last checkpoint", flush=True)
    overrides = resume if any(Path(checkpoints).glob("step-*")) else again
    del os.environ[PREDICTED]
    os.execve(sys.executable, [*TRAIN, *overrides], os.environ | {ATTEMPT: attempt})


def prediction() -> dict[str, Any] | None:
    """What the planner has predicted of the run of this process, see `Settings.predicted`; None: it was not asked."""
    return json.loads(os.environ.pop(PREDICTED, "null"))


if __name__ == "__main__":
    main()
