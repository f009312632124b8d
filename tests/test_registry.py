"""Names -> models, the user's overlay and configuration, and what is wrong with them."""

from pathlib import Path

import pytest

from llmcli import config
from llmcli.errors import ModelUnavailableError, UsageError
from llmcli.models import registry
from llmcli.models.registry import FolderSource, GgufSource, HubSource, WheelSource


def written(home: Path, name: str, text: str) -> None:
    """Put a file of the user's into the configuration folder."""
    path = home / "config" / "llmcli" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    registry.models.cache_clear()
    config.settings.cache_clear()


@pytest.fixture
def own(home: Path):
    """Write the user's models.toml."""
    return lambda text: written(home, "models.toml", text)


@pytest.fixture
def configured(home: Path):
    """Write the user's config.toml."""
    return lambda text: written(home, "config.toml", text)


def test_the_default_is_in_the_registry():
    for task in ("generate", "chat"):
        assert task in registry.models()[registry.default_names(task, "en", "fr")[-1]].tasks


def test_every_model_says_where_it_comes_from_and_under_which_license():
    for spec in registry.models().values():
        assert spec.license
        assert spec.description
        assert isinstance(spec.source, HubSource | WheelSource)


def test_a_name_is_an_alias_then_a_path_then_a_hub_id(tmp_path, monkeypatch, own):
    monkeypatch.chdir(tmp_path)
    for folder in ("gpt2", "org/local"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "x.gguf").touch()
    assert registry.resolve("gpt2").source == HubSource("openai-community/gpt2", "607a30d")
    assert registry.resolve("./gpt2").source == FolderSource(tmp_path / "gpt2")
    assert registry.resolve("org/local").source == FolderSource(tmp_path / "org/local")
    assert registry.resolve("org/remote").source == HubSource("org/remote")
    assert registry.resolve("org/remote@refs/pr/1").source == HubSource("org/remote", "refs/pr/1")
    assert registry.resolve("x.gguf").source == GgufSource(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("name", "says"),
    [("smolm2", "did you mean 'smollm2'"), ("./missing", "does not exist"), ("missing.gguf", "does not exist"),
     ("a/b/c", "unknown model"), ("", "unknown model"), ("/etc/passwd", "neither a model directory nor a .gguf file")],
)  # fmt: skip
def test_a_name_that_is_nothing(llmcli, name, says):
    ran = llmcli("generate", "x", "-m", name)
    assert ran.exit_status == 4
    assert says in ran.stderr
    assert len(ran.stderr.splitlines()) <= 2


def test_the_users_models_are_laid_over_ours(own):
    own('[mine]\nhub = "me/mine@v1"\nlicense = "MIT"\n[smollm2]\npath = "/models/smollm2"\n')
    assert registry.resolve("mine").source == HubSource("me/mine", "v1")
    assert registry.resolve("smollm2").source == FolderSource(Path("/models/smollm2"))
    own('[near]\npath = "weights"\n')
    assert registry.resolve("near").source == FolderSource(config.config_file().with_name("weights"))
    assert "gpt2" in registry.models()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[mine]\nhubb = "a/b"', "unknown key 'hubb'; did you mean 'hub'"),
        ('[mine]\nlicense = "MIT"', "needs exactly one of hub, wheels, path"),
        ('[mine]\nhub = "a/b"\npath = "/x"', "needs exactly one"),
        ('[mine]\nwheels = ["a==1"]\nfiles = ["a"]', "'sha256' is required by 'wheels'"),
        ('[mine]\nhub = "a/b"\nsha256 = "0"', "'sha256' cannot be used with 'hub'"),
        ('[mine]\nhub = "a/b"\nsize = "big"', "'size' must be of type int"),
        ('[mine]\nhub = "a/b"\nsize = true', "'size' must be of type int"),
        ('[mine]\nhub = "nonsense"', "is not a Hub ID"),
        ('mine = "a/b"', "is not a table"),
        ("[mine", "models.toml"),
    ],
)
def test_a_table_that_makes_no_sense(own, llmcli, text, says):
    own(text)
    ran = llmcli("models", "list")
    assert ran.exit_status == 2
    assert says in ran.stderr


def test_configuration_environment_and_option_in_rising_order(configured, monkeypatch, llmcli, tiny):
    configured(f'dtype = "float16"\noffline = true\n[defaults]\ngenerate = "{tiny}"\n')
    assert config.settings().dtype == "float16"
    assert registry.default_names("generate")[0] == str(tiny)
    assert registry.default_names("chat")[0] == "smollm2"
    ran = llmcli("generate", "the", "--json", "--max-new-tokens", 2)
    assert ran.records[0]["model"] == str(tiny)
    assert "offline" in llmcli("generate", "the", "-m", "org/remote").stderr
    monkeypatch.setenv("LLMCLI_DTYPE", "nonsense")
    config.settings.cache_clear()
    with pytest.raises(UsageError, match="unknown dtype"):
        config.settings()


def test_task_without_a_default_has_the_configured_one(configured):
    with pytest.raises(UsageError, match="tag has no default model"):
        registry.default_names("tag")
    configured('[defaults]\ntag = "bert-ner"\n')
    config.settings.cache_clear()
    assert registry.default_names("tag") == ["bert-ner"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("devise = 1", "did you mean 'device'"),
        ("[defaults]\ngenrate = 'x'", "did you mean 'generate'"),
        ("[defaults]\ngenerate = 5", "must be the name of a model"),
        ("dtype = 'int3'", "unknown dtype"),
        ("offline = 1", "must be of type bool"),
        ("x", "config.toml"),
    ],
)
def test_a_configuration_that_makes_no_sense(configured, llmcli, text, says):
    configured(text)
    ran = llmcli("generate", "x")
    assert ran.exit_status == 2
    assert says in ran.stderr


def test_a_named_configuration_has_to_be_there(monkeypatch, tmp_path):
    monkeypatch.setenv("LLMCLI_CONFIG", str(tmp_path / "missing.toml"))
    with pytest.raises(UsageError, match="no such file"):
        config.settings()


def test_an_alias_whose_folder_has_gone_does_not_spoil_the_list(own, llmcli):
    own('[gone]\npath = "/gone/away"\nlicense = "MIT"\n')
    assert llmcli("models", "list").stdout.splitlines()[-1] == "gone\tno\t-\t\tMIT"
    assert llmcli("env").exit_status == 0
    assert llmcli("models", "path", "gone").exit_status == 4


def test_resolve_raises_what_main_turns_into_exit_4():
    with pytest.raises(ModelUnavailableError):
        registry.resolve("nonsense")


def test_list_show_and_env_for_people_and_for_scripts(llmcli):
    names = [record["name"] for record in llmcli("models", "list", "--json").records]
    assert names[:2] == ["smollm2", "gemma3-270m"]
    assert [line.split("\t")[0] for line in llmcli("models", "list").stdout.splitlines()] == names
    (shown,) = llmcli("models", "show", "gpt2", "--json").records
    assert (shown["source"], shown["license"], shown["path"]) == ("hub: openai-community/gpt2@607a30d", "MIT", None)
    assert "openai-community/gpt2" in llmcli("models", "show", "gpt2").stdout
    (about,) = llmcli("env", "--json").records
    assert about["cached"] == []
    assert about["devices"][0].startswith("cpu")
    assert f"transformers     {about['transformers']}\n" in llmcli("env").stdout
