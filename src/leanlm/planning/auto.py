"""`strategy=auto`: the planner chooses, and plans again for less should memory end."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from leanlm.common.errors import UserError
from leanlm.common.run_folder import Run
from leanlm.config.schema import Settings
from leanlm.launch import supervisor
from leanlm.launch.processes import WorkerFailed, launch, memory_ended
from leanlm.launch.ranks import on_rank_0, say
from leanlm.planning import report
from leanlm.planning.choice import Choice
from leanlm.planning.hardware import devices
from leanlm.planning.predict import Prediction
from leanlm.planning.search import Answer, search
from leanlm.training.data import tokens

SCALES = (1.0, 0.85, 0.7, 0.55)  # of the memory that a plan is chosen for: first, and after each time that it was not enough

Work = Callable[[Settings, Path], dict[str, Any]]


def train(work: Work, settings: Settings, path: Path, command: list[str] | None = None) -> dict[str, Any]:
    """Train under the plan that the planner chooses, and under one for less memory should that not be enough.

    Args:
        work: what each rank does, given settings and folder of the run.
        command: overrides that compose the configuration, as a person types them, of a process that has nothing else to do: it
            is replaced by one that waits for the run, and this function does not return.
    """
    if command is not None:
        hand_over(settings, command, path)
    for scale in SCALES:
        chosen, lines = choose(settings, scale)
        say("\n".join(lines))
        try:
            return launch(work, (chosen, path), chosen.plan.world, True, settings.config.restarts)
        except WorkerFailed as failure:
            if scale == SCALES[-1] or not memory_ended(failure):
                raise
            say(f"memory ended: {str(failure).splitlines()[-1]}\nplanning for less; the curve goes on from the last checkpoint")
        if any(Run(path).checkpoints.glob("step-*")):
            settings = replace(settings, config=replace(settings.config, resume=str(path)))
    raise AssertionError


def agreed(settings: Settings) -> Settings:
    """What rank 0 chooses, under torchrun, on all ranks."""
    return on_rank_0(lambda: choose(settings)[0])


def choose(settings: Settings, scale: float = 1.0, beside: int | None = None) -> tuple[Settings, list[str]]:
    """The fastest exact plan that fits the configured device, and the lines that say why.

    If none leaves the margin free, the one that leaves most is tried, should it fit at all.

    Args:
        scale: of the budget; below 1 after a run has met the end of memory.
        beside: bytes of a machine that the process takes which waits for a run on one device; None: what one with torch does.

    Raises:
        UserError: nothing fits.
    """
    config = settings.config
    count = devices.count(config.device, settings.devices)
    device = devices.of_config(config.device, count).scaled(scale)
    if count == 1 and device.shared:  # several have one with torch beside them anyhow
        held = device.process[2] if beside is None or config.restarts else beside
        device = replace(device, memory=device.memory - held)
    vocabulary = tokens(settings).tokenizer.vocabulary
    answer = search(settings, vocabulary, device, count, () if config.resume else config.allow, wanted=4)
    budget = report.budgets(device, count)
    if not answer.fitting and not answer.least.tight:
        raise UserError(
            f"strategy=auto: no plan fits {budget}: the smallest that was looked at needs "
            f"{report.mib(answer.least.fullest.peak)} ({report.arguments(answer.least.plan)}); write device.memory=..., more "
            "devices, allow=[precision,optim.state], or a smaller model or sequence"
        )
    best = answer.fitting[0] if answer.fitting else answer.least
    needs = [best.of_rank(rank) for rank in range(best.plan.world)]
    predicted = [need.peak - need.parts.get("context", 0) for need in needs]  # what a run can measure
    prediction = {"peak_memory_bytes": predicted, "seconds_per_step": best.seconds}
    chosen = replace(best.plan.settings(settings), predicted=prediction)
    return chosen, _why(chosen, best, answer, budget)


def _why(chosen: Settings, best: Prediction, answer: Answer, budget: str) -> list[str]:
    """Lines that say what was chosen, and why."""
    margin = f"none leaves {devices.MARGIN:.0%} of it free, this may fit: the smallest"
    kind = "the fastest that fits" if answer.fitting else margin
    after = "".join(
        f"; next {one.seconds:.3g} s, {report.mib(one.fullest.peak)}: {report.arguments(one.plan)}"
        for one in (answer.fitting[1:] or answer.others)[:1]
    )
    return [
        f"strategy=auto: {chosen.describe()}",
        f"  predicted peak {report.mib(best.fullest.peak)} of {budget}, {best.seconds:.3g} s a step",
        f"  {kind} of {answer.simulated} plans simulated, the likeliest of {answer.candidates}{after}",
    ]


def hand_over(settings: Settings, command: list[str], path: Path) -> NoReturn:
    """Let the planner choose, and go on as a process that waits for the run of its choice."""
    attempt = int(os.environ.pop(supervisor.ATTEMPT, 0))
    chosen, lines = choose(settings, SCALES[attempt], beside=supervisor.SIZE)
    say("\n".join(lines))
    asked = [part for part in command if part.lstrip("+~").partition("=")[0] != "run_dir"]
    named = [part for part in asked if not re.match(r"[+~]*strategy[.=]", part)]
    here, choice = f"run_dir={path}", Choice.of(chosen)
    changed = [f"precision={choice.precision}"] * (choice.precision != settings.config.precision)
    changed += [f"optim.state={choice.state}"] * (choice.state != settings.config.optim.state)
    supervisor.instead(
        run=[*named, "strategy=single", *report.arguments(choice).split(), *changed, here],
        again=[*asked, here] if attempt + 1 < len(SCALES) else None,
        resume=[f"resume={path}", "strategy=auto"],
        checkpoints=Run(path).checkpoints,
        environment={supervisor.PREDICTED: json.dumps(chosen.predicted), supervisor.ATTEMPT: str(attempt + 1)},
    )
