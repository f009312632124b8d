"""A conversation at the terminal: line editing, history, /system, /clear, /exit."""

import dataclasses
import sys
from pathlib import Path

from llmcli import config, console, engines
from llmcli.engines.engine import Engine
from llmcli.errors import ExitStatus
from llmcli.io.output import Output, OutputFormat
from llmcli.job import Job, Record
from llmcli.tasks.chat import Message

COMMANDS = {
    "/system": "/system TEXT   set the system message and start over; without TEXT, drop it",
    "/clear": "/clear         start over",
    "/exit": "/exit          leave (also Ctrl-D)",
    "/help": "/help          this",
}


def converse(job: Job) -> ExitStatus:
    """Read messages until /exit or the end of input. Ctrl-C stops an answer, or drops a half-typed line.

    Prompts and notices go to stderr, answers to stdout: `llmcli chat > answers.txt` holds answers alone.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.output import create_output

    session: PromptSession[str] = PromptSession(
        history=FileHistory(str(_history())),
        completer=WordCompleter(list(COMMANDS), sentence=True),
        complete_while_typing=False,
        output=create_output(stdout=sys.stderr),
    )
    engine = engines.engine_for(job)
    engine.load(job)
    console.notice(f"{job.model}: /help shows the commands, Ctrl-D leaves")
    system = job.parameters.get("system")
    messages = _opening(system)
    one_answer = {name: value for name, value in job.generation.items() if name != "num_return_sequences"}
    job = dataclasses.replace(job, parameters={}, generation=one_answer)
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
            messages = _opening(system)
            console.notice(f"a new conversation, {f'system message: {system}' if system else 'no system message'}")
        elif command.startswith("/"):
            if command != "/help":
                console.notice(f"there is no {command}")
            print("\n".join(COMMANDS.values()), file=sys.stderr)
        elif line:
            messages = _turn(engine, job, [*messages, {"role": "user", "content": line}])


def _turn(engine: Engine, job: Job, messages: list[Message]) -> list[Message]:
    """Answer the last message; returns the conversation with the answer, as far as it came."""
    said: list[str] = []
    with Output(OutputFormat.TEXT, model=job.model) as output:

        def on_text(piece: str) -> None:
            said.append(piece)
            output.piece(piece)

        try:
            for result in engine.run(job, [Record({"messages": messages})], on_text):
                if result.failure:
                    console.error(result.failure.message)
                    return messages[:-1]
                said = [result.text]
                output.write(result)
        except KeyboardInterrupt:
            pass  # what was said so far stays in the conversation
    return [*messages, {"role": "assistant", "content": "".join(said)}] if said else messages[:-1]


def _opening(system: str | None) -> list[Message]:
    return [{"role": "system", "content": system}] if system else []


def _history() -> Path:
    path = config.cache_dir() / "chat_history"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    return path
