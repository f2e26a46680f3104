"""The loop's one step: takes a line, prints the model's reply, or carries out a command that begins with a slash."""

import signal

from engine.errors import UserError, nearest
from engine.format import duration
from engine.storage.digest import digest
from stages.chat.conversation import SETTINGS, Conversation, Turn, with_setting
from stages.cli import signals
from stages.cli.console import Console

COMMANDS = {
    "/help": "this list",
    "/stats": "tokens read and written so far, and whether the weights are as they were",
    "/clear": "forget the whole conversation",
    "/forget N": "forget the oldest N turns",
    "/system TEXT": "tell the model how to answer from now on (`/system` shows it, `/system -` takes it away)",
    "/set NAME VALUE": f"{', '.join(SETTINGS[:-1])} or {SETTINGS[-1]} (`/set` shows them)",
    "/quit": "leave, as Ctrl-D does; Ctrl-C stops an answer",
}


class Repl:
    """Replies to lines. `weights` is the digest of the params when the chat began; `chatty` prints what each turn cost."""

    def __init__(self, conversation: Conversation, notes: Console, weights: str, chatty: bool) -> None:
        self.conversation, self.notes, self.weights, self.chatty = conversation, notes, weights, chatty
        self.is_over = False

    def handle(self, line: str) -> bool:
        """Takes one line, a turn or a command (`//` begins a turn with a slash). False after printing why it failed."""
        try:
            if line.startswith("/") and not line.startswith("//"):
                self.run_command(*line[1:].split(maxsplit=1))
            elif line.strip():
                self.reply(line[1:] if line.startswith("//") else line)
        except UserError as error:
            self.notes.print(f"error: {error}", "red")
            return False
        return True

    def reply(self, message: str) -> None:
        """Prints the completion as it comes. A first Ctrl-C ends it where it is, a second one the command."""
        turns = self.conversation.turns
        with signals.handle_signals():
            signals.set_phase("while an answer was written.")
            with signals.deferred("", lambda _: None) as state:
                before = len(turns)
                for text in self.conversation.reply(message, is_stopped=lambda: state.received is not None):
                    print(text, end="", flush=True)
        print(flush=True)
        if state.received is not None and state.received != signal.SIGINT:
            raise signals.Stopped(state.received)
        if len(turns) == before:
            self.notes.print("(no answer)", "dim")
        else:
            self.print_turn(turns[-1])

    def print_turn(self, turn: Turn) -> None:
        """Prints what a turn cost, and why its completion ended if that was not by itself."""
        turns = self.conversation.turns
        if self.chatty:
            known = sum(earlier.prompt_tokens + earlier.completion_tokens for earlier in turns[-2:-1])
            again = f", {min(known, turn.prompt_tokens):,} of them again" if known else ""
            rest = turn.seconds - turn.first_token_seconds
            speed = f", {(turn.completion_tokens - 1) / rest:,.0f} tokens/s" if turn.completion_tokens > 1 and rest > 0 else ""
            self.notes.print(
                f"[turn {len(turns)}: {turn.prompt_tokens:,} tokens read{again}; {turn.completion_tokens:,} written, the first "
                f"after {duration(turn.first_token_seconds)}{speed}]",
                "dim",
            )
        if turn.finish_reason == "interrupted":
            self.notes.print("[stopped]", "dim")
        if turn.finish_reason == "length":
            full = turn.prompt_tokens + turn.completion_tokens >= self.conversation.cfg.context
            reason = "the context is full" if full else f"max_tokens is {self.conversation.sampling.max_tokens:,}"
            self.notes.print(f"[cut off: {reason}]", "yellow")

    def run_command(self, name: str = "", rest: str = "") -> None:
        """Carries out a command, its name without the slash. Raises UserError when there is no such command."""
        conversation, turns = self.conversation, self.conversation.turns
        if name in ("quit", "exit"):
            self.is_over = True
        elif name == "help":
            self.notes.print_rows([*COMMANDS.items()])
        elif name == "stats":
            self.print_stats()
        elif name == "clear":
            turns.clear()
            self.notes.print("[the conversation is forgotten]", "dim")
        elif name == "forget":
            if not rest.isdecimal() or not 1 <= int(rest) <= len(turns):
                raise UserError(f"/forget takes a number of turns, from 1 to the {len(turns)} there are.")
            del turns[: int(rest)]
            self.notes.print(f"[{len(turns)} turns are left]", "dim")
        elif name == "system":
            conversation.system = "" if rest == "-" else rest or conversation.system
            self.notes.print(f"[system: {conversation.system or 'what the template says, if anything'}]", "dim")
        elif name == "set":
            if words := rest.replace("=", " ").split():
                if len(words) != 2:
                    raise UserError("/set takes a name and a value, such as /set temperature 0.2.")
                conversation.sampling = with_setting(conversation.sampling, *words)
            self.notes.print_rows([(name, str(getattr(conversation.sampling, name))) for name in SETTINGS])
        else:
            known = [command.split()[0][1:] for command in COMMANDS]
            raise UserError(f"There is no command /{name}; /help lists them.{nearest(name, known)}")

    def print_stats(self) -> None:
        """Prints what the conversation has cost, and whether the weights are as they were."""
        turns = self.conversation.turns
        now = digest(self.conversation.params)
        same = "unchanged" if now == self.weights else f"CHANGED from {self.weights[:16]}"
        read = sum(turn.prompt_tokens for turn in turns)
        new = turns[-1].prompt_tokens if turns else 0
        self.notes.print_rows([
            ("turns", f"{len(turns):,}"),
            ("read", f"{read:,} tokens, {read - new:,} of them not for the first time; the last turn's prompt had {new:,}"),
            ("written", f"{sum(turn.completion_tokens for turn in turns):,} tokens"),
            ("weights", f"{same}: SHA-256 {now[:16]}"),
            ("kept", "this text; the model keeps nothing between turns"),
        ])  # fmt: skip
