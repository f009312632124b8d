"""`python -m llmcli` is `llmcli`."""

from llmcli.cli import run

run()
