"""embed: compute the vector of a text."""

from llmcli.tasks import Strategy, Task, passthrough
from llmcli.tasks.fields import read_prompt

EMPTY = {"embedding": None, "usage": {"prompt_tokens": 0}}
TASK = Task(read_prompt, ("embedding", "usage"), EMPTY, {"embedding": Strategy(passthrough)})
