"""Answers that match grammars, at the level of the pipelines: several grammars in one batch, forced tokens, seeds."""

import json
import re

import jsonschema
import pytest
from causal_kinds import FAST_KINDS, generate, load, make_model
from conftest import WORDS

from llmcli.errors import RecordError, UsageError
from llmcli.pipelines.slots import SlotBatch
from llmcli.text.constraints import to_grammar

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["cat", "dog", "schön 🦊", "<s>", "</s>"]},
        "age": {"type": "integer", "minimum": 3, "maximum": 120},
        "home": {
            "type": "object",
            "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["zip"],
            "additionalProperties": False,
        },
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "kind", "age", "home", "tags"],
    "additionalProperties": False,
}
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "number", "minimum": -1, "maximum": 1},
                "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
            },
            "required": ["value", "next"],
            "additionalProperties": False,
        }
    },
}
LONG_NAMES = {  # nearly all is forced
    "type": "object",
    "properties": {f"the quick brown fox {i}": {"type": "boolean"} for i in range(4)},
    "required": [f"the quick brown fox {i}" for i in range(4)],
    "additionalProperties": False,
}
LARK = 'start: WORD ("," WORD)~2\nWORD: /[a-z]{2,5}/'
CONSTRAINTS = [
    {"schema": PERSON},
    {"regex": r"[A-C]{2}-[0-9]{3}"},
    None,
    {"choice": ["the dog", "the dog sleeps", "</s>"]},
    {"grammar": LARK},
    {"schema": LONG_NAMES},
    {"schema": {"type": "string", "const": "é<s>"}},
]
PROMPTS = [" ".join(WORDS[i : i + 2 + 3 * (i % 4)]) for i in range(len(CONSTRAINTS))]
GRAMMARS = [constraint and to_grammar(constraint) for constraint in CONSTRAINTS]
SHORT = {"max_new_tokens": 120, "repetition_penalty": 1.0}


@pytest.fixture(scope="module")
def load_kind(tiny, tmp_path_factory):
    made = {}

    def load_once(kind, **settings):
        key = kind, *settings.items()
        if key not in made:
            made[key] = load(make_model(kind, tiny, tmp_path_factory.mktemp(kind), **settings))
        return made[key]

    return load_once


@pytest.fixture
def llama(load_kind):
    return load_kind("llama")


@pytest.fixture
def passes(monkeypatch):
    """The widths of the passes that read forced tokens together."""
    widths = []
    read = SlotBatch._read
    monkeypatch.setattr(SlotBatch, "_read", lambda self, columns: widths.append(columns) or read(self, columns))
    return widths


def read_one_by_one(monkeypatch):
    monkeypatch.setattr(SlotBatch, "_choose_columns", lambda self: 1)


def is_valid(constraint, text):
    if constraint is None:
        return True
    ((kind, value),) = constraint.items()
    if kind == "schema":
        jsonschema.validate(json.loads(text), value)
        return True
    if kind == "choice":
        return text in value
    return bool(re.fullmatch(value if kind == "regex" else "[a-z]{2,5}(,[a-z]{2,5}){2}", text))


def texts(outputs):
    return [output if isinstance(output, RecordError) else output["generated_text"] for output in outputs]


@pytest.mark.parametrize("kind", FAST_KINDS)
def test_rows_with_different_grammars_share_a_batch(load_kind, kind, monkeypatch):
    pipeline = load_kind(kind)
    together = generate(pipeline, PROMPTS, SHORT, constraints=GRAMMARS)
    free = generate(pipeline, PROMPTS[2:3], SHORT)[0]  # the row without a constraint, in transformers' own loop
    assert {name: together[2][name] for name in free} == free
    alone = [
        generate(pipeline, [prompt], SHORT, constraints=[grammar])[0]
        for prompt, grammar in zip(PROMPTS, GRAMMARS, strict=True)
    ]
    for constraint, output in zip(CONSTRAINTS, together, strict=True):
        assert is_valid(constraint, output["generated_text"])
        assert constraint is None or output["finish_reason"] == "stop"
    assert texts(together) == texts(alone)
    read_one_by_one(monkeypatch)
    assert texts(generate(pipeline, PROMPTS, SHORT, constraints=GRAMMARS)) == texts(together)


def test_forced_tokens_are_read_together(llama, passes):
    (output,) = generate(llama, PROMPTS[:1], SHORT, constraints=[to_grammar({"schema": LONG_NAMES})])
    assert output["usage"]["completion_tokens"] > 3 * len(passes)
    one_by_one = len(passes)
    generate(llama, PROMPTS[:1], {**SHORT, "min_new_tokens": 1}, constraints=[to_grammar({"schema": LONG_NAMES})])
    assert len(passes) == 2 * one_by_one


@pytest.mark.parametrize(("kind", "can_force"), [("llama", True), ("gpt2", True), ("gemma3", False), ("bloom", False)])
def test_batches_force_tokens_where_padding_changes_nothing(load_kind, passes, kind, can_force):
    generate(load_kind(kind), PROMPTS[:3], SHORT, constraints=[to_grammar({"schema": LONG_NAMES})] * 3)
    assert bool(passes) is can_force


def test_names_of_added_tokens_are_text(tiny, tmp_path):
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    names = ["<think>", "</think>", "[INST]", "é ｜x▁", "two words"]
    tokenizer.add_tokens([AddedToken(name, special=i == 3, normalized=False) for i, name in enumerate(names)])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    pipeline = load(make_model("llama", tmp_path / "tokenizer", tmp_path / "model"))
    answers = [*names, "<think>a</think>", "a</s><think>", "<think", "é ｜x▁ [INST] two words"]
    constraints = [{"choice": [answer]} for answer in answers]
    constraints += [{"schema": {"const": {answer: answer}}} for answer in answers]
    answers += [json.dumps({answer: answer}, ensure_ascii=False, separators=(",", ":")) for answer in answers]
    grammars = [*map(to_grammar, constraints)]
    options = {"max_new_tokens": 100}
    assert texts(generate(pipeline, ["the"] * len(grammars), options, constraints=grammars)) == answers
    assert texts(generate(pipeline, ["the"], options, constraints=grammars[5:6])) == answers[5:6]


def test_row_limits_and_forced_tokens(llama):
    grammars = [to_grammar({"schema": LONG_NAMES})] * 3
    outputs = generate(llama, PROMPTS[:3], SHORT, constraints=grammars, max_new_tokens=[5, 120, 9])
    assert [type(output) for output in outputs] == [RecordError, dict, RecordError]
    assert outputs[0].message == "answer ends before it is complete: 5 tokens"
    assert outputs[0].hint == "increase --max-new-tokens"
    assert outputs[0].kind == "incomplete"


def test_answer_that_may_end_at_the_limit_is_no_failure(llama):
    options = {"max_new_tokens": 3, "min_new_tokens": 3}
    (output,) = generate(llama, ["the"], options, constraints=[to_grammar({"regex": "[0-9]+"})])
    assert output["finish_reason"] == "length"
    (whole,) = generate(llama, ["the"], {"max_new_tokens": 3}, constraints=[to_grammar({"regex": "[0-9]{3}"})])
    assert whole["finish_reason"] == "stop"


def test_padding_after_a_row_limit_is_not_read(llama, monkeypatch):
    options, grammar = {"max_new_tokens": 9, "min_new_tokens": 9}, to_grammar({"regex": "[0-9]+"})
    for is_forced in (True, False):
        if not is_forced:
            read_one_by_one(monkeypatch)
        outputs = generate(llama, PROMPTS[:2], options, constraints=[grammar] * 2, max_new_tokens=[3, 9])
        assert [output["finish_reason"] for output in outputs] == ["length", "length"]
        assert [output["usage"]["completion_tokens"] for output in outputs] == [3, 9]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 3.0, "top_k": 1, "top_p": 0.01},
        pytest.param({"temperature": 2.0, "num_return_sequences": 3}, marks=pytest.mark.slow),
        pytest.param({"num_beams": 3}, marks=pytest.mark.slow),
        {"num_beams": 4, "num_return_sequences": 2},
        {"repetition_penalty": 2.0, "no_repeat_ngram_size": 2},
        pytest.param({"min_new_tokens": 100}, marks=pytest.mark.slow),
        pytest.param({"suppress_tokens": list(range(5, 261))}, marks=pytest.mark.slow),
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=lambda options: "-".join(options),
)
def test_other_generation_options_leave_answers_valid(llama, options):
    rows = slice(1) if "prompt_lookup_num_tokens" in options else slice(None)
    outputs = generate(llama, PROMPTS[rows], {"max_new_tokens": 150, **options}, constraints=GRAMMARS[rows])
    for constraint, output in zip(CONSTRAINTS[rows], outputs, strict=True):
        for text in output.get("generated_texts", [output["generated_text"]]):
            assert is_valid(constraint, text)


def test_sampled_beams_with_a_constraint_are_refused(llama):
    with pytest.raises(UsageError, match="sampled beams"):
        generate(llama, PROMPTS, {"num_beams": 2, "do_sample": True}, constraints=GRAMMARS)


def test_recursive_schema_is_valid_or_incomplete(llama):
    import torch

    torch.manual_seed(0)
    options = {"max_new_tokens": 60, "temperature": 1.0}
    for output in generate(llama, PROMPTS, options, constraints=[to_grammar({"schema": TREE})] * len(PROMPTS)):
        if isinstance(output, RecordError):
            assert output.kind == "incomplete"
        else:
            assert is_valid({"schema": TREE}, output["generated_text"])


@pytest.mark.parametrize("more_logits", [1, 300])
def test_model_with_other_logits_than_tokens(load_kind, more_logits):
    pipeline = load_kind("llama", more_logits=more_logits)
    outputs = generate(pipeline, PROMPTS, SHORT, constraints=GRAMMARS)
    for constraint, output in zip(CONSTRAINTS, outputs, strict=True):
        assert is_valid(constraint, output["generated_text"])


def test_seeds_repeat_a_row_in_any_batch(llama):
    options = {"max_new_tokens": 12, "temperature": 1.0}
    seeds = [5, 2**64 - 1, 5, None, 0, 1, 2]
    together = generate(llama, [PROMPTS[0]] * 7, options, seeds=seeds)
    assert texts(together)[0] == texts(together)[2] == texts(generate(llama, PROMPTS[:1], options, seeds=[5]))[0]
    assert len({*texts(together)}) == 6
    mixed = generate(llama, PROMPTS, options, seeds=seeds, constraints=GRAMMARS)
    for i, output in enumerate(mixed):
        if seeds[i] is not None:
            alone = generate(llama, [PROMPTS[i]], options, seeds=[seeds[i]], constraints=[GRAMMARS[i]])
            assert [*map(str, texts(alone))] == [str(texts([output])[0])]


def test_seeds_of_several_sequences_differ(llama):
    options = {"max_new_tokens": 12, "temperature": 1.0, "num_return_sequences": 3}
    first, second = generate(llama, PROMPTS[:2], options, seeds=[1, 2])
    assert len({*first["generated_texts"], *second["generated_texts"]}) == 6
    assert generate(llama, PROMPTS[1:2], options, seeds=[2])[0]["generated_texts"] == second["generated_texts"]


def test_stream_has_the_forced_tokens(llama):
    from llmcli.pipelines.answers import DeltaStreamer

    for options in (SHORT, {**SHORT, "temperature": 0.5}):
        pieces = []
        streamer = DeltaStreamer(llama.decoder(llama.preprocess(PROMPTS[0])), (), pieces.append)
        (output,) = generate(llama, PROMPTS[:1], options, constraints=GRAMMARS[:1], streamer=streamer)
        assert "".join(pieces) == output["generated_text"]


def test_shared_beginning_and_forced_tokens(llama):
    prompts = [f"{PROMPTS[3]} {word}" for word in WORDS[: len(GRAMMARS)]]
    ids = llama.tokenizer(PROMPTS[3])["input_ids"]
    shared = generate(llama, prompts, SHORT, constraints=GRAMMARS, prefix=(ids, llama.prefill(ids)))
    assert texts(shared) == texts(generate(llama, prompts, SHORT, constraints=GRAMMARS))


def test_grammar_that_only_the_tokenizer_refuses_fails_the_record(llama):
    with pytest.raises(RecordError, match="unknown special token") as caught:
        generate(llama, PROMPTS[:1], SHORT, constraints=["start: <|nobody|>"])
    assert caught.value.kind == "invalid_constraint"
    assert "\n" not in caught.value.message


def test_end_tokens_are_required(llama, monkeypatch):
    monkeypatch.setattr(llama, "find_end_tokens", lambda _: None)
    with pytest.raises(UsageError, match="no token that ends an answer"):
        generate(llama, PROMPTS[:1], SHORT, constraints=GRAMMARS[:1])


def test_sentencepiece_with_byte_fallback(tmp_path):
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    letters = [*"▁abcdefghijklmnopqrstuvwxyz{}[]:,.", '"', *"0123456789-"]
    names = ["<unk>", "</s>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "▁th", "▁the", '{"', '":']
    vocab = {name: id for id, name in enumerate(names)}
    merges = [("▁t", "h"), ("▁th", "e"), ("{", '"'), ('"', ":")]
    vocab["▁t"] = len(vocab)
    merges = [("▁", "t"), *merges]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    spaces = decoders.Replace("▁", " ")
    backend.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    pipeline = load(make_model("llama", tmp_path / "tokenizer", tmp_path / "model"))
    outputs = generate(pipeline, PROMPTS, SHORT, constraints=GRAMMARS)
    for constraint, output in zip(CONSTRAINTS, outputs, strict=True):
        assert is_valid(constraint, output["generated_text"])
    alone = [generate(pipeline, PROMPTS[i : i + 1], SHORT, constraints=GRAMMARS[i : i + 1])[0] for i in range(7)]
    assert texts(alone) == texts(outputs)


def test_tokenizers_that_change_or_hide_the_text_are_refused():
    from tokenizers import Tokenizer, decoders, models
    from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

    from llmcli.pipelines.constraints import GrammarCompiler

    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1, "##s": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    for tokenizer in (PreTrainedTokenizerFast(tokenizer_object=backend), ByT5Tokenizer()):
        with pytest.raises(UsageError, match="model cannot have constrained answers"):
            GrammarCompiler(tokenizer, 400).compile("start: /a/", (1,))
