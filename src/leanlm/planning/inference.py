"""Evaluation and generation within a memory budget: what they need, simulated as a training step is."""

import contextlib
from dataclasses import replace

from leanlm.common.errors import UserError
from leanlm.config.schema import Config, Settings
from leanlm.memory import malloc
from leanlm.models.generation import generate_rows
from leanlm.planning.choice import Choice
from leanlm.planning.hardware import devices
from leanlm.planning.parts import heap_of, peaks, with_overhead
from leanlm.planning.report import mib
from leanlm.planning.simulation import allocator, fake_world
from leanlm.planning.simulation.patches import no_moves, replaced
from leanlm.planning.simulation.trace import Trace
from leanlm.strategies.plan import Plan
from leanlm.training import build


def rows_that_fit(settings: Settings, vocabulary: int) -> Settings:
    """Settings of an evaluation with as many rows in a forward pass as the budget has room for, at most those asked for.

    Raises:
        UserError: one row for each data-parallel rank is too much.
    """
    config, plan = settings.config, settings.plan
    device = devices.of_config(config.device).share(plan.world)
    unit = plan.data_parallel_size * plan.accumulate_grad_batches
    rows = config.global_batch // unit
    ends = {0, plan.world - 1}  # of a pipeline the last has the head
    choice = Choice.of(settings)
    while (need := max(_total(_evaluation(settings, vocabulary, device, r), choice, device) for r in ends)) > device.memory:
        if rows == 1:
            raise UserError(_too_much("evaluate with one row", need, device.memory, "strategy=fsdp devices=2"))
        rows //= 2
        settings = replace(settings, config=replace(config, global_batch=rows * unit))
    return settings


def check_generation(config: Config, plan: Plan, vocabulary: int, prompt: int, tokens: int, rows: int = 1) -> None:
    """Raise UserError if going on from so many tokens of a prompt, of `rows` prompts at once, needs more than the budget."""
    device = devices.of_config(config.device)
    trace = Trace(vocabulary, card=device.card)
    with fake_world.everything(trace, plan, 0):
        parallel = build.parallel_model(replace(config, device={"accelerator": "cpu"}), plan, vocabulary)
        trace.own = malloc.own_pages(parallel.parameters)
        trace.mark("weights", parallel.net.parameters())
        longest = min(prompt + tokens, parallel.net.sequence)  # a context that is full, and the prompt at once
        for first, more in ((prompt, 1), (max(prompt, longest - 2), 2)):
            prompts = [[0] * min(first, longest)] * rows
            list(generate_rows(parallel.net.eval(), prompts, more, 0, 0, 1, [0] * rows, ()))
    need = _total(trace, Choice(**plan.asdict(), precision=config.precision), device)
    if need > device.memory:
        raise UserError(_too_much("generate", need, device.memory, "a shorter prompt" + ", or fewer rows" * (rows > 1)))


def _evaluation(settings: Settings, vocabulary: int, device: devices.Device, rank: int = 0) -> Trace:
    """Two forward passes of a rank as validation makes them."""
    config, plan = replace(settings.config, device={"accelerator": "cpu"}), replace(settings.plan, compile=False)
    settings = replace(settings, config=config, plan=plan)
    trace = Trace(vocabulary, copies=device.card is None, card=device.card)
    rows = plan.micro_batch(config.global_batch) if plan.pipeline == 1 else config.global_batch // plan.data_parallel_size

    with fake_world.everything(trace, plan, rank):
        parallel = build.parallel_model(config, plan, vocabulary)
        trace.own = malloc.own_pages(parallel.parameters)
        trace.mark("weights", parallel.net.parameters())
        module = build.module(settings, parallel, training=False)
        trainer = build.trainer(settings, [], [])
        with contextlib.redirect_stdout(None), replaced(no_moves(module)):
            trainer.validate(module, fake_world.Batches(config.sequence, rows, [(rows, 0, 0), (rows, 1, 0)]), verbose=False)
    return trace


def _total(trace: Trace, plan: Choice, device: devices.Device) -> int:
    largest = max(peaks(trace).values(), key=lambda parts: sum(parts.values()))
    reserved = allocator.reserved(trace.events) if device.card else 0
    return sum(with_overhead(largest, heap_of(trace), plan, device, False, reserved).values())


def _too_much(what: str, need: int, memory: int, instead: str) -> str:
    return f"{what} needs {mib(need)}, device.memory allows {mib(memory)}: write more, or {instead}"
