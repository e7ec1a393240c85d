"""Checks of `conf/objective`: what is predicted, and by which models it can be."""

from contextlib import suppress

from leanlm.common.errors import UserError
from leanlm.common.files import defaults
from leanlm.config.arguments import argument_problems, made, target
from leanlm.config.schema import Config


def objective_problems(config: Config) -> list[str]:
    """What cannot work about the objective of a run (null: causal), one line each. One that hides tokens makes the model read
    in both directions."""
    config.objective = config.objective or defaults("objective/causal.yaml")
    if problems := argument_problems("objective", config.objective, set(), {"_target_"}):
        return problems
    objective = made("objective", config.objective)
    found = [f"objective.{problem}" for problem in objective.problems()]
    with suppress(UserError):  # of a model that is none, others tell
        kind = target("model", config.model)
        if not objective.causal and "causal" in kind.given({}):
            config.model = {**config.model, "causal": False}
        causal = config.model.get("causal", kind.causal)
        if causal and not objective.causal:
            found.append(f"objective=masked: {kind.__name__} reads a text in one direction, and would not see what follows a "
                         "masked token; take a Transformer, such as model=small")  # fmt: skip
        elif objective.causal and not causal:
            found.append("objective=causal: with model.causal=false each token would see the one that it is to predict; write "
                         "objective=masked")  # fmt: skip
    return found
