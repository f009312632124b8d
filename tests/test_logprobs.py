"""Log-probabilities of new tokens, against a computation by hand in float64."""

import json
import math

import pytest
from causal_kinds import FAST_KINDS, generate, load, make_model
from conftest import WORDS
from tokenizers.pre_tokenizers import ByteLevel

from llmcli.errors import RecordError, UsageError
from llmcli.text.constraints import to_grammar

LETTERS = {"max_new_tokens": 12, "suppress_tokens": [*range(261)]}  # no parts of characters
PROMPTS = [" ".join(WORDS[:count]) for count in (2, 9, 5)]


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = make_model(kind, tiny, tmp_path_factory.mktemp(kind))
        return made[kind]

    return make


def by_hand(folder, prompt, tokens):
    """The log-probabilities (T, V) after a prompt and each of its new tokens, from one pass in float64."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    ids = AutoTokenizer.from_pretrained(folder)(prompt)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1]
    return torch.log_softmax(logits, -1)


def tokens_of(pipeline, content):
    """The IDs of an answer's tokens: those of the tiny vocabulary differ in their bytes."""
    letters = sorted(ByteLevel.alphabet(), key=lambda letter: (ord(letter) > 255, letter))
    rest = [byte for byte in range(256) if chr(byte) not in letters]
    table = {letter: ord(letter) if ord(letter) < 256 else rest[ord(letter) - 256] for letter in letters}
    known = {bytes(map(table.get, piece)): id for piece, id in pipeline.tokenizer.get_vocab().items()}
    return [known[bytes(token["bytes"])] for token in content]


def check(folder, pipeline, prompt, output):
    content = output["logprobs"]["content"]
    tokens = tokens_of(pipeline, content)
    assert b"".join(bytes(token["bytes"]) for token in content).decode(errors="replace") == output["generated_text"]
    for step, id, token in zip(by_hand(folder, prompt, tokens), tokens, content, strict=True):
        best = step.topk(3)
        assert token["logprob"] == pytest.approx(step[id].item(), abs=1e-3)
        tops = [other["logprob"] for other in token["top_logprobs"]]
        assert tops == pytest.approx(best.values.tolist(), abs=1e-3)
        assert tokens_of(pipeline, token["top_logprobs"][:1]) == best.indices[:1].tolist()
    mean = math.fsum(token["logprob"] for token in content) / len(content) if content else None
    assert output["mean_logprob"] == (mean and pytest.approx(mean, abs=1e-4))


@pytest.mark.parametrize("kind", FAST_KINDS)
def test_logprobs_equal_float64_alone_and_in_batches(folders, kind):
    folder = folders(kind)
    pipeline = load(folder)
    together = generate(pipeline, PROMPTS, {"max_new_tokens": 12}, logprobs=3)
    alone = [generate(pipeline, [prompt], {"max_new_tokens": 12}, logprobs=3)[0] for prompt in PROMPTS]
    for prompt, *outputs in zip(PROMPTS, together, alone, strict=True):
        for output in outputs:
            check(folder, pipeline, prompt, output)
        assert len({output["generated_text"] for output in outputs}) == 1


def test_logprobs_ignore_sampling_options_and_penalties(folders):
    import torch

    folder = folders("llama")
    pipeline = load(folder)
    torch.manual_seed(1)
    options = {"max_new_tokens": 9, "temperature": 3.0, "top_k": 300, "top_p": 0.99, "repetition_penalty": 1.3}
    for prompt, output in zip(PROMPTS, generate(pipeline, PROMPTS, options, logprobs=3), strict=True):
        check(folder, pipeline, prompt, output)


def test_logprobs_with_a_constraint_are_the_models_own(folders):
    folder = folders("llama")
    pipeline = load(folder)
    grammars = [to_grammar({"choice": ["brown dog", "a fox and a dog"]}), None, to_grammar({"regex": "[0-9]{3}"})]
    outputs = generate(pipeline, PROMPTS, {"max_new_tokens": 30}, logprobs=3, constraints=grammars)
    assert outputs[0]["generated_text"] in ("brown dog", "a fox and a dog")
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        check(folder, pipeline, prompt, output)


def test_logprobs_after_a_shared_beginning(folders):
    folder = folders("llama")
    pipeline = load(folder)
    prompts = [f"{PROMPTS[1]} {word}" for word in WORDS[:3]]
    ids = pipeline.tokenizer(PROMPTS[1])["input_ids"]
    outputs = generate(pipeline, prompts, {"max_new_tokens": 9}, logprobs=3, prefix=(ids, pipeline.prefill(ids)))
    for prompt, output in zip(prompts, outputs, strict=True):
        check(folder, pipeline, prompt, output)


def test_logprobs_leave_out_the_tokens_of_a_stop_text(folders):
    pipeline = load(folders("llama"))
    (whole,) = generate(pipeline, PROMPTS[:1], LETTERS, logprobs=3)
    stop = whole["generated_text"][4:7]
    (cut,) = generate(pipeline, PROMPTS[:1], {**LETTERS, "stop_strings": [stop]}, logprobs=3)
    assert cut["finish_reason"] == "stop"
    count = len(cut["logprobs"]["content"])
    assert cut["logprobs"]["content"] == whole["logprobs"]["content"][:count]
    texts = [token["token"] for token in whole["logprobs"]["content"]]
    assert len("".join(texts[:count])) <= len(cut["generated_text"]) < len("".join(texts[: count + 1]))


def test_logprobs_of_no_tokens_have_no_mean(folders):
    pipeline = load(folders("llama"))
    (first,) = generate(pipeline, PROMPTS[:1], {**LETTERS, "max_new_tokens": 1}, logprobs=0)
    stop = first["generated_text"]
    (output,) = generate(pipeline, PROMPTS[:1], {**LETTERS, "stop_strings": [stop]}, logprobs=0)
    assert (output["logprobs"], output["mean_logprob"]) == ({"content": []}, None)


def test_logprobs_of_several_sequences_are_of_the_first(folders):
    import torch

    folder = folders("llama")
    pipeline = load(folder)
    torch.manual_seed(0)
    options = {**LETTERS, "temperature": 1.5, "num_return_sequences": 3}
    for prompt, output in zip(PROMPTS, generate(pipeline, PROMPTS, options, logprobs=3), strict=True):
        assert len(set(output["generated_texts"])) == 3
        check(folder, pipeline, prompt, output)


def test_logprobs_without_json_warn(tiny, llmcli):
    for options, has_warning in (((), True), (("--lines",), True), (("--json",), False), (("--csv",), False)):
        ran = llmcli("generate", "-m", tiny, "--logprobs", "--max-new-tokens", 1, *options, stdin=b"text\nthe\n")
        assert (ran.exit_status, "--logprobs has no effect" in ran.stderr) == (0, has_warning)


def test_logprobs_with_beams_are_refused(folders):
    with pytest.raises(UsageError, match="--logprobs requires greedy decoding or sampling"):
        generate(load(folders("llama")), PROMPTS, {"num_beams": 2}, logprobs=0)


def test_logprobs_add_up_to_the_score_of_the_answer(folders, llmcli):
    folder = folders("llama")
    (output,) = generate(load(folder), PROMPTS[:1], LETTERS, logprobs=0)
    text = output["generated_text"]
    line = json.dumps({"text": text, "condition": PROMPTS[0]}).encode()
    options = "--condition", "condition", "-m", folder, "--dtype", "float32"
    ran = llmcli("score", "--jsonl", *options, stdin=line)
    assert ran.exit_status == 0, ran.stderr
    (record,) = ran.records
    assert record["tokens"] == len(output["logprobs"]["content"])
    total = math.fsum(token["logprob"] for token in output["logprobs"]["content"])
    assert total == pytest.approx(record["logprob"], abs=1e-2)


def test_logprobs_that_are_not_numbers_fail_the_record(folders):
    import torch

    pipeline = load(folders("llama"))
    torch.nn.init.constant_(pipeline.model.model.norm.weight, torch.nan)
    (output,) = generate(pipeline, PROMPTS[:1], {"max_new_tokens": 3}, logprobs=0)
    assert isinstance(output, RecordError)
    assert output.kind == "not_finite"
