"""embed: compute the vector of a text."""

from llmcli.tasks import Strategy, Task, passthrough, select_parameters
from llmcli.tasks.fields import read_prompt

EMPTY = {"embedding": None, "usage": {"prompt_tokens": 0}}
STRATEGY = Strategy(passthrough, parameters=select_parameters("role", "dimensions", "normalize"))
TASK = Task(read_prompt, ("embedding", "usage"), EMPTY, {"embedding": STRATEGY})
