"""Loss and perplexity of a trained model: `python -m leanlm.evaluate run=runs/X [split=test] [text="a sentence"]`."""

from leanlm.config import command_line
from leanlm.config.schema import Settings
from leanlm.inference.evaluation import Evaluate, evaluate
from leanlm.launch.ranks import say


def job(asked: Evaluate) -> None:
    result = evaluate(asked, within_memory)
    last = f"accuracy {result['accuracy']:.2%}" if "accuracy" in result else f"{result['bits_per_byte']:.3f} bits per byte"
    what = f"the {asked.split} split" if asked.text is None else repr(asked.text)
    say(
        f"{what}: {result['tokens']:,} tokens, loss {result['loss']:.4f} nats per token, perplexity "
        f"{result['perplexity']:.2f}, {last}"
        + ("" if asked.text is None else f", log-probability {result['log_probability']:.4f} nats")
        + "".join(f"\n  {name}: loss {loss:.4f}" for name, loss in result.get("sources", {}).items())
    )


def within_memory(settings: Settings, vocabulary: int) -> Settings:
    from leanlm.planning.inference import rows_that_fit

    return rows_that_fit(settings, vocabulary)


def main() -> None:
    command_line.run("evaluate", Evaluate, job)


if __name__ == "__main__":
    main()
