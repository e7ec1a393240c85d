"""Under precision=bf16-stochastic copies of a weight stay one, and a resumed run goes on as it would have."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import composed
from reference import overrides
from runner import final_weights, run_all

from leanlm.config.checks import check
from leanlm.launch.ranks import of_ranks

LIKE = ["precision=bf16-stochastic", "optim.schedule=constant", "optim.lr=0.003", "log_every=100", "val_every=100"]


class SameBits(pl.Callback):
    """Ends a run in which a weight that several ranks hold is not the same on all of them."""

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        mine = [(name, weight.detach().view(torch.int16).tolist()) for name, weight in module.parallel.named_parameters()]
        found: dict[str, list[Any]] = {}
        for name, bits in (pair for pairs in of_ranks(mine) for pair in pairs):
            found.setdefault(name, []).append(bits)
        several = {name: bits for name, bits in found.items() if len(bits) > 1}
        assert several or len(of_ranks(0)) == 1, "some weight has copies"
        assert [name for name, bits in several.items() if any(other != bits[0] for other in bits)] == []


def asked(model: str, text: Path, plan: dict, steps: int) -> list[str]:
    return [*overrides(model, text, plan), *LIKE, f"max_steps={steps}"]


@pytest.mark.timeout(420)
def test_copies_of_a_weight_keep_the_same_bits(text: Path, tmp_path: Path) -> None:
    """Of weights tied over a pipeline whose ends differ, and of a run that one process began."""
    watched, ddp = "+callbacks.same._target_=test_rounding.SameBits", ["strategy.replicate=2", "max_steps=6"]
    run_all({tmp_path / name: [*asked("muon", text, {}, 2), watched] for name in ("ddp", "zero1")})
    tied = asked("muon", text, {"pipeline": 2, "accumulate_grad_batches": 2}, 6)
    jobs = {
        tmp_path / "tied": [*tied, watched, "model.depth=3"],
        tmp_path / "ddp": [f"resume={tmp_path / 'ddp'}", *ddp],
        tmp_path / "zero1": [f"resume={tmp_path / 'zero1'}", *ddp, "strategy.zero1=true"],
    }
    run_all(jobs, 2)


@pytest.mark.timeout(420)
def test_a_resumed_run_is_rounded_as_it_would_have_been(text: Path, tmp_path: Path) -> None:
    run_all({tmp_path / "whole": asked("muon", text, {}, 6), tmp_path / "parts": asked("muon", text, {}, 3)})
    torch.manual_seed(5)
    run_all({tmp_path / "parts": [f"resume={tmp_path / 'parts'}", "max_steps=6"]})
    settings = check(composed(*asked("muon", text, {}, 6)))
    ours, theirs = (final_weights(tmp_path / name, settings) for name in ("parts", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
