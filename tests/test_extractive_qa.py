"""Extractive question answering: the same answers as transformers 4 gave, and what holds of every answer."""

import functools
import json
import shutil
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from llmcli import pipelines
from llmcli.errors import ModelUnavailableError, RecordError, UsageError
from llmcli.job import LoadOptions

GOLDEN = Path(__file__).parent / "golden"  # models with random weights, and what transformers 4.57.6 made of them
GOLD = json.loads((GOLDEN / "gold.json").read_text(encoding="utf-8"))
GROUPS = [name for name, group in GOLD.items() if group["task"] == "question-answering"]
WINDOWS = {"doc_stride", "max_seq_len"}  # arguments of preprocess; the others are postprocess's
PLACE = {"answer", "start", "end"}
ENGLISH = GOLD["bert-qa"]["cases"][2]["context"]
CHINESE = "三位石匠和一位画家修复了圆顶，近两百位邻居给他们送来了汤。"


@pytest.fixture(scope="module", params=GROUPS)
def qa(request):
    return pipelines.load("extractive_qa", GOLDEN / request.param, LoadOptions(device="cpu", dtype="float32"))


@pytest.fixture(scope="module")
def bert():
    return pipelines.load("extractive_qa", GOLDEN / "bert-qa", LoadOptions(device="cpu", dtype="float32"))


def asked(context, question="Who restored it?"):
    return {"question": question, "context": context}


def forward(qa, windows):
    """All windows in one padded batch, and a row of it for each, as the engine does it."""
    batch = qa.forward({name: [window[name] for window in windows] for name in windows[0]})
    return [
        {name: value[row : row + 1] if hasattr(value, "shape") else value[row] for name, value in batch.items()}
        for row in range(len(windows))
    ]


def check_gold(result, case):
    answers = result.get("answers", [result])
    assert [{name: answer[name] for name in PLACE} for answer in answers] == [
        {name: answer[name] for name in PLACE} for answer in case["output"]
    ]
    assert [answer["score"] for answer in answers] == pytest.approx(
        [answer["score"] for answer in case["output"]], rel=1e-5
    )
    assert all(result[name] == answers[0][name] for name in (*PLACE, "score"))


def cases(qa):
    return GOLD[Path(qa.model.name_or_path).name]["cases"]


def windows_of(qa, case):
    settings = {name: value for name, value in case["args"].items() if name in WINDOWS}
    return list(qa.preprocess(asked(case["context"], case["question"]), truncate=False, **settings))


def test_answers_are_those_of_transformers_4(qa):
    for case in cases(qa):
        check_gold(qa(asked(case["context"], case["question"]), **case["args"]), case)


def test_in_one_batch_too(qa):
    windows = [windows_of(qa, case) for case in cases(qa)]
    outputs = iter(forward(qa, list(chain.from_iterable(windows))))
    for case, mine in zip(cases(qa), windows, strict=True):
        settings = {name: value for name, value in case["args"].items() if name not in WINDOWS}
        check_gold(qa.postprocess([next(outputs) for _ in mine], **settings), case)


def test_it_runs_under_transformers_own_pipeline(bert):
    questions = [asked(ENGLISH), asked(CHINESE), asked("Yes.")]
    alone = [bert(question, top_k=3, max_seq_len=64, doc_stride=16) for question in questions]
    together = bert(questions, batch_size=4, top_k=3, max_seq_len=64, doc_stride=16)
    for one, other in zip(alone, together, strict=True):
        check_gold(other, {"output": one["answers"]})


def test_an_answer_is_a_piece_of_the_context(qa):
    words = ENGLISH.split() + list(CHINESE)
    for start in range(0, len(words), 7):
        context = "  ".join(words[start : start + start % 40 + 1])
        result = qa(asked(context), top_k=8, handle_impossible_answer=True)
        assert 1 <= len(result["answers"]) <= 8
        for answer in result["answers"]:
            assert context[answer["start"] : answer["end"]] == answer["answer"]
        scores = [answer["score"] for answer in result["answers"]]
        assert scores == sorted(scores, reverse=True)
        texts = [answer["answer"].lower() for answer in result["answers"] if answer["answer"]]
        assert len(set(texts)) == len(texts)


def make_long(repeats):
    return " ".join(f"{ENGLISH} {i}" for i in range(repeats))


def test_windows_of_long_context_cover_it_and_overlap(qa):
    context = make_long(40)
    windows = list(qa.preprocess(asked(context), max_seq_len=64, doc_stride=16))
    assert len(windows) > 100
    assert [window["is_last"] for window in windows] == [False] * (len(windows) - 1) + [True]
    alone = qa.tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)
    own = slice(windows[0]["tokens"].start, windows[0]["tokens"].start + len(windows[0]["tokens"]))
    parts = [list(window["input_ids"][own]) for window in windows[:-1]]
    parts.append([windows[-1]["encoding"].ids[i] for i in windows[-1]["tokens"]])
    assert all(one[-16:] == other[:16] for one, other in pairwise(parts))
    assert [*parts[0], *chain.from_iterable(later[16:] for later in parts[1:])] == alone["input_ids"]
    places = [window["encoding"].token_to_chars(i) for window in windows[-1:] for i in window["tokens"]]
    assert places[-1] == alone["offset_mapping"][-1]
    result = qa.postprocess(forward(qa, windows), top_k=5)
    assert len(result["answers"]) == 5
    assert context[result["start"] : result["end"]] == result["answer"]


@pytest.mark.parametrize(("size", "stride"), [(64, 16), (64, 0), (48, 20), (384, 128)])
def test_windows_are_cut_as_the_tokenizer_cuts(qa, size, stride):
    for context in ("Yes.", ENGLISH, CHINESE, make_long(20)):
        mine = list(qa.preprocess(asked(context), max_seq_len=size, doc_stride=stride))
        known = qa.tokenizer(
            "Who restored it?", context, truncation="only_second", max_length=size, stride=stride,
            return_overflowing_tokens=True,
        ).encodings  # fmt: skip
        is_broken = tokenizers.__version__ in {"0.23.1", "0.23.2"}  # They return two windows, the second cut.
        for window, encoding in zip(mine, known[:1] if is_broken else known, strict=not is_broken):
            assert list(window["input_ids"]) == encoding.ids
            assert list(window["token_type_ids"]) == encoding.type_ids
            inside = [i for i, part in enumerate(encoding.sequence_ids) if part == 1]
            assert [window["encoding"].token_to_chars(i) for i in window["tokens"]] == [
                encoding.offsets[i] for i in inside
            ]
            for i, token in zip(inside, window["tokens"], strict=True):
                assert window["encoding"].token_to_word(token) == encoding.token_to_word(i)
                assert token - window["shift"] == i


def test_word_cut_by_a_window_ends_with_the_window(bert):
    context = "An apprentice " * 40
    first, *_ = bert.preprocess(asked(context), max_seq_len=32, doc_stride=0)
    last = len(first["input_ids"]) - 2
    first["start"] = first["end"] = np.zeros((1, len(first["input_ids"])), np.float32)
    first["start"][0, last] = first["end"][0, last] = 20.0
    answer = bert.postprocess([first])
    assert answer["end"] == first["encoding"].token_to_chars(first["tokens"][-1])[1]


def test_windows_that_miss_tokens_raise_an_internal_error(bert, monkeypatch):
    class Gap:
        """An encoding in which the context is not in one piece."""

        ids, type_ids, sequence_ids = [2, 5, 3, 6, 3, 7, 3], [0] * 7, [None, 0, None, 1, None, 1, None]

    monkeypatch.setattr(type(bert.tokenizer), "__call__", lambda *_, **__: type("Batch", (), {"encodings": [Gap()]}))
    with pytest.raises(RuntimeError, match="do not cover tokens 3 to 5"):
        list(bert.preprocess(asked("a b")))


def save_with_positions(qa, folder, positions):
    """Save a model with random weights and `positions`, and a tokenizer that states no length."""
    config = type(qa.model.config).from_dict({**qa.model.config.to_dict(), "max_position_embeddings": positions})
    AutoModelForQuestionAnswering.from_config(config).save_pretrained(folder)
    qa.tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("model_max_length", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def test_windows_fit_the_positions_of_the_model(qa, llmcli, tmp_path):
    is_offset = qa.model.config.model_type == "roberta"  # Its positions begin after the padding token's.
    save_with_positions(qa, tmp_path, 64 + 2 * is_offset)
    run = functools.partial(llmcli, "qa", "Who restored it?", "-m", tmp_path, "--dtype", "float32")
    for options in ((), ("--max-seq-len", 64)):
        ran = run("-c", make_long(9), *options)
        assert (ran.stderr, ran.exit_status) == ("", 0)
    ran = run("-c", "Yes.", "--max-seq-len", 65)
    assert (ran.exit_status, ran.stdout) == (2, "")
    assert "windows of 65 tokens exceed the model's maximum of 64" in ran.stderr
    ran = llmcli("qa", "who " * 70, "-m", tmp_path, "-c", make_long(9))
    assert (ran.exit_status, ran.stdout) == (1, "")
    assert "leaves room for 0 of the context in windows of 64" in ran.stderr


def test_max_seq_len_over_the_maximum_fails(qa, llmcli):
    ran = llmcli("qa", "Who?", "-m", qa.model.name_or_path, "-c", make_long(9), "--max-seq-len", 600)
    assert (ran.exit_status, ran.stdout) == (2, "")
    assert "windows of 600 tokens exceed the model's maximum of 512" in ran.stderr


def test_context_without_tokens_has_no_answer(bert):
    assert bert(asked("\u200b"))["answer"] is None


def test_vocabulary_file_alone_answers_the_same(bert, llmcli, tmp_path):
    for name in ("config.json", "model.safetensors", "vocab.txt", "tokenizer_config.json"):
        shutil.copy(GOLDEN / "bert-qa" / name, tmp_path)
    ran = [llmcli("qa", "Who?", "-m", folder, "-c", make_long(30)) for folder in (tmp_path, GOLDEN / "bert-qa")]
    assert ran[0].exit_status == 0
    assert ran[0].stdout == ran[1].stdout


def test_padding_changes_nothing(qa):
    (short,) = qa.preprocess(asked("The clock was repaired in 1951."))
    (long,) = qa.preprocess(asked(ENGLISH), max_seq_len=512)
    padded, _ = forward(qa, [short, long])
    assert padded["start"].shape == (1, len(long["input_ids"]))
    alone = qa.postprocess([qa.forward(short)], top_k=9, max_answer_len=500, handle_impossible_answer=True)
    check_gold(
        qa.postprocess([padded], top_k=9, max_answer_len=500, handle_impossible_answer=True),
        {"output": alone["answers"]},
    )


def test_a_tokenizer_that_pads_on_the_left_reads_the_context_first(bert):
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "bert-qa", padding_side="left")
    qa = type(bert)(model=bert.model, tokenizer=tokenizer)
    (short,) = qa.preprocess(asked("It was repaired in 1951."))
    (long,) = qa.preprocess(asked(ENGLISH), max_seq_len=512)
    assert tokenizer.decode(short["input_ids"]).startswith("[CLS] it was repaired")
    alone, both = qa.forward(short), qa.forward({name: [short[name], long[name]] for name in short})
    beside = {**alone, **{name: both[name][:1] for name in ("start", "end")}}
    answers, expected = (qa.postprocess([window], top_k=3)["answers"] for window in (beside, alone))
    assert [answer["answer"] for answer in answers] == [answer["answer"] for answer in expected]
    assert [answer["score"] for answer in answers] == pytest.approx([answer["score"] for answer in expected], rel=1e-4)


def logits(qa, context, start, end):
    """The windows of a short context, with these logits for the tokens of the context, and 0 for [CLS]."""
    (window,) = qa.preprocess(asked(context))
    inside = [i for i, part in enumerate(window["encoding"].sequence_ids) if part == 1]
    for name, values in (("start", start), ("end", end)):
        window[name] = np.full((1, len(window["input_ids"])), 99.0, np.float32)  # the question's tokens must not matter
        window[name][0, [0, *inside]] = [0.0, *values]
    return [window]


def test_the_likeliest_span_is_the_answer(bert):
    windows = logits(bert, "a b c a", [1, 5, 0, 0], [0, 0, 5, 0])
    result = bert.postprocess(windows)
    assert (result["answer"], result["start"], result["end"]) == ("b c", 2, 5)
    assert result["score"] > 0.8
    assert "answers" not in result
    assert bert.postprocess(windows, max_answer_len=1)["answer"] in "bc"


def test_equal_texts_are_one_answer(bert):
    windows = logits(bert, "A b a", [5, 0, 5], [5, 0, 5])
    (first, *_) = bert.postprocess(windows, top_k=2, max_answer_len=1)["answers"]
    assert (first["answer"], first["start"]) == ("A", 0)
    assert first["score"] == pytest.approx(2 * (0.49**2), rel=0.05)
    twice = bert.postprocess(windows * 2, max_answer_len=1)
    assert twice["score"] == pytest.approx(2 * first["score"])


def test_no_answer_may_be_the_answer(bert):
    windows = logits(bert, "a b", [-9, -9], [-9, -9])
    assert bert.postprocess(windows)["answer"]
    result = bert.postprocess(windows, handle_impossible_answer=True)
    assert (result["answer"], result["start"], result["end"]) == ("", 0, 0)
    assert result["score"] > 0.99


def test_where_every_token_is_barred_there_is_no_answer(bert):
    (window,) = logits(bert, "a b", [1, 2], [1, 2])
    window["p_mask"] = [1] * len(window["p_mask"])
    nothing = {"answer": None, "score": 0.0, "start": None, "end": None}
    assert bert.postprocess([window]) == nothing
    assert bert.postprocess([window], top_k=2) == {**nothing, "answers": []}


def test_words_stay_whole_unless_told_otherwise(bert):
    context = "An apprentice"
    (window,) = bert.preprocess(asked(context))
    pieces = [i for i, word in enumerate(window["encoding"].word_ids) if word == 1]
    pieces = [i for i in pieces if window["encoding"].sequence_ids[i] == 1]
    assert len(pieces) > 1
    window["start"] = window["end"] = np.zeros((1, len(window["input_ids"])), np.float32)
    window["start"][0, pieces[-1]] = window["end"][0, pieces[-1]] = 20.0
    assert bert.postprocess([window])["answer"] == "apprentice"
    cut = bert.postprocess([window], align_to_words=False)
    assert "apprentice".endswith(cut["answer"])
    assert cut["answer"] != "apprentice"


@pytest.mark.parametrize("name", ["question", "context"])
@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_text_is_refused(bert, name, text):
    with pytest.raises(RecordError, match=f"the {name} is empty"):
        bert({"question": "Why?", "context": "So.", name: text})


@pytest.mark.parametrize(
    "settings",
    [
        {"max_seq_len": 64, "doc_stride": 65},
        {"max_seq_len": 64, "doc_stride": 64},
        {"doc_stride": -1},
        {"max_seq_len": 0},
        {"max_seq_len": 513},
        {"top_k": 0},
        {"max_answer_len": 0},
    ],
)
def test_settings_that_cannot_be(bert, settings):
    with pytest.raises(UsageError):
        bert(asked(ENGLISH), **settings)


def test_a_question_may_leave_too_little_room(bert):
    question = "who " * 40
    with pytest.raises(
        RecordError, match="the question has 40 tokens, which leaves room for 21 of the context"
    ) as info:
        bert(asked(ENGLISH, question), max_seq_len=64, doc_stride=21)
    assert info.value.kind == "context_length_exceeded"
    assert bert(asked("Yes, so.", question), max_seq_len=64, doc_stride=21)["answer"]  # it fits
    with pytest.raises(RecordError, match="leaves room for 0 of the context"):
        bert(asked("Yes", "who " * 400))


def test_unknown_settings(bert):
    with pytest.raises(TypeError, match="max_question"):
        bert(asked(ENGLISH), max_question=3)


def test_bfloat16_answers_too():
    qa = pipelines.load("extractive_qa", GOLDEN / "bert-qa", LoadOptions(device="cpu", dtype="bfloat16"))
    assert qa(asked(CHINESE))["answer"] in CHINESE


def test_a_tokenizer_without_offsets(bert):
    slow = AutoTokenizer.from_pretrained(GOLDEN / "marian")
    with pytest.raises(ModelUnavailableError, match="does not return the positions of its tokens"):
        type(bert)(model=bert.model, tokenizer=slow)


def test_a_model_without_the_head(encoder):
    (reason,) = pipelines.check_compatibility(encoder, LoadOptions(), ["extractive_qa"]).values()
    assert reason == "bert models of this kind have no question-answering head"
    for name in GROUPS:
        assert pipelines.check_compatibility(GOLDEN / name, LoadOptions(), ["extractive_qa"]) == {"extractive_qa": None}
