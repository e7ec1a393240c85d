"""One training run on one rank: build, resume, train, validate, sample, report."""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from leanlm import __version__, build, utilization
from leanlm.callbacks.checkpoints import Checkpoints
from leanlm.callbacks.plots import loss_curve
from leanlm.callbacks.progress import Progress
from leanlm.callbacks.record import Record, memory_now, of_ranks, peak_memory
from leanlm.config import Settings
from leanlm.data.prefetch import prefetched
from leanlm.data.tokenizer import Tokenizer, stream
from leanlm.data.tokens import Tokens
from leanlm.errors import UserError
from leanlm.generate import generate, generate_cut
from leanlm.launch import rank, say
from leanlm.precision import gpu_has_bf16
from leanlm.prepare import tokens as prepare
from leanlm.runs import Run, write
from leanlm.strategies.checkpoint import newest_whole
from leanlm.strategies.cut import Cut


def fit(settings: Settings, config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Train as configured in the folder `path` and return what `result.json` holds. All ranks must call it."""
    asked = settings.config
    run = Run(_agreed(path))
    tokens = _on_rank_0_first(lambda: prepare(settings))
    start = _where_to_start(settings, tokens)
    if rank() == 0:
        if start and start.parent.parent.resolve() != run.path.resolve():  # goes on in a folder of its own
            run.path.mkdir(parents=True, exist_ok=True)
            shutil.copy(start.parent.parent / run.metrics.name, run.metrics)
        run.create(OmegaConf.create({**config, "resume": None, "run_dir": None}))
        write(run.path / "tokenizer.json", json.dumps(tokens.tokenizer.state()))
    before = of_ranks(memory_now())
    cut = build.cut(asked, settings.plan, tokens.tokenizer.vocabulary)
    net, module = cut.net, build.module(settings, cut)
    parameters = cut.parameters
    batches = build.training_batches(settings, tokens, net)
    batches.first_step = json.loads((start / "state.json").read_text())["step"] if start else 0
    say(
        f"{type(net).__name__}, {parameters:,} parameters, {len(tokens.splits['train']):,} training tokens of "
        f"{tokens.tokenizer.vocabulary:,} types\nplan: {settings.describe()}; global batch {asked.global_batch} x "
        f"{asked.sequence} tokens, {asked.max_steps:,} steps, in {run.path}"
    )
    if module.pipeline is not None:
        say(module.pipeline.describe())
    full_speed = None
    if cut.device.type == "cuda":
        card = torch.cuda.get_device_name(cut.device)
        full_speed = utilization.full_speed(settings, tokens.tokenizer.vocabulary, card)
        if asked.precision == "fp32" and gpu_has_bf16():
            say(utilization.instead_of_fp32(card))
    record = Record(run, asked.log_every, full_speed)
    callbacks: list[pl.Callback] = [record] + ([Progress(record)] if rank() == 0 else [])
    callbacks += [
        Checkpoints(
            run,
            record,
            asked.checkpoint_every,
            asked.val_every,
            asked.keep_checkpoints,
            asked.global_batch,
            tokens.fingerprint,
            start,
        )
    ]
    loggers = build.loggers(asked, str(run.path))
    trainer = build.trainer(settings, callbacks, loggers, asked.max_steps)
    validation = build.whole_split(settings, tokens.tokenizer, net, tokens.splits["validation"])
    with closing(prefetched(batches, cut.device)) as ahead:
        trainer.fit(module, ahead, validation)

    nats, split = record.val_loss, "validation"
    result = {
        "loss": nats,
        "perplexity": math.exp(min(nats, 700)),
        "bits_per_byte": nats * len(tokens.splits[split]) / tokens.bytes[split] / math.log(2),
        "steps": trainer.global_step,
        "tokens": record.tokens,
        "tokens_per_second": record.tokens / record.seconds,
        "mfu": None if full_speed is None else record.tokens / record.seconds / full_speed,
        "peak_memory_bytes": of_ranks(peak_memory()),
        "memory_before_bytes": before,
        "held_bytes": of_ranks(module.held_bytes(trainer.optimizers[0])),
        "seconds": record.seconds,
        "plan": settings.plan.asdict(),
        "exactness": settings.exactness,
        "precision": asked.precision,
        "parameters": parameters,
        "versions": {"leanlm": __version__, "torch": torch.__version__, "lightning": lightning.__version__},
    }
    if settings.predicted is not None:
        result["predicted_peak_memory_bytes"] = settings.predicted["peak_memory_bytes"]
        result["predicted_seconds_per_step"] = settings.predicted["seconds_per_step"]
    if cut.device.type == "cuda":
        result["peak_allocated_bytes"] = of_ranks(torch.cuda.max_memory_allocated())
    if rank() == 0:
        loss_curve({"": run}, run.path / "loss.png")
        write(run.result, json.dumps(result, indent=2))
    sample = None
    if rank() == 0 or settings.plan.cuts_model:
        sample = _sample(cut, tokens.tokenizer, asked.sample, asked.sample_tokens)
    if rank() == 0:
        if sample is not None:
            with open(run.path / "samples.txt", "a") as file:
                file.write(f"--- step {trainer.global_step}\n{sample}\n")
        _report(result, sample, run)
    return result


def _agreed(path: Path) -> Path:
    """Rank 0's path: under torchrun each rank has made up its own."""
    if not dist.is_initialized():
        return path
    paths = [path]
    dist.broadcast_object_list(paths)
    return paths[0]


def _on_rank_0_first(make: Any) -> Any:
    made = make() if rank() == 0 else None
    if dist.is_initialized():
        dist.barrier()
    return made or make()


def _where_to_start(settings: Settings, tokens: Tokens) -> Path | None:
    """The checkpoint to resume from, None to begin at step 0."""
    if not settings.config.resume:
        return None
    run = Run(settings.config.resume)
    start, damaged = newest_whole(run.checkpoints)
    for line in damaged:
        say(f"{line}; " + (f"using {start.name}, the one before it" if start else "there is none before it"))
    if start is None and damaged:
        raise UserError(f"{run.path} has no whole checkpoint to resume from; start a new run")
    if start is None:
        say(f"{run.path} has no checkpoint yet: beginning at step 0")
        return None
    state = json.loads((start / "state.json").read_text())
    if state["text"] != tokens.fingerprint:
        raise UserError(f"the text or its tokens are not those that {run.path} was trained on; set data.path to the same text")
    if state["step"] >= settings.config.max_steps:
        raise UserError(f"{run.path} has done its {state['step']} steps; to go on write max_steps={state['step'] * 2}, say")
    say(f"resuming after step {state['step']}")
    return start


def _sample(cut: Cut, tokenizer: Tokenizer, prompt: str, tokens: int) -> str | None:
    """Text that the model writes; None if that fails. All ranks must call it when the model is spread over them."""
    try:
        begin = [tokenizer.start, *map(int, tokenizer.encode(prompt.encode()))]
    except UserError:  # the prompt has characters that this text does not
        begin, prompt = [tokenizer.start], ""
    try:
        return prompt + "".join(stream(tokenizer, _write(cut, begin, tokens)))
    except Exception as error:  # whatever it is, the run has done its work
        say(f"no sample could be made: {type(error).__name__}: {error}".splitlines()[0])
        return None


def _write(cut: Cut, begin: list[int], tokens: int) -> Iterator[int]:
    cut.net.eval()
    if not cut.plan.cuts_model:
        return generate(cut.net, begin, tokens, temperature=0.8)
    for stage in cut.stages.values():
        stage.eval()
    return generate_cut(cut, begin, tokens, temperature=0.8)


def _report(result: dict[str, Any], sample: str | None, run: Run) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    peak = ", ".join(f"{peak / 2**20:,.0f} MiB" for peak in result["peak_memory_bytes"])
    if "predicted_peak_memory_bytes" in result:
        peak += ", predicted " + ", ".join(f"{size / 2**20:,.0f} MiB" for size in result["predicted_peak_memory_bytes"])
    for name, value in (
        ("validation loss", f"{result['loss']:.4f} nats per token"),
        ("perplexity", f"{result['perplexity']:.2f}"),
        ("bits per byte", f"{result['bits_per_byte']:.3f}"),
        ("speed", f"{result['tokens_per_second']:,.0f} tokens/s, {result['seconds']:.0f} s of training"),
        ("peak memory", peak),
        ("parameters", f"{result['parameters']:,}"),
        ("run", str(run.path)),
    ):
        table.add_row(f"[bold]{name}", value)
    console = Console(highlight=False)
    if sample is not None:
        console.rule("a sample")
        console.print(sample, markup=False, soft_wrap=True)
        console.rule()
    console.print(table)
