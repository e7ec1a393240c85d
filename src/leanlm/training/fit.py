"""One training run on one rank: the folder, the text, the model as the plan cuts it, the step, the trainer; then the result."""

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import torch

from leanlm import __version__
from leanlm.common.errors import UserError
from leanlm.common.files import write
from leanlm.common.machine import memory_now, peak_memory
from leanlm.common.precision import gpu_has_bf16
from leanlm.common.run_folder import Run
from leanlm.config.pretrained import is_run
from leanlm.config.schema import Settings
from leanlm.data.decoding import stream
from leanlm.data.mixture import rows_of, turns
from leanlm.data.prefetch import prefetched
from leanlm.data.tokenizer import Tokenizer
from leanlm.data.tokens import Tokens
from leanlm.launch.ranks import comfort, of_ranks, on_rank_0, on_rank_0_first, rank, say
from leanlm.models.generation import LogitsAfter, generate
from leanlm.models.pretrained import Weights
from leanlm.reporting.pictures import loss_curve
from leanlm.reporting.summary import summary
from leanlm.strategies import relay
from leanlm.strategies.parallel_model import ParallelModel
from leanlm.training import build, data, utilization
from leanlm.training.base import base_of, check_base
from leanlm.training.callbacks.checkpoints import Checkpoints
from leanlm.training.callbacks.progress import Progress
from leanlm.training.callbacks.record import Record
from leanlm.training.checkpoint import newest_whole, state_of
from leanlm.training.lightning_module import LanguageModel, measures


def fit(settings: Settings, path: Path) -> dict[str, Any]:
    """Train as configured in the folder `path` and return what `result.json` holds. All ranks must call it."""
    asked = settings.config
    run = Run(on_rank_0(lambda: path))  # Under torchrun each rank has made up its own.
    tokens = on_rank_0_first(lambda: data.tokens(settings))
    base = base_of(asked)
    start = checkpoint_to_start_from(settings, tokens, base)
    if rank() == 0:
        make_folder(run, settings.as_run(), tokens, start)
    before = of_ranks(memory_now())

    source = asked.init_from if start is None or asked.adapter else None
    parallel = build.parallel_model(asked, settings.plan, tokens.tokenizer.vocabulary, source)
    module = build.module(settings, parallel)
    announce(settings, tokens, module, run)
    if source and not is_run(source) and Weights(Path(source)).without_head:
        say(f"{source} has no head for masked tokens: it is drawn anew")

    card = torch.cuda.get_device_name(parallel.device) if parallel.device.type == "cuda" else None
    full_speed = utilization.full_speed(settings, tokens.tokenizer.vocabulary, card)
    record = Record(run, asked.log_every, full_speed, settings.corpus.sources)
    checkpoints = Checkpoints(run, record, asked, tokens.fingerprint, start, base)
    callbacks = [record, *([Progress(record)] if rank() == 0 else []), *build.callbacks(asked), checkpoints]
    first_step = state_of(start)["step"] if start else 0
    loggers = build.loggers(asked, run.path, first_step)
    trainer = build.trainer(settings, callbacks, loggers, asked.max_steps, run.path)
    batches = data.training_batches(settings, tokens, parallel.net, first_step)
    validation = data.whole_split(settings, tokens.tokenizer, parallel.net, tokens.splits["validation"])
    with closing(prefetched(batches, parallel.device)) as ahead:
        trainer.fit(module, ahead, validation)

    result = result_of(settings, tokens, module, trainer, record) | {"memory_before_bytes": before}
    if rank() == 0:
        write(run.result, json.dumps(result, indent=2))
        with comfort("the picture"):
            loss_curve({"": run}, run.path / "loss.png")
    writes = parallel.net.causal and (rank() == 0 or settings.plan.splits_model)
    sample = sample_of(parallel, tokens.tokenizer, asked.sample, asked.sample_tokens) if writes else None
    if rank() == 0:
        if sample is not None:
            with comfort("samples.txt"), open(run.path / "samples.txt", "a") as file:
                file.write(f"--- step {trainer.global_step}\n{sample}\n")
        summary(result, sample, run)
    return result


def checkpoint_to_start_from(settings: Settings, tokens: Tokens, base: str | None = None) -> Path | None:
    """The checkpoint to resume from, None to begin at step 0.

    Raises:
        UserError: all are damaged, it is of another text or stands on other weights, or the run has done its steps.
    """
    if not settings.config.resume:
        return None
    run = Run(settings.config.resume)
    start = newest_whole(run.checkpoints)
    if start is None:
        say(f"{run.path} has no checkpoint yet: beginning at step 0")
        return None
    state = state_of(start)
    if state["text"] != tokens.fingerprint:
        raise UserError(f"the text or its tokens are not those that {run.path} was trained on; set data.path to the same text")
    check_base(run, state, base)
    ended = run.result.is_file() and run.results()["steps"] >= state["step"]  # else it was killed after its last checkpoint
    if state["step"] + ended > settings.config.max_steps:
        raise UserError(f"{run.path} has done its {state['step']} steps; to go on write max_steps={state['step'] * 2}, say")
    say(f"resuming after step {state['step']}")
    return start


def make_folder(run: Run, config: dict[str, Any], tokens: Tokens, start: Path | None) -> None:
    """The folder of a run with its configuration, its tokenizer and, if it goes on from another, the rows of that."""
    run.create({**config, "resume": None, "run_dir": None})
    if start and start.parent.parent.resolve() != run.path.resolve():
        shutil.copy(start.parent.parent / run.metrics.name, run.metrics)
    write(run.path / "tokenizer.json", json.dumps(tokens.tokenizer.state()))


def announce(settings: Settings, tokens: Tokens, module: LanguageModel, run: Run) -> None:
    """Say what is going to be trained, on what, and how."""
    asked = settings.config
    say(
        f"text: {tokens.describe(settings.corpus)}\n{parameters_of(module)}\n"
        f"plan: {settings.describe()}; global batch {asked.global_batch} x {asked.sequence} tokens, {asked.max_steps:,} steps, "
        f"in {run.path}"
    )
    if module.pipeline is not None:
        say(module.pipeline.describe())
    if module.parallel.device.type == "cuda" and asked.precision == "fp32" and gpu_has_bf16():
        say(utilization.instead_of_fp32(torch.cuda.get_device_name(module.parallel.device)))


def parameters_of(module: LanguageModel) -> str:
    """How many a model has, and how many of them are trained if it is not all."""
    trained, count = module.parallel.trained, module.parallel.parameters
    part = "" if trained == count else f", of which {trained:,} are trained"
    return f"{type(module.net).__name__}, {count:,} parameters{part}"


def result_of(settings: Settings, tokens: Tokens, module: LanguageModel, trainer: pl.Trainer, record: Record) -> dict[str, Any]:
    """What `result.json` holds. All ranks must call it."""
    speed = record.tokens / record.seconds
    result = {
        **measures(record.val_loss, len(tokens.splits["validation"]), tokens.bytes["validation"], record.val_accuracy),
        "steps": trainer.global_step,
        "tokens": record.tokens,
        "tokens_per_second": speed,
        "mfu": None if record.full_speed is None else speed / record.full_speed,
        "peak_memory_bytes": of_ranks(peak_memory()),
        "held_bytes": of_ranks(module.held_bytes(trainer.optimizers[0])),
        "seconds": record.seconds,
        "plan": settings.plan.asdict(),
        "exactness": settings.exactness,
        "precision": settings.config.precision,
        "parameters": module.parallel.parameters,
        "trained_parameters": module.parallel.trained,
        "versions": {"leanlm": __version__, "torch": torch.__version__, "lightning": lightning.__version__},
    }
    if settings.corpus.sources:
        result["sources"] = shares(settings, record, trainer.global_step)
    if settings.predicted is not None:
        result["predicted_peak_memory_bytes"] = settings.predicted["peak_memory_bytes"]
        result["predicted_seconds_per_step"] = settings.predicted["seconds_per_step"]
    if module.parallel.device.type == "cuda":
        result["peak_allocated_bytes"] = of_ranks(torch.cuda.max_memory_allocated())
    return result


def shares(settings: Settings, record: Record, steps: int) -> dict[str, dict[str, float]]:
    """Of each source of a mixture: the fraction of the rows that is its due, what it has had so far of rows and of counted
    tokens, and its validation loss."""
    corpus, all_rows = settings.corpus, steps * settings.config.global_batch
    rows = rows_of(turns(corpus.shares), all_rows).tolist()
    found = zip(corpus.sources, corpus.shares, rows, record.source_tokens, record.source_losses, strict=True)
    return {
        name: {
            "fraction": share / sum(corpus.shares),
            "rows": mine,
            "share_of_rows": mine / all_rows,
            "tokens": tokens,
            "share_of_tokens": tokens / record.tokens,
            "loss": loss,
        }
        for name, share, mine, tokens, loss in found
    }


def sample_of(parallel: ParallelModel, tokenizer: Tokenizer, prompt: str, tokens: int) -> str | None:
    """Text that the model writes; None if that fails. All ranks must call it when it is divided over them."""
    try:
        begin = [tokenizer.start, *map(int, tokenizer.encode(prompt.encode()))]
    except UserError:  # the prompt has characters that this text does not
        begin, prompt = [tokenizer.start], ""
    parallel.net.eval()
    with comfort("the sample"):
        logits_after = relay.logits_after(parallel) if parallel.plan.splits_model else LogitsAfter(parallel.net)
        return prompt + "".join(stream(tokenizer, generate(logits_after, begin, tokens, temperature=0.8)))
    return None
