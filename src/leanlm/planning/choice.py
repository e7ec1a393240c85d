"""What the planner chooses: a plan and, where `allow` says so, what changes the curve."""

from dataclasses import dataclass, replace

from leanlm.config.schema import Settings, exactness
from leanlm.strategies.plan import Plan


@dataclass(frozen=True)
class Choice(Plan):
    """A plan, with the number types of a run and how its optimizer keeps its state."""

    precision: str = "fp32"
    state: str = "fp32"
    changed: tuple[str, ...] = ()  # overrides that write what is not as it was asked for

    @classmethod
    def of(cls, settings: Settings) -> "Choice":
        if isinstance(settings.plan, Choice):
            return settings.plan
        return cls(**settings.plan.asdict(), precision=settings.config.precision, state=settings.config.optim.state)

    def settings(self, settings: Settings) -> Settings:
        """Of a run with this choice."""
        optim = replace(settings.config.optim, state=self.state)
        config = replace(settings.config, precision=self.precision, optim=optim)
        return replace(settings, plan=Plan(**self.asdict()), config=config)

    @property
    def exactness(self) -> str:
        return exactness(self, self.precision, self.state)
