"""Step time of `strategy=fsdp` beside Lightning's own ModelParallelStrategy with the same model, batch and optimizer.

python scripts/lightning_fsdp2.py [--rounds 3] [--steps 12]

Two processes each, in turn; Lightning's side is its documented recipe: `fully_shard` of each block and of the whole in
`configure_model`, fused AdamW, `gradient_clip_val`.
"""

import argparse
import statistics
import time
from typing import Any

from measure import composed
from strategies import COMMON, SIZES

# Lightning keeps freed memory, too.
OVERRIDES = [*COMMON, *SIZES["transformer"], "strategy=fsdp", "devices=2", "strategy.return_freed_memory=false"]


def clock() -> Any:
    import lightning.pytorch as pl

    class Clock(pl.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            now = time.perf_counter()
            self.times = [*getattr(self, "times", []), now]

    return Clock()


def ours(steps: int) -> tuple[float, list[float]]:
    from leanlm.config.checks import check
    from leanlm.launch.ranks import process_group
    from leanlm.training import build
    from leanlm.training.data import tokens, training_batches

    settings = check(composed(OVERRIDES))
    with process_group("cpu"):
        prepared = tokens(settings)
        parallel = build.parallel_model(settings.config, settings.plan, prepared.tokenizer.vocabulary)
        module, watch, losses = build.module(settings, parallel), clock(), []

        class Losses(type(watch)):
            def on_train_batch_end(self, trainer, module, *args: Any) -> None:
                losses.append(module.step_nats)

        trainer = build.trainer(settings, [watch, Losses()], [], steps)
        trainer.fit(module, training_batches(settings, prepared, parallel.net))
        return median(watch.times), [float(total(loss)) for loss in losses]


def theirs(steps: int) -> tuple[float, list[float]]:
    import lightning.pytorch as pl
    import torch
    import torch.nn.functional as F
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    from leanlm.config.checks import check
    from leanlm.launch.ranks import process_group
    from leanlm.models.contract import initialize
    from leanlm.optimizers import settings as optim
    from leanlm.training import build
    from leanlm.training.data import tokens, training_batches

    settings = check(composed(OVERRIDES))
    config, plan, losses = settings.config, settings.plan, []

    class Example(pl.LightningModule):
        def configure_model(self) -> None:
            if hasattr(self, "net"):
                return
            self.net = build.model(config, plan, prepared.tokenizer.vocabulary)
            initialize(self.net, config.seed)
            mesh = self.device_mesh["data_parallel"]
            for block in self.net.blocks.values():
                fully_shard(block, mesh=mesh)
            fully_shard(self.net, mesh=mesh)

        def training_step(self, batch, index: int):
            logits, _ = self.net(batch.input)
            loss = F.cross_entropy(logits.flatten(0, 1), batch.target.flatten())
            losses.append(loss.detach() / 2)
            return loss

        def configure_optimizers(self):
            asked = config.optim
            matrices = [p for p in self.net.parameters() if p.dim() > 1]
            return torch.optim.AdamW(
                matrices, lr=asked.lr, betas=tuple(asked.betas), eps=asked.eps, weight_decay=asked.weight_decay, fused=True
            )

        def optimizer_step(self, epoch, batch_idx, optimizer, closure=None):
            for group in optimizer.param_groups:
                group["lr"] = config.optim.lr * optim.factor(config.optim, self.trainer.global_step, config.max_steps)
            super().optimizer_step(epoch, batch_idx, optimizer, closure)

    with process_group("cpu"):
        prepared = tokens(settings)
        net = build.model(config, plan, prepared.tokenizer.vocabulary)
        watch = clock()
        trainer = pl.Trainer(
            accelerator="cpu", devices=2, strategy=ModelParallelStrategy(2, 1), max_steps=steps, callbacks=[watch],
            gradient_clip_val=config.clip, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, use_distributed_sampler=False,
        )  # fmt: skip
        trainer.fit(Example(), training_batches(settings, prepared, net))
        return median(watch.times), [float(total(loss)) for loss in losses]


def median(times: list[float]) -> float:
    return 1000 * statistics.median([b - a for a, b in zip(times, times[1:], strict=False)][2:])


def total(loss: Any) -> Any:
    import torch.distributed as dist

    dist.all_reduce(loss)
    return loss


def main() -> None:
    from leanlm.config.checks import check
    from leanlm.launch.processes import launch
    from leanlm.training.data import tokens

    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    asked = parser.parse_args()
    tokens(check(composed(OVERRIDES)))
    ratios = []
    for number in range(asked.rounds):
        (mine, curve), (other, reference) = (launch(one, (asked.steps,), 2) for one in (ours, theirs))
        ratios.append(mine / other)
        apart = max(abs(a - b) for a, b in zip(curve, reference, strict=True))
        print(f"round {number}: leanlm {mine:.0f} ms, Lightning {other:.0f} ms, ratio {mine / other:.3f}; "
              f"{len(curve)} losses differ by at most {apart:.1e}", flush=True)  # fmt: skip
    print(f"median ratio {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
