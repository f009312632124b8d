"""Texts that are far too long are found out by their beginning."""

import pytest

from llmcli.errors import RecordError
from llmcli.pipelines import lengths


@pytest.mark.parametrize("text", ["dog " * 1_000_000, " " * 100_000 + "dog " * 1_000_000])
def test_only_a_beginning_is_counted(text):
    counted = []

    def count(text):
        counted.append(len(text))
        return len(text.split())

    with pytest.raises(RecordError, match="over 200 tokens, the model takes 100") as info:
        lengths.check(text, 100, count)
    assert info.value.kind == "context_length_exceeded"
    assert sum(counted) < len(text) / 2


@pytest.mark.parametrize("text", ["dog", "dog " * 200, " " * 1_000_000])
def test_what_may_fit_is_left_to_an_exact_count(text):
    lengths.check(text, 100, lambda text: len(text.split()))


def test_a_chat_and_a_vector(llmcli, tiny, encoder):
    ran = llmcli("chat", "dog " * 10_000, "-m", tiny)
    assert (ran.exit_status, "the text has over 128 tokens, the model takes 64" in ran.stderr) == (1, True)
    ran = llmcli("embed", "dog " * 10_000, "-m", encoder)
    assert (ran.exit_status, "the text has over 128 tokens, the model takes 64" in ran.stderr) == (1, True)
