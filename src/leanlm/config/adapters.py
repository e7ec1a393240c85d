"""Checks of `conf/adapter`: what is trained beside the weights of `init_from`."""

from leanlm.common.run_folder import Run
from leanlm.config.arguments import argument_problems, made
from leanlm.config.of_model import MANY, model_without_storage
from leanlm.config.pretrained import is_run
from leanlm.config.schema import Config
from leanlm.strategies.plan import Plan


def adapter_problems(config: Config, plan: Plan) -> list[str]:
    """What cannot work about the adapter of a run, one line each."""
    if config.init_from and is_run(config.init_from) and Run(config.init_from).config().get("adapter"):
        return [f"init_from={config.init_from}: it holds an adapter alone; python -m leanlm.export merges it into its weights"]
    if not config.adapter:
        return []
    if problems := argument_problems("adapter", config.adapter, set(), {"_target_"}):
        return problems
    found = [] if config.init_from else ["adapter: it is trained beside a model's weights: name them, init_from=FOLDER"]
    adapter, net = made("adapter", config.adapter), model_without_storage(config.model, MANY, config.sequence)
    found += adapter.problems(net)
    blocks = {name.split(".")[1] for name, _ in adapter.chosen(net)}
    if not found and plan.pipeline > 1 and (without := [name for name in net.blocks if name not in blocks]):
        found.append(f"adapter.targets: a stage of strategy.pipeline={plan.pipeline} could have nothing to train, since they "
                     f"leave out blocks {', '.join(without)}: name layers of each block")  # fmt: skip
    return found
