"""What all commands share: one check of the whole command line, Hydra, and one clear line for each mistake."""

import re
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

import hydra
from omegaconf import DictConfig

from leanlm.config import FOLDER, Config, command_line, typed
from leanlm.errors import UserError
from leanlm.launch import Stopped, WorkerFailed, rank

FREE_TEXT = ("prompt", "text", "sample")


def run(name: str, schema: type, function: Callable[[Any], Any]) -> None:
    """The command `name`: compose `conf/<name>.yaml` with the command line and call `function`, once for each job.

    `function` gets the composed configuration (of the class `schema`, except for `Config`, which it checks itself).
    The process ends with 2 after a mistake of the user's, 1 after a failure, 128 + n after signal n.
    """
    codes = [0]

    @hydra.main(config_path=FOLDER, config_name=name, version_base="1.3")
    def job(config: DictConfig) -> None:
        try:
            function(config if schema is Config else typed(config, schema)[1])
        except UserError as error:
            codes.append(_complain(error))
        except Stopped as stopped:
            raise SystemExit(128 + stopped.signum) from None
        except WorkerFailed as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            codes.append(1)
        except Exception:
            traceback.print_exc()
            codes.append(1)

    sys.argv[1:] = map(_quoted, sys.argv[1:])
    try:
        command_line(sys.argv[1:], name, schema)
        job()
    except UserError as error:
        codes.append(_complain(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        codes.append(128 + signal.SIGINT)
    if max(codes):
        sys.exit(max(codes))


def _quoted(argument: str) -> str:
    """Free text may hold whatever it likes: put it between quotes for Hydra's grammar, unless it is."""
    key, equals, value = argument.partition("=")
    if key not in FREE_TEXT or not equals or value == "null" or re.fullmatch(r"'.*'|\".*\"", value, re.DOTALL):
        return argument
    value = value.replace("${", "\\${")
    return f"{key}='" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value) + "'"


def _complain(error: UserError) -> int:
    if rank() == 0:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr, flush=True)
    return 2
