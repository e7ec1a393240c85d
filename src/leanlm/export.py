"""A trained model for everything that reads Hugging Face folders: `python -m leanlm.export run=runs/X to=FOLDER`."""

from leanlm.config import command_line
from leanlm.inference.export import Export, export
from leanlm.launch.ranks import say


def job(asked: Export) -> None:
    folder, with_code = export(asked)
    if asked.format == "peft":
        say(f"{folder}: peft.PeftModel.from_pretrained(model, {str(folder)!r}), with the model that it was trained beside")
        return
    how = ", trust_remote_code=True" if with_code else ""
    say(f"{folder}: AutoModelForCausalLM.from_pretrained({str(folder)!r}{how}), AutoTokenizer.from_pretrained({str(folder)!r})")
    if with_code:
        say("trust_remote_code=True runs the *.py files there: transformers has no such model of its own")


def main() -> None:
    command_line.run("export", Export, job)


if __name__ == "__main__":
    main()
