"""How much of what a card can multiply a run uses (model FLOPs utilization, Chowdhery et al. 2022)."""

from leanlm.common.errors import UserError
from leanlm.config.device_sheets import sheet
from leanlm.config.schema import Settings
from leanlm.models.contract import without_storage
from leanlm.strategies import balance
from leanlm.training import build


def operations_per_token(settings: Settings, vocabulary: int) -> float:
    """Floating-point operations of matrix products and attention for one token of a training step: backward takes twice what
    forward does, of which those for gradients of weights are only needed where they are trained; what is computed again is not
    counted."""
    with without_storage():
        net = build.model(settings.config, settings.plan, vocabulary)
    trained = sum(each.numel() for each in net.parameters() if each.requires_grad)
    share = trained / sum(each.numel() for each in net.parameters())
    return (2 + share) * sum(balance.costs(net).values()) / settings.config.sequence


def full_speed(settings: Settings, vocabulary: int, card: str | None) -> float | None:
    """Tokens/s at which all devices of a run would multiply all the time; None: it is a CPU, or has no data sheet. `card`: name
    of the GPU, as torch has it; None: a CPU."""
    if card is None or (flops := _rates(card)) is None:
        return None
    kind = {"fp32": "float32", "fp64": "float64"}.get(settings.config.precision, "bfloat16")
    return flops[kind] * settings.plan.world / operations_per_token(settings, vocabulary)


def instead_of_fp32(card: str) -> str:
    """What bf16 or TF32 would bring on a card that has both, in one line."""
    flops = _rates(card)
    if flops is None:
        gain = "products several times as fast, and half the bytes of activations"
    else:  # of TF32 a card does half as many
        fast, slow = flops["bfloat16"] / 1e12, flops["float32"] / 1e12
        gain = f"products at up to {fast:,.0f} instead of {slow:,.0f} teraflop/s (TF32: about {fast / 2:,.0f})"
    return f"precision=fp32: bf16-mixed would bring {gain}; TF32 is TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 in the environment"


def _rates(card: str) -> dict[str, float] | None:
    """Floating-point operations per second by number type, of a card's data sheet; None: it has none."""
    try:
        return sheet(card)["flops"]
    except UserError:
        return None
