"""One evaluation: loads the model and scores a text or conversations, and checks that this changed no weight."""

from engine.device import Device
from engine.errors import UserError
from engine.storage.digest import digest
from engine.storage.find import load_model
from stages.cli.console import Console
from stages.evaluate import conversations, text
from stages.evaluate.flags import Evaluate


def run(flags: Evaluate, device: Device) -> None:
    """Loads, scores, prints. Raises RuntimeError when scoring changed a weight."""
    with Console() as console:
        data = conversations.read(flags.data)
        with console.task("loading"):
            model = load_model(flags.model)
        console.warn_damaged(model.damaged, model.checkpoint)
        console.print_rows([("device", str(device)), ("model", str(model.checkpoint))])
        before = digest(model.params)
        if data or (flags.data is None and conversations.finetuned(model)):
            if flags.stride or flags.batch:
                raise UserError("--stride and --batch are for texts; conversations are read one by one.")
            rows = conversations.evaluate(model, data, flags.context, console)
        else:
            rows = text.evaluate(model, flags.data, flags.context, flags.stride, flags.batch, console)
        after = digest(model.params)
        same = f"{'unchanged' if before == after else 'CHANGED'}, SHA-256 {after[:16]} before and after"
        console.print_rows([*rows, ("weights", same)])
        if before != after:
            raise RuntimeError(f"Evaluation changed the weights: their SHA-256 was {before} and is {after}.")
