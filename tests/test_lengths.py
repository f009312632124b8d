"""Texts that are far too long are found out by their beginning."""

import pytest

from llmcli.errors import RecordError
from llmcli.pipelines.base import check_length


@pytest.mark.parametrize("text", ["dog " * 1_000_000, " " * 100_000 + "dog " * 1_000_000])
def test_only_a_beginning_is_counted(text):
    counted = []

    def count(text):
        counted.append(len(text))
        return len(text.split())

    with pytest.raises(RecordError, match="over 200 tokens, which exceeds the context length of 100") as info:
        check_length(text, 100, count)
    assert info.value.kind == "context_length_exceeded"
    assert sum(counted) < len(text) / 2


@pytest.mark.parametrize("text", ["dog", "dog " * 200, " " * 1_000_000])
def test_what_may_fit_is_left_to_an_exact_count(text):
    check_length(text, 100, lambda text: len(text.split()))


def test_a_chat_and_a_vector(llmcli, tiny, encoder):
    ran = llmcli("chat", "dog " * 10_000, "-m", tiny)
    assert (ran.exit_status, "text has over 128 tokens, which exceeds the context length of 64" in ran.stderr) == (
        1,
        True,
    )
    ran = llmcli("embed", "dog " * 10_000, "-m", encoder)
    assert (ran.exit_status, "text has over 128 tokens, which exceeds the context length of 64" in ran.stderr) == (
        1,
        True,
    )


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("Bert", {}, 64),
        ("Roberta", {"pad_token_id": 1}, 62),
        ("Camembert", {"pad_token_id": 0}, 63),
        ("MPNet", {"pad_token_id": 1}, 62),
        ("Electra", {}, 64),
        ("OPT", {}, 64),
        ("GPT2", {"n_positions": 64}, 64),
        ("Mpt", {"max_seq_len": 64}, 64),
        ("XLNet", {}, None),
    ],
)
def test_positions_begin_after_padding_in_roberta_models(kind, settings, expected):
    import transformers

    from llmcli.pipelines.base import position_limit

    known = {"max_position_embeddings": 64} if kind != "XLNet" else {}
    config = getattr(transformers, f"{kind}Config")(**known, **settings)
    assert position_limit(config) == expected
