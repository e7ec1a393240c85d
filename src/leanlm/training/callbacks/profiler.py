"""What the operations of a few steps cost."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.profiler import ProfilerActivity, profile, schedule

from leanlm.launch.ranks import rank, say


class Profiler(pl.Callback):
    """Writes `profile/rank-N.json`, a Chrome trace (chrome://tracing, ui.perfetto.dev), and `profile/operations.txt`, the
    operations that took longest by themselves, to the run's folder.

    Args:
        skip: steps before the first that is looked at.
        steps: that are looked at.
        rows: operations in the table.
    """

    def __init__(self, skip: int = 5, steps: int = 3, rows: int = 15) -> None:
        self.skip, self.steps, self.rows = skip, steps, rows

    @classmethod
    def problems(cls, max_steps: int, skip: int = 5, steps: int = 3, **_: Any) -> list[str]:
        needed = skip + 1 + steps
        found = [f"skip={skip}, steps={steps}: at least 0 and 1"] if skip < 0 or steps < 1 else []
        more = f"skip={skip} + 1 + steps={steps} = {needed} steps, but max_steps={max_steps}: write max_steps={needed} or more"
        return found or ([more] if needed > max_steps else [])

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.folder = Path(trainer.default_root_dir, "profile")
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        plan = schedule(wait=self.skip, warmup=1, active=self.steps, repeat=1)
        self.profile = profile(activities=kinds, schedule=plan, on_trace_ready=self.write)
        self.profile.start()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch.micro == module.plan.batches_per_step - 1:
            self.profile.step()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.profile.stop()

    on_exception = on_train_end

    def write(self, found: profile) -> None:
        self.folder.mkdir(exist_ok=True)
        found.export_chrome_trace(str(self.folder / f"rank-{rank()}.json"))
        by = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = found.key_averages().table(sort_by=by, row_limit=self.rows, max_name_column_width=40)
        if rank() == 0:
            (self.folder / "operations.txt").write_text(table)
        events = [event for event in found.key_averages() if not event.key.startswith("ProfilerStep")]
        costliest = sorted(events, key=lambda event: -getattr(event, by))[: self.rows]
        total = sum(getattr(event, by) for event in events)
        say(f"\n{'ms a step':>10} {'share':>6} {'calls':>6}  operation, of {self.steps} steps; more in {self.folder}")
        for event in costliest:
            spent = getattr(event, by)
            say(f"{spent / 1e3 / self.steps:>10.2f} {spent / total:>6.1%} {event.count // self.steps:>6}  {event.key[:50]}")
