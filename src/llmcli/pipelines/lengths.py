"""Texts that are longer than a model takes, by far: found without making tokens of all of it."""

from collections.abc import Callable

from llmcli.errors import RecordError

CHARACTERS = 16  # a token, for a first look: more than most texts have


def check(text: str, most: int, count: Callable[[str], int]) -> None:
    """Raises RecordError where a beginning of the text has more than twice the tokens that fit. A tokenizer takes a
    second and 200 MB for each million characters of a text; a beginning may end inside a word, hence twice."""
    size = CHARACTERS * most
    while size < len(text):
        if count(text[:size]) > 2 * most:
            raise RecordError(
                "context_length_exceeded",
                f"the text has over {2 * most} tokens, the model takes {most}",
                hint="shorten it, or let --truncate cut it",
            )
        size *= 8
