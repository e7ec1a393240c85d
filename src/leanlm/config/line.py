"""A command line as it was typed: Hydra's flags, the overrides between them, the jobs that they ask for."""

from functools import cached_property
from typing import NoReturn

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException

from leanlm.common.errors import UserError, refuse
from leanlm.config import words


class Line:
    """Its `overrides` are as Hydra's grammar reads them, see `words.read`."""

    def __init__(self, arguments: list[str]) -> None:
        """`arguments`: as the shell handed them over. Raises UserError where there is no such flag or folder of a flag."""
        parser = get_args_parser()
        parser.error = _refuse  # type: ignore[method-assign]
        self.asked = parser.parse_intermixed_args(arguments)
        self.flags = [argument for argument in arguments if argument not in self.asked.overrides]
        self.overrides = words.read(self.asked.overrides, self.asked.multirun, self.asked.config_dir)
        self.informs = any(getattr(self.asked, flag) for flag in ("help", "hydra_help", "info", "cfg", "shell_completion"))
        self.sweeps = self.asked.multirun and not self.informs

    @cached_property
    def parsed(self) -> list[Override]:
        """The overrides as Hydra's parser understands them. Raises UserError with all that it does not."""
        read = {override: words.parsed(override) for override in self.overrides}
        bad = [override for override, found in read.items() if found is None or not found.key_or_group]
        refuse(f"{override}: not of the form key=value" for override in bad)
        return [found for found in read.values() if found]

    def for_hydra(self) -> list[str]:
        """What Hydra is to read. Its `override_dirname` of a job names only keys to which a sweep gives several values."""
        fixed = ",".join(override.key_or_group for override in self.parsed if not override.is_sweep_override())
        return [*self.flags, *self.overrides, *([f"hydra.job.config.override_dirname.exclude_keys=[{fixed}]"] * self.sweeps)]

    def jobs(self) -> list[list[str]]:
        """The overrides of each job, as far as they are known before a sweep starts.

        An optimizing sweeper chooses its jobs while it runs: of these, each value that it may choose, and both ends of an
        interval, come once, beside the first of every other key.

        Raises:
            UserError: a kind of sweep that has to know Hydra's folders, as glob(*) has, or an interval without such a sweeper.
        """
        named = {override.key_or_group for override in self.parsed}
        if not self.sweeps:
            return [self.overrides]
        intervals = [override for override in self.parsed if isinstance(override.value(), IntervalSweep)]
        if not named & {"hydra/sweeper", "experiment"}:
            refuse(f"{one.input_line}: an interval needs hydra/sweeper=optimize" for one in intervals)
        try:
            if not intervals and "hydra/sweeper" not in named:
                return BasicSweeper.split_arguments(self.parsed, max_batch_size=None)[0]
            choices = [_choices(override) for override in self.parsed]
        except HydraException as error:
            raise UserError(str(error).splitlines()[0]) from None
        first = [values[0] for values in choices]
        others = [[*first[:i], value, *first[i + 1 :]] for i, values in enumerate(choices) for value in values[1:]]
        return [first, *others]


def _refuse(message: str) -> NoReturn:
    raise UserError(f"{message}: overrides are written key=value; --help shows the keys, --hydra-help the flags")


def _choices(override: Override) -> list[str]:
    """What a sweep may make of one override; of an interval its ends."""
    sweep = override.value()
    if isinstance(sweep, IntervalSweep):
        values = [str(sweep.start), str(sweep.end)]
    elif override.is_sweep_override():
        values = list(override.sweep_string_iterator())
    else:
        values = [override.get_value_element_as_str()]
    return [f"{override.get_key_element()}={value}" for value in values]
