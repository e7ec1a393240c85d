"""The jobs of a sweep, as far as they are known before it starts."""

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import IntervalSweep, Override

from leanlm.common.errors import UserError


def jobs(parsed: list[Override]) -> list[list[str]]:
    """The overrides of each job of a sweep.

    An optimizing sweeper chooses its jobs while it runs: of these, each value that it may choose, and both ends of an interval,
    come once, beside the first of every other key.
    """
    named = {override.key_or_group for override in parsed}
    intervals = [override for override in parsed if isinstance(override.value(), IntervalSweep)]
    if intervals and not named & {"hydra/sweeper", "experiment"}:
        raise UserError(*(f"{one.input_line}: an interval needs hydra/sweeper=optimize" for one in intervals))
    if not intervals and "hydra/sweeper" not in named:
        return BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]
    choices = [_choices(override) for override in parsed]
    first = [values[0] for values in choices]
    others = [[*first[:i], value, *first[i + 1 :]] for i, values in enumerate(choices) for value in values[1:]]
    return [first, *others]


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
