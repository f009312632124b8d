"""A conversation at the terminal: line editing, history, /system, /clear, /exit."""

import dataclasses
import sys
import termios
import tty
from contextlib import suppress

from llmcli import config, console, engines
from llmcli.engines.engine import Engine
from llmcli.errors import ExitStatus, UsageError, reason
from llmcli.io.output import Output, OutputFormat
from llmcli.job import Job, Record
from llmcli.tasks.chat import Message

COMMANDS = {
    "/system": "/system TEXT   set the system message and start over; without TEXT, remove it",
    "/clear": "/clear         start over",
    "/exit": "/exit          leave (also Ctrl-D)",
    "/help": "/help          show this help",
}


def converse(job: Job) -> ExitStatus:
    """Read messages until /exit or the end of input. Ctrl-C stops an answer, or clears the line."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.output import create_output

    class History(FileHistory):
        def store_string(self, string: str) -> None:
            with suppress(OSError):  # The disk may be full.
                super().store_string(string)

    if config.world_size() > 1:
        raise UsageError("a conversation cannot run in several processes")
    history = config.cache_dir() / "chat_history"
    try:
        history.parent.mkdir(parents=True, exist_ok=True)
        history.touch(mode=0o600)
    except OSError as exc:
        console.warning(f"cannot save messages to {history}: {reason(exc)}")
    session: PromptSession[str] = PromptSession(
        history=History(str(history)),
        completer=WordCompleter(list(COMMANDS), sentence=True),
        complete_while_typing=False,
        output=create_output(stdout=console.terminal()),  # `llmcli chat > answers.txt` saves the answers alone.
    )
    job = dataclasses.replace(job, load_options=dataclasses.replace(job.load_options, one_stream=True))
    engine = engines.engine_for(job)
    engine.load(job)
    console.notice(f"{job.model}: type /help for commands, Ctrl-D to leave")
    system = job.parameters.get("system")
    messages = _new_conversation(system)
    generation = {name: value for name, value in job.generation.items() if name != "num_return_sequences"}
    job = dataclasses.replace(job, parameters={}, generation=generation)
    while True:
        try:
            line = session.prompt(">>> ").strip()
        except KeyboardInterrupt:
            continue
        except EOFError:
            return ExitStatus.OK
        command, _, argument = line.partition(" ")
        if command == "/exit":
            return ExitStatus.OK
        if command in ("/clear", "/system"):
            system = (argument.strip() or None) if command == "/system" else system
            messages = _new_conversation(system)
            console.notice(f"new conversation, {f'system message: {system}' if system else 'no system message'}")
        elif command.startswith("/"):
            if command != "/help":
                console.error(f"unknown command {command!r}")
            print("\n".join(COMMANDS.values()), file=sys.stderr)
        elif line:
            messages = _answer(engine, job, [*messages, {"role": "user", "content": line}])


def _answer(engine: Engine, job: Job, messages: list[Message]) -> list[Message]:
    """Print the answer to the last message, and return the conversation with it."""
    parts: list[str] = []
    is_stopped = False
    with Output(OutputFormat.TEXT, model=job.model) as output:

        def on_text(text: str) -> None:
            parts.append(text)
            output.stream(text)

        modes = termios.tcgetattr(sys.stdin)
        try:
            # What is typed during an answer is not shown within it, but waits for the next prompt.
            tty.setcbreak(sys.stdin, termios.TCSANOW)
            for result in engine.run(job, [Record({"messages": messages})], on_text):
                if result.failure:
                    is_too_long = result.failure.type == "context_length_exceeded" and len(messages) > 2
                    if is_too_long:
                        console.error("the conversation exceeds the context length", hint="start over with /clear")
                    else:
                        console.error(result.failure.message)
                    return messages[:-1]
                parts = [result.text]
                output.write(result)
        except KeyboardInterrupt:
            is_stopped = True
        finally:
            termios.tcsetattr(sys.stdin, termios.TCSANOW, modes)
    if is_stopped:  # The output has ended the line of the answer.
        part = "; the conversation keeps this part of the answer (/clear starts over)"
        console.notice(f"stopped{part if any(parts) else ''}")
    return [*messages, {"role": "assistant", "content": "".join(parts)}] if any(parts) else messages[:-1]


def _new_conversation(system: str | None) -> list[Message]:
    return [{"role": "system", "content": system}] if system else []
