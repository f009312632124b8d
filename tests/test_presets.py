"""generate --preset: fiction, shaped by data."""


def own(home, text):
    folder = home / "config" / "llmcli"
    folder.mkdir(parents=True)
    (folder / "presets.toml").write_text(text)


def test_a_preset_shapes_prompt_and_sampling(llmcli, base, home):
    own(home, '[fable]\nprompt = "A fable. "\nbegins = "Once {text}"\n'
              'options = { do_sample = false, max_new_tokens = 3 }\n')  # fmt: skip
    ran = llmcli("generate", "the fox", "--preset", "fable", "-m", base, "--json")
    assert ran.records[0]["usage"]["completion_tokens"] <= 3
    same = llmcli("generate", "A fable. Once the fox", "--temperature", 0, "--max-new-tokens", 3, "-m", base, "--json")
    assert ran.records[0]["generated_text"] == same.records[0]["generated_text"]
    shown = llmcli("generate", "the fox", "--preset", "fable", "-m", base).stdout
    assert shown == "Once the fox" + same.records[0]["generated_text"] + "\n"


def test_the_command_line_stands_over_the_preset(llmcli, base):
    args = ("generate", "the sea", "--preset", "poem", "-m", base, "--json", "--max-new-tokens", 2)
    first, second = (llmcli(*args, "--temperature", 0).records[0] for _ in range(2))
    assert first == second
    assert first["usage"]["completion_tokens"] <= 2


def test_all_presets_run(llmcli, base):
    for name in ("story", "screenplay", "poem", "dialogue"):
        ran = llmcli("generate", "the fox", "--preset", name, "-m", base, "--max-new-tokens", 2, "--seed", 1)
        assert (ran.stderr, ran.exit_status) == ("", 0)


def test_an_unknown_preset_lists_those_there_are(llmcli, base):
    ran = llmcli("generate", "the fox", "--preset", "pome", "-m", base)
    assert ran.exit_status == 2
    assert "did you mean 'poem'?" in ran.stderr
    assert "presets: story, screenplay, poem, dialogue" in ran.stderr
    ran = llmcli("generate", "the fox", "--preset", "poem", "--prompt", "{text}", "-m", base)
    assert (ran.exit_status, "cannot be used with" in ran.stderr) == (2, True)


def test_only_what_it_begins_with_is_shown(llmcli, base):
    args = ("generate", "the fox", "--preset", "screenplay", "-m", base, "--max-new-tokens", 2, "--temperature", 0)
    shown, alone = llmcli(*args).stdout, llmcli(*args, "--no-full-text").stdout
    assert shown == "FADE IN:\n\nINT." + alone


def test_ones_own_lie_over_ours(llmcli, base, home):
    own(home, '[story]\nprompt = "Say: {text}"\n[fable]\npromt = "A fable: {text}"\n')
    args = ("-m", base, "--max-new-tokens", 2, "--temperature", 0)
    assert llmcli("generate", "the fox", "--preset", "story", *args).stdout == (
        llmcli("generate", "Say: the fox", "--no-full-text", *args).stdout
    )
    assert llmcli("generate", "the fox", "--preset", "poem", *args).exit_status == 0
    ran = llmcli("generate", "the fox", "--preset", "fable", *args)
    assert ran.exit_status == 2
    assert "[fable]: unknown key 'promt'; did you mean 'prompt'?" in ran.stderr
