"""Every name that a simulation replaces is still there, in the release of torch and Lightning at hand."""

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from leanlm.planning.simulation import patches, repetitions
from leanlm.planning.simulation.compiled import compiler_of
from leanlm.planning.simulation.patches import Patch, replaced
from leanlm.planning.simulation.trace import Trace


def groups() -> dict[str, list[Patch]]:
    trace, card = Trace(7), SimpleNamespace(total=0, memory=1 << 34)
    strategy = SingleDeviceStrategy(torch.device("cpu"))
    return {
        "meshes": patches.meshes_with_numbers(),
        "resizing": patches.resizing(trace.resized),
        "sending": patches.sending(),
        "moves": patches.no_moves(pl.LightningModule()),
        "strategy": patches.of_strategy(strategy, nn.Identity()),
        "kernels": patches.kernels_of_a_gpu(card, trace.to_host),
        "pieces": repetitions.few_pieces(trace),
        "tensors": repetitions.alike_tensors(trace),
        "compiler": [compiler_of(trace)],
    }


@pytest.mark.parametrize("group", groups())
def test_names_are_there_and_as_they_were_afterwards(group: str) -> None:
    for place, name, value in groups()[group]:
        before = getattr(place, name)
        with replaced([(place, name, value)]):
            assert getattr(place, name) is value or getattr(place, name).__func__ is value
        assert getattr(place, name) == before


def test_what_a_compiler_is_told() -> None:
    with patches.as_a_compiler():
        assert torch.compiler.is_compiling()
    assert not torch.compiler.is_compiling()


def test_a_name_that_is_gone_is_an_error() -> None:
    with pytest.raises(AttributeError, match="alloc_storage_"), replaced([(torch, "alloc_storage_", None)]):
        pass


def test_all_that_autocast_widens_is_known_to_torch() -> None:
    """Of what a GPU computes in float32: a name that torch has nowhere any more would be passed over."""
    replaced_names = {name for _, name, _ in groups()["kernels"]}
    assert replaced_names >= patches.WIDE
