"""Models that think before they answer: what is a thought, where it goes, and how it is turned on and off."""

import json

import pytest
from speakers import CHATML, PARTS, SWITCH, TASKS

NAMED = "{# <think></think> #}"  # a template that knows the marks, without tokens for them
THOUGHT = "{% if m.reasoning_content %}<ponder>\n{{ m.reasoning_content }}\n</ponder>{% endif %}"
WRITES = CHATML.replace("\n{{ m['content']", f"\n{THOUGHT}{{{{ m['content']")
CUTS = CHATML.replace("m['content']", "m['content'].split('[/MULL]')[-1]")
OPENS = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
GREEDY = ("--temperature", 0)
UNFINISHED = "model did not finish its thoughts, so there is no answer: increase --max-new-tokens"


def read(text, reason="stop", *, names=None, prompt="", can_think=True):
    """Return answer, thoughts and finish reason, for a model that has the marks of the text, or those in `names`."""
    from llmcli.text.thoughts import ThoughtFilter, Thoughts, find_marks

    thoughts = Thoughts(find_marks(text if names is None else names), prompt, can_think=can_think)
    answer = thoughts.split(text, reason)
    for size in (1, 2, 3, 5, 100):
        stream = ThoughtFilter(thoughts)
        shown = "".join(stream.feed(text[i : i + size]) for i in range(0, len(text), size))
        assert answer[0].startswith(shown)
    return answer


KINDS = {
    "qwen": ("<think>\n", "\n</think>\n\n"),
    "exaone": ("<thought>\n", "\n</thought>\n\n"),
    "seed": ("<seed:think>", "</seed:think>"),
    "magistral": ("[THINK]", "[/THINK]"),
    "kimi": ("◁think▷", "◁/think▷"),
    "cohere": ("<|START_THINKING|>", "<|END_THINKING|>"),
    "cohere-wrapped": ("<|START_THINKING|>", "<|END_THINKING|><|START_RESPONSE|>"),
    "openthinker": ("<|begin_of_thought|>\n\n", "\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\n"),
    "gemma4": ("<|channel>thought\n", "\n<channel|>"),
    "granite3.2": ("Here is my thought process:\n", "\nHere is my response:\n\n"),
    "granite3.3": ("<think>", "</think><response>"),
    "hunyuan": ("<think>\n", "\n</think>\n<answer>\n"),
    "apertus": ("<|inner_prefix|>", "<|inner_suffix|>"),
    "gpt-oss": ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    "gpt-oss-skipped": ("<|channel|>analysis<|message|>", "assistant<|channel|>final<|message|>"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("can_think", [True, False])
def test_thought_of_each_kind_is_split_off(kind, can_think):
    begin, end = KINDS[kind]
    names = begin + end
    long = " ".join(["It rains."] * 20)
    for answer in ("Rome.", "Rome. " + long):
        for reason in ("stop", "length"):
            assert read(f"{begin}Paris?{end}{answer}", reason, can_think=can_think) == (answer, "Paris?", reason)
        assert read(answer, names=names, can_think=can_think) == (answer, "", "stop")
        assert read(f"{begin}{end}{answer}", names=names, can_think=can_think) == (answer, "", "stop")
    if end.count("<") + end.count("[") + end.count("◁") == 1:  # nothing is around the answer
        assert read(f"{begin}Paris?{end}{begin}Oslo?{end}Rome.") == ("Rome.", "Paris?\n\nOslo?", "stop")
    if "gpt" not in kind:
        opened = read(f"Paris?{end}Rome.", names=names, prompt=f"assistant\n{begin}")
        assert opened == ("Rome.", "Paris?", "stop")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reason", ["stop", "length"])
def test_unfinished_thought_of_each_kind_is_no_answer(kind, reason):
    from llmcli.errors import RecordError

    begin, end = KINDS[kind]
    assert read(f"{begin}Paris?", reason, names=begin + end) == ("", "Paris?", "length")
    with pytest.raises(RecordError, match="did not finish"):
        read(f"{begin}Paris?", reason, names=begin + end, can_think=False)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "gpt" not in kind])
def test_thought_that_prompt_begins_is_closed(kind):
    from llmcli.text.thoughts import close_thought, find_at_end, find_marks

    begin, end = KINDS[kind]
    marks = find_marks(begin + end)
    prompt = close_thought(f"assistant\n{begin}", marks)
    assert prompt.startswith(f"assistant\n{begin.strip()}\n\n")
    assert find_at_end(prompt, marks, 1)
    assert not find_at_end(prompt, marks, 0)
    assert read("Rome.", names=begin + end, prompt=prompt, can_think=False) == ("Rome.", "", "stop")


@pytest.mark.parametrize(
    ("text", "answer", "thoughts"),
    [
        ("<THINK>a</THINK> b", "b", "a"),
        ("<think>a</thinking>b", "b", "a"),
        ("<think>\n</think>\n\n<think>a</think>b", "b", "a"),
        ("<analysis>a</analysis><response>b</response>", "b", "a"),
        ("<think>a</think><answer>b", "b", "a"),
        ("<think>a</think>\n<answer>\nb <answer>c</answer>\n</answer>\n", "b <answer>c</answer>", "a"),
        ("<think>a</think>", "", "a"),
        ("<think>a</think><think>b</think>", "<think>b</think>", "a"),
        ("<think>a</think>\n\n<think> is a tag.", "<think> is a tag.", "a"),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary to=f"
         "<|constrain|>json<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>b", "b", "a\n\n{}"),
        ("<|channel|>final<|message|>b", "b", ""),
        ("Write `</think>` to end.", "Write `</think>` to end.", ""),
        ("End it:\n</think>\nThen answer.", "End it:\n</think>\nThen answer.", ""),
        ("```\n<think>\na\n</think>\n```", "```\n<think>\na\n</think>\n```", ""),
        ("Write\n<think>\na\n</think>\nfirst.", "Write\n<think>\na\n</think>\nfirst.", ""),
        ("<thin>a</thin>", "<thin>a</thin>", ""),
        ("<response>Yes</response>", "<response>Yes</response>", ""),
        ("<b>x</b>", "<b>x</b>", ""),
        ("  hi <", "  hi <", ""),
        ("", "", ""),
    ],
)  # fmt: skip
def test_chat_answer_is_text_after_leading_thoughts(text, answer, thoughts):
    assert read(text) == (answer, thoughts, "stop")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("a\n</think>\n\nb", "b"),
        ("<think>a <think>b</think> c\n</think>\n\nd", "d"),
        ("a\n</think>\n<answer>b</answer>", "b"),
        ("Write `</think>` to end.", "Write `</think>` to end."),
        ("<think>a</think><think>b</think>", ""),
    ],
)
def test_thought_without_begin_counts_if_answer_does(text, answer):
    assert read(text, can_think=False)[0] == answer


def test_marks_that_model_does_not_name_are_text():
    text = "<reasoning>a</reasoning>b"
    assert read(text, names="<think>") == (text, "", "stop")
    assert read("<think>a</think>b", names="content.split('</think>')") == ("b", "a", "stop")


def test_thought_after_closed_thought_may_be_answer():
    closed = "assistant\n<think>\n\n</think>\n\n"
    for text in ("<think>hi</think>", "<think> is a tag"):
        assert read(text, names="<think>", prompt=closed) == (text, "", "stop")
    assert read("<think>hi</think>Rome.", names="<think>", prompt=closed) == ("Rome.", "hi", "stop")


@pytest.mark.parametrize(("task", "switch"), [("qa", SWITCH), ("summarize", ""), ("translate", "")])
def test_thought_before_answer_is_left_out(llmcli, speaker, task, switch):
    folder = speaker(PARTS, CHATML + switch)
    ran = llmcli(task, *TASKS[task], "-m", folder, "--json")
    fields = ran.records[0]
    assert (fields.get("answer") or fields.get("summary_text") or fields.get("translation_text")).strip() == "Rome."
    ran = llmcli(task, *TASKS[task], "-m", folder, is_terminal=True)
    assert "Okay" not in ran.stdout
    assert "think" not in ran.stdout
    assert "Rome." in ran.stdout


SPOKEN = {
    "special": (PARTS, {"special": ("<think>", "</think>")}),
    "added": (PARTS, {}),
    "text": (["<", "thi", "nk>", "\nOkay, so", "\nParis.", "\n</th", "ink", ">\n", "\nRome."],
             {"template": CHATML + NAMED}),
    "open": (PARTS[1:], {"template": OPENS, "begins": "<think>\n"}),
    "cohere": (["<|START_THINKING|>", "Okay, so", "\nParis.", "<|END_THINKING|>", "<|START_RESPONSE|>", "Rome."],
               {"special": ("<|START_THINKING|>", "<|END_THINKING|>", "<|START_RESPONSE|>")}),
    "gpt-oss": (["<|channel|>", "analysis", "<|message|>", "Okay, so", "\nParis.", "<|end|>", "<|start|>", "assistant",
                 "<|channel|>final<|message|>", "Rome."],
                {"special": ("<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|channel|>final<|message|>")}),
    "written": (["<", "ponder>", "\nOkay, so", "\nParis.", "</ponder>", "\n\n", "Rome."], {"template": WRITES}),
    "cut": (["[MULL]", "Okay, so", "\nParis.", "[/MULL]", "\n", "Rome."],
            {"template": CUTS, "special": ("[MULL]", "[/MULL]")}),
    "steps": (["<|think|>", "Okay, so", "\nParis.", "<|end|>", "<|begin|>", "model", "<|content|>", "Rome."],
              {"template": CHATML.replace("\n{{ m['content']", "\n{% if m.thinking %}<|think|>{{ m.thinking }}<|end|>"
                                          "<|begin|>model<|content|>{% endif %}{{ m['content']"),
               "special": ("<|think|>", "<|end|>", "<|begin|>", "<|content|>")}),
    "own": (["<<R>>", "Okay, so", "\nParis.", "<</R>>", "\n", "Rome."],
            {"special": ("<<R>>", "<</R>>"), "response_template": {
                "start_anchor": "assistant\n",
                "fields": {"reasoning_content": {"open": "<<R>>", "close": "<</R>>"}, "content": {}}}}),
}  # fmt: skip


@pytest.mark.parametrize("kind", SPOKEN)
def test_reasoning_of_chat_is_field_of_its_own(llmcli, speaker, kind):
    says, settings = SPOKEN[kind]
    folder = speaker(says, **settings)
    ran = llmcli("chat", "Where?", "-m", folder, *GREEDY, "--json")
    record = ran.records[0]
    assert (record["generated_text"].strip(), record["reasoning"], ran.exit_status) == ("Rome.", "Okay, so\nParis.", 0)
    assert (record["finish_reason"], list(record)[1:3]) == ("stop", ["generated_text", "reasoning"])
    ran = llmcli("chat", "Where?", "-m", folder, *GREEDY)
    assert (ran.stdout.strip(), ran.stderr) == ("Rome.", "")
    ran = llmcli("chat", "Where?", "-m", folder, *GREEDY, is_terminal=True)
    assert ran.stdout.strip() == "Rome."
    shown = ran.stderr.partition("\x1b[2m")[2]
    assert shown.replace("\x1b[0m", "").replace("\x1b[2m", "").replace("\r", "") == "Okay, so\nParis.\n"
    ran = llmcli("chat", "Where?", "-m", folder, *GREEDY, "-q", is_terminal=True)
    assert (ran.stdout.strip(), ran.stderr) == ("Rome.", "")


@pytest.mark.parametrize("count", [1, 4])
def test_unfinished_thought_of_chat_is_empty_answer(llmcli, speaker, count):
    folder = speaker(PARTS)
    args = ("chat", "Where?", "-m", folder, *GREEDY, "--max-new-tokens", count)
    ran = llmcli(*args, "--json")
    record = ran.records[0]
    assert (record["generated_text"], record["finish_reason"], ran.exit_status) == ("", "length", 0)
    assert record.get("reasoning") == {1: None, 4: "Okay, so\nParis."}[count]
    assert ran.stderr == f"warning: {UNFINISHED}\n"
    for is_terminal in (False, True):
        ran = llmcli(*args, is_terminal=is_terminal)
        assert (ran.stdout, ran.stderr.count(UNFINISHED)) == ("\n", 1)
    assert count == 1 or f"Paris.\x1b[0m\nwarning: {UNFINISHED}\n" in ran.stderr


def test_model_that_ends_in_its_thought_has_no_answer(llmcli, speaker):
    ran = llmcli("chat", "Where?", "-m", speaker(PARTS[:2]), *GREEDY, "--json")
    assert (ran.records[0]["generated_text"], ran.records[0]["finish_reason"]) == ("", "length")
    assert ran.records[0]["reasoning"] == "Okay, so"


@pytest.mark.parametrize("task", TASKS)
def test_unfinished_thought_fails_record(llmcli, speaker, task):
    ran = llmcli(task, *TASKS[task], "-m", speaker(PARTS), "--max-new-tokens", 3)
    assert (ran.stdout.strip(), ran.exit_status) == ("", 1)
    assert UNFINISHED in ran.stderr


def test_marks_in_generated_text_stay(llmcli, speaker):
    for template in (None, CHATML + NAMED):
        folder = speaker(PARTS, template, begins="go")
        ran = llmcli("generate", "go", "-m", folder, *GREEDY, "--no-full-text")
        assert ran.stdout == "".join(PARTS) + "\n"
    ran = llmcli("generate", "go", "-m", folder, *GREEDY, "--no-full-text", is_terminal=True)
    assert (ran.stdout, "\x1b[2m" in ran.stderr) == ("".join(PARTS) + "\n", False)
    ran = llmcli("generate", "--think", "x", "-m", folder)
    assert (ran.exit_status, "No such option" in ran.stderr) == (2, True)


def test_answer_with_marks_in_its_middle_stays(llmcli, speaker):
    says = ["Sure:\n", "```\n", "<think>", "\n", "hm", "</think>", " ", "```", " done, and more text for the stream"]
    folder = speaker(says)
    for options in (("--json",), ("--json", "--no-think"), ("--json", "--think")):
        ran = llmcli("chat", "Print tags", "-m", folder, *GREEDY, *options)
        assert (ran.records[0]["generated_text"], "reasoning" in ran.records[0]) == ("".join(says), False)
    for is_terminal in (False, True):
        ran = llmcli("chat", "Print tags", "-m", folder, *GREEDY, is_terminal=is_terminal)
        assert ran.stdout == "".join(says) + "\n"


@pytest.mark.parametrize("task", ["chat", "summarize"])
@pytest.mark.parametrize(
    "options", [("--num-beams", 2), ("--stop", "Okay"), ("--stop", "Par"), ("--temperature", 0.01), ("--stop", "<")]
)
def test_thought_is_cut_with_any_options(llmcli, speaker, task, options):
    options = (*options, *(GREEDY if task == "chat" and options[0] == "--stop" else ()))
    ran = llmcli(task, *TASKS.get(task, ["x"]), "-m", speaker(PARTS), *options)
    assert (ran.stdout.strip(), ran.exit_status) == ("Rome.", 0)


def test_stop_text_after_thought_ends_answer(llmcli, speaker):
    folder = speaker(PARTS)
    for is_terminal in (False, True):
        ran = llmcli("chat", "x", "-m", folder, *GREEDY, "--stop", "me", is_terminal=is_terminal)
        assert ran.stdout == "Ro\n"
    ran = llmcli("chat", "x", "-m", folder, *GREEDY, "--stop", "me", "--json")
    record = ran.records[0]
    assert (record["generated_text"], record["reasoning"]) == ("Ro", "Okay, so\nParis.")
    assert (record["finish_reason"], record["usage"]["completion_tokens"]) == ("stop", 6)


def test_several_answers_have_reasoning_of_the_first(llmcli, speaker):
    ran = llmcli("chat", "Where?", "-m", speaker(PARTS), "-n", 2, "--temperature", 0.01, "--json")
    record = ran.records[0]
    assert [text.strip() for text in record["generated_texts"]] == ["Rome."] * 2
    assert record["reasoning"] == "Okay, so\nParis."


VARIABLES = {
    "enable_thinking": ("{{ enable_thinking | default('unset') }}", "unset", "True", "False"),
    "thinking": ("{{ thinking | default('unset') }}", "unset", "True", "False"),
    "effort": ("{{ reasoning_effort | default('medium') }}", "medium", "medium", "low"),
    "effort-none": ("{{ reasoning_effort | default('none') }}", "none", "high", "none"),
    "mode": ("{{ thinking_mode | default('auto') }}", "auto", "on", "off"),
    "budget": ("{{ thinking_budget | default(-1) }}", "-1", "-1", "0"),
    "lines": ("{% if '/no_think' in messages[0].content %}off{% else %}on{% endif %}", "on", "on", "off"),
    "nemotron": ("{{ 'detailed thinking on' in messages[0].content }}", "False", "True", "False"),
}


@pytest.mark.parametrize("kind", VARIABLES)
def test_think_sets_what_template_reads(llmcli, speaker, prompts, kind):
    source, default, on, off = VARIABLES[kind]
    folder = speaker(["Rome."], f"[{source}]" + CHATML)
    for system in ((), ("-s", "Be brief.")):
        for options, value in (((), default), (("--think",), on), (("--no-think",), off)):
            ran = llmcli("chat", "Where?", *system, "-m", folder, *GREEDY, *options)
            assert (ran.exit_status, ran.stderr) == (0, "")
            assert prompts[-1].startswith(f"[{value}]")
            assert not system or "Be brief." in prompts[-1]
    llmcli("translate", *TASKS["translate"], "-m", folder)
    assert prompts[-1].startswith(f"[{off}]")


def test_prompt_has_thought_as_template_and_option_say(llmcli, speaker, prompts):
    folder = speaker(["Rome."], OPENS)
    for options, end in (((), "<think>\n"), (("--think",), "<think>\n"), (("--no-think",), "<think>\n\n</think>\n\n")):
        llmcli("chat", "Hi", "-m", folder, *options)
        assert prompts[-1].endswith(end)
    for options, end in (((), "<think>\n\n</think>\n\n"), (("--think",), "<think>\n")):
        llmcli("translate", *TASKS["translate"], "-m", folder, *options)
        assert prompts[-1].endswith(end)


def test_translation_with_think_has_reasoning(llmcli, speaker):
    ran = llmcli("translate", *TASKS["translate"], "-m", speaker(PARTS), "--think", "--json")
    assert (ran.records[0]["translation_text"].strip(), ran.records[0]["reasoning"]) == ("Rome.", "Okay, so\nParis.")


def test_template_option_is_variable_of_template(llmcli, speaker, prompts):
    folder = speaker(["Rome."], "[{{ date | default('?') }} {{ n | default(0) + 1 }}]" + CHATML)
    ran = llmcli("chat", "Hi", "-m", folder, "--template-option", "date=1 May", "--template-option", "n=2")
    assert (ran.exit_status, prompts[-1][:9]) == (0, "[1 May 3]")
    for option, message in (
        ("dates=x", "no variable 'dates'"),
        ("tokenize=1", "no variable 'tokenize'"),
        ("content=x", "no variable 'content'"),
        ("=x", "KEY=VALUE"),
        ("x", "KEY=VALUE"),
    ):
        ran = llmcli("chat", "Hi", "-m", folder, "--template-option", option)
        assert (ran.exit_status, message in ran.stderr) == (2, True)


@pytest.mark.parametrize("options", [("--think",), ("--no-think",), ("--template-option", "a=1")])
def test_template_options_without_template_are_refused(llmcli, speaker, options):
    for task in ("summarize", "qa", "chat"):
        ran = llmcli(task, *TASKS.get(task, ["x"]), "-m", speaker(["Rome."], None), *options)
        assert (ran.exit_status, "chat template" in ran.stderr) == (2, True)


def test_think_without_thoughts_warns_once(llmcli, speaker):
    folder = speaker(["Rome."])
    ran = llmcli("chat", "--lines", "-m", folder, *GREEDY, "--think", stdin=b"a\nb\n")
    assert (ran.stdout, ran.stderr.count("--think has no effect")) == ("Rome.\nRome.\n", 1)
    assert llmcli("chat", "a", "-m", folder, *GREEDY, "--no-think").stderr == ""


def test_no_think_that_template_cannot_do_warns(llmcli, speaker):
    ran = llmcli("chat", "a", "-m", speaker(PARTS), *GREEDY, "--no-think")
    assert (ran.stdout, "--no-think has no effect" in ran.stderr) == ("Rome.\n\n", True)
    assert llmcli("chat", "a", "-m", speaker(PARTS, OPENS), *GREEDY, "--no-think").stderr == ""


CHANNELS = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>"
    "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


def test_answer_without_thoughts_has_its_own_channel(llmcli, speaker, prompts):
    special = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")
    folder = speaker(["Rome."], CHANNELS, special, begins="<|message|>", eos="<|end|>", ends=["<|end|>"])
    end = "«<|start|>»assistant«<|channel|>»final«<|message|>»"
    for args in (("--no-think",), ("--choice", "Rome.", "--choice", "Oslo")):
        assert llmcli("chat", "Where?", "-m", folder, *GREEDY, *args).stdout == "Rome.\n"
        assert prompts[-1].endswith(f"Where?«<|end|>»{end}")
    llmcli("classify", "--labels", "Rome.,Oslo", "Where?", "-m", folder)
    assert llmcli("summarize", *TASKS["summarize"], "-m", folder).stdout == "Rome.\n"
    assert prompts[-1].endswith(end)


def test_answer_after_closed_thought_begins_without_space(llmcli, speaker):
    template = CHATML.replace("assistant\n{% endif", "assistant\n<think></think>{% endif")
    folder = speaker(["\n", "Rome."], template, begins="</think>")
    for is_terminal in (False, True):
        assert llmcli("chat", "a", "-m", folder, *GREEDY, is_terminal=is_terminal).stdout == "Rome.\n"


def test_reasoning_can_be_selected_and_renamed(llmcli, speaker):
    folder = speaker(PARTS)
    data = json.dumps({"text": "Where?", "reasoning": "mine"}).encode()
    ran = llmcli(
        "chat", "--jsonl", "-m", folder, *GREEDY, "--select", "reasoning", "--rename", "reasoning=why", stdin=data
    )
    assert ran.records == [{"text": "Where?", "reasoning": "mine", "why": "Okay, so\nParis."}]
    for options, has_column in (((), False), (("--think",), True)):
        ran = llmcli("chat", "--csv", "-m", folder, *GREEDY, *options, stdin=b"text\nWhere?\n")
        assert (ran.exit_status, "reasoning" in ran.stdout.partition("\n")[0]) == (0, has_column)


def test_dimmed_thought_cannot_control_terminal(llmcli, speaker):
    says = ["<think>", "a\x1b[31mred", "</think>", "Rome."]
    ran = llmcli("chat", "Where?", "-m", speaker(says), *GREEDY, is_terminal=True)
    assert "\x1b[31m" not in ran.stderr
    assert "red" in ran.stderr


def test_constrained_answer_is_exact_and_without_thought(llmcli, speaker, prompts):
    folder = speaker(PARTS, OPENS)
    ran = llmcli("chat", "Where?", "-m", folder, "--choice", "b", "--choice", "<answer>c</answer>", "--json")
    assert ran.records[0]["generated_text"] in ("b", "<answer>c</answer>")
    assert "reasoning" not in ran.records[0]
    assert "</think>" in prompts[-1]
    ran = llmcli("chat", "Where?", "-m", folder, "--choice", "b", "--choice", "c", "--think")
    assert (ran.exit_status, "--think cannot be used with --choice" in ran.stderr) == (2, True)


def test_logprobs_are_those_of_the_answer(llmcli, speaker):
    wrapped = [*PARTS[:4], "<answer>", "Rome.", "</answer>"]
    for says, text in ((PARTS, "Rome.\n"), (["Rome.", "\n"], "Rome.\n"), (PARTS[:2], ""), (wrapped, "Rome.")):
        record = llmcli("chat", "Where?", "-m", speaker(says), *GREEDY, "--logprobs", 0, "--json").records[0]
        tokens = [token["token"] for token in record["logprobs"]["content"]]
        assert (record["generated_text"], "".join(tokens)) == (text, text)
