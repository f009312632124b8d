"""Models from the hub: huggingface_hub's own client, against a hub on the loopback."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from adapters import make_lora
from hub import Hub, running_hub

pytestmark = pytest.mark.slow

Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]
WEIGHTS = os.urandom(1_500_000)
MODEL = {"config.json": b"{}", "tokenizer.json": b'{"version": "1.0"}', "model.safetensors": WEIGHTS}
PICKLED = {"config.json": b"{}", "pytorch_model.bin": b"pickled"}


@pytest.fixture
def hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty hub, where HF_ENDPOINT sends every process that a test starts."""
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield hub


@pytest.fixture
def run(process: Callable[..., Done]) -> Run:
    """`run("models", "pull", "org/name")`, in a process of its own: huggingface_hub reads its settings at import."""
    return lambda *args, **variables: process(*args, text=True, env=os.environ | variables)


def pulled(done: Done) -> Path:
    """The folder that a pull, or a path, has printed."""
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    return Path(done.stdout.rstrip("\n"))


def refused(done: Done, reason: str) -> str:
    """The one or two lines of an error, after checking its manners."""
    lines = done.stderr.splitlines()
    assert done.returncode == 4, done.stderr
    assert done.stdout == ""
    assert 1 <= len(lines) <= 2, done.stderr
    assert all(line.startswith(("error: ", "hint: ")) for line in lines)
    assert re.search(reason, done.stderr), done.stderr
    return done.stderr


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start(*args: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "llmcli", *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# What is fetched, and where it lies


def test_pull_fetches_safetensors_and_configuration_into_the_shared_cache(hub: Hub, run: Run, home: Path) -> None:
    other_formats = dict.fromkeys(
        ("onnx/model.onnx", "onnx/config.json", "pytorch_model.bin", "flax_model.msgpack", "README.md"), b"not wanted"
    )
    model = MODEL | {
        "2_Dense/config.json": b'{"in_features": 2}',
        "2_Dense/model.safetensors": b"a layer of an encoder",
    }
    commit = hub.add("org/name", model | other_formats, license="mit")

    done = run("models", "pull", "org/name")

    assert pulled(done) == home / "huggingface" / "hub" / "models--org--name" / "snapshots" / commit
    assert contents(pulled(done)) == model
    assert sorted(hub.downloads()) == sorted(model)
    assert done.stderr == "note: pulling org/name, 2 MB from the Hub (license: mit)\n"


def test_license_and_size_are_told_before_the_download(hub: Hub) -> None:
    hub.add("org/name", MODEL, license=None)
    hub.seconds["model.safetensors"] = 30
    pull = start("models", "pull", "org/name")
    assert pull.stderr
    assert pull.stderr.readline() == "note: pulling org/name, 2 MB from the Hub (license: not stated)\n"
    pull.terminate()
    assert pull.wait(timeout=3) == 143


def test_all_shards_are_fetched(hub: Hub, run: Run) -> None:
    sharded = shards("model", "safetensors", 3)
    hub.add("org/name", sharded)
    assert contents(pulled(run("models", "pull", "org/name"))) == sharded


def test_a_second_pull_fetches_nothing_again(hub: Hub, run: Run) -> None:
    hub.add("org/name", MODEL)
    first = pulled(run("models", "pull", "org/name"))
    hub.requests.clear()
    second = run("models", "pull", "org/name")
    assert pulled(second) == first
    assert second.stderr == ""
    assert hub.downloads() == []


def test_a_second_pull_follows_the_branch(hub: Hub, run: Run) -> None:
    hub.add("org/name", MODEL)
    old = pulled(run("models", "pull", "org/name"))
    hub.requests.clear()

    hub.add("org/name", MODEL | {"config.json": b'{"newer": true}'})
    new = pulled(run("models", "pull", "org/name"))

    assert contents(new) == MODEL | {"config.json": b'{"newer": true}'}
    assert hub.downloads() == ["config.json"]
    assert pulled(run("models", "path", "org/name")) == new != old


def test_path_and_offline_pull_ask_the_network_nothing(hub: Hub, run: Run) -> None:
    hub.add("org/name", MODEL)
    folder = pulled(run("models", "pull", "org/name"))
    hub.requests.clear()
    assert pulled(run("models", "path", "org/name")) == folder
    assert pulled(run("models", "path", "org/name", HF_HUB_OFFLINE="1")) == folder
    assert pulled(run("models", "pull", "--offline", "org/name")) == folder
    assert pulled(run("models", "pull", "org/name", HF_HUB_OFFLINE="1")) == folder
    assert hub.requests == []


def test_what_is_not_cached_is_not_fetched_by_path_or_offline(hub: Hub, run: Run) -> None:
    hub.add("org/name", MODEL)
    refused(run("models", "path", "org/name"), "org/name is not cached\n.*`llmcli models pull org/name`")
    refused(run("models", "pull", "--offline", "org/name"), "org/name is not cached, and this call is offline")
    refused(run("models", "pull", "org/name", HF_HUB_OFFLINE="1"), "org/name is not cached, and this call is offline")
    assert hub.requests == []


def test_revisions_lie_side_by_side(hub: Hub, run: Run) -> None:
    older = hub.add("org/name", MODEL)
    newest = hub.add("org/name", MODEL | {"config.json": b'{"newer": true}'})
    branch = hub.add("org/name", MODEL | {"config.json": b'{"try": 1}'}, branch="feature/x")

    for name, commit in {
        "org/name": newest,
        "org/name@feature/x": branch,
        f"org/name@{older}": older,
        f"org/name@{branch[:7]}": branch,
    }.items():
        folder = pulled(run("models", "pull", name))
        assert folder.name == commit
        assert pulled(run("models", "path", name)) == folder


def test_removed_is_gone(hub: Hub, run: Run) -> None:
    hub.add("org/name", MODEL)
    folder = pulled(run("models", "pull", "org/name"))
    assert run("models", "rm", "org/name").returncode == 0
    assert not folder.exists()
    refused(run("models", "path", "org/name"), "org/name is not cached")
    refused(run("models", "rm", "org/name"), "org/name is not cached")


def test_generate_pulls_at_first_use_and_never_asks_again(hub: Hub, run: Run, tiny: Path) -> None:
    hub.add("org/name", tiny)
    generate = ("generate", "-m", "org/name", "the quick", "--max-new-tokens", "8", "--temperature", "0")
    first = run(*generate)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("the quick")
    hub.requests.clear()

    assert run(*generate).stdout == first.stdout
    assert run(*generate, "--offline").stdout == first.stdout
    assert hub.requests == []


# What the hub refuses


def test_missing(hub: Hub, run: Run) -> None:
    for variables in ({}, {"HF_TOKEN": hub.token}):
        refused(
            run("models", "pull", "org/none", **variables),
            f"org/none is not on the Hub.*\n.*{hub.url}/org/none.*HF_TOKEN",
        )


def test_not_a_hub_id(hub: Hub, run: Run) -> None:
    for command in ("pull", "path"):
        refused(run("models", command, "org/na--me"), "org/na--me is not a Hub ID\n.*org/name")


def test_private_needs_a_token(hub: Hub, run: Run) -> None:
    hub.add("org/name", MODEL, private=True)
    refused(run("models", "pull", "org/name"), "org/name is not on the Hub, or is private\n.*HF_TOKEN")
    refused(
        run("models", "pull", "org/name", HF_TOKEN="hf_wrong"),
        "refused access to org/name: Invalid credentials.*\n.*HF_TOKEN",
    )
    assert contents(pulled(run("models", "pull", "org/name", HF_TOKEN=hub.token))) == MODEL


def test_gated_needs_terms_accepted(hub: Hub, run: Run) -> None:
    hub.add("org/name", MODEL, gated=True)
    refused(run("models", "pull", "-q", "org/name"), f"org/name is gated.*\n.*{hub.url}/org/name.*HF_TOKEN")
    refused(run("models", "path", "org/name"), "not cached")
    assert contents(pulled(run("models", "pull", "org/name", HF_TOKEN=hub.token))) == MODEL


def test_files_that_the_token_may_not_read(hub: Hub, run: Run) -> None:
    hub.add("org/name", MODEL)
    hub.capture_errors["/resolve/"] = 403
    refused(
        run("models", "pull", "-q", "org/name", HF_TOKEN=hub.token),
        "refused access to org/name: something is wrong\n.*HF_TOKEN",
    )


def test_unknown_revision(hub: Hub, run: Run) -> None:
    hub.add("org/name", MODEL)
    refused(run("models", "pull", "org/name@v9"), f"org/name has no revision 'v9'\n.*{hub.url}/org/name")
    refused(run("models", "path", "org/name@v9"), "org/name@v9 is not cached")


@pytest.mark.parametrize(("part", "status"), [("/api/models/org/name", 500), ("/resolve/", 501), ("/tree/", 501)])
def test_broken_hub(hub: Hub, run: Run, part: str, status: int) -> None:
    hub.add("org/name", MODEL)
    hub.capture_errors[part] = status
    refused(run("models", "pull", "-q", "org/name"), "org/name.*\n.*again later")
    refused(run("models", "path", "org/name"), "not cached")


def test_unreachable_hub(hub: Hub, run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    refused(
        run("models", "pull", "org/name", HF_ENDPOINT=url), f"connection to the Hub at {url} failed.*\n.*HF_ENDPOINT"
    )


def test_silent_hub(hub: Hub, run: Run) -> None:
    hub.silent = True
    refused(
        run("models", "pull", "org/name", HF_HUB_ETAG_TIMEOUT="1"),
        f"connection to the Hub at {hub.url} failed: timed out",
    )
    hub.silent = False


def test_pickled_weights_only_where_allowed(hub: Hub, run: Run) -> None:
    hub.add("org/name", PICKLED)
    refused(run("models", "pull", "org/name"), "org/name has only pickled weights.*\n.*--allow-pickle")
    assert hub.downloads() == []
    folder = pulled(run("models", "pull", "--allow-pickle", "org/name"))
    assert contents(folder) == PICKLED
    assert pulled(run("models", "path", "--allow-pickle", "org/name")) == folder
    refused(run("models", "path", "org/name"), "not cached")


@pytest.mark.parametrize("files", [{"config.json": b"{}"}, {"model.Q4_0.gguf": b"GGUF"}, {"model.safetensors": b""}])
def test_repository_that_is_no_model(hub: Hub, run: Run, files: Mapping[str, bytes]) -> None:
    hub.add("org/name", files)
    refused(run("models", "pull", "org/name"), "org/name has no model that Transformers can load")
    assert hub.downloads() == []


# What breaks off


def test_download_that_breaks_off_goes_on(hub: Hub, run: Run) -> None:
    big = MODEL | {"model.safetensors": os.urandom(24_000_000)}
    hub.add("org/name", big)
    hub.breaking = ["config.json", "model.safetensors"]
    done = run("models", "pull", "org/name")
    assert contents(pulled(done)) == big
    assert done.stderr.count("\n") == 1
    assert hub.downloads().count("model.safetensors") == 2


def test_download_that_fails_leaves_no_model(hub: Hub, run: Run) -> None:
    hub.add("org/name", MODEL)
    hub.breaking = ["model.safetensors"] * 10
    refused(run("models", "pull", "-q", "org/name"), "connection to the Hub .* failed: peer closed.*\n.*again")
    refused(run("models", "path", "org/name"), "not cached")
    hub.breaking.clear()
    assert contents(pulled(run("models", "pull", "org/name"))) == MODEL


@pytest.mark.parametrize(("how", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_interrupted_pull(hub: Hub, run: Run, home: Path, how: signal.Signals, status: int) -> None:
    sharded = shards("model", "safetensors", 3)
    hub.add("org/name", sharded)
    hub.seconds["model-00002-of-00003.safetensors"] = 30
    pull = start("models", "pull", "-q", "org/name")
    hub.wait_for("GET .*/model-00002-of-00003.safetensors")
    time.sleep(0.5)

    pull.send_signal(how)
    assert pull.wait(timeout=3) == status
    assert pull.communicate() == ("", "")
    assert how == signal.SIGKILL or not list(home.rglob("*.incomplete"))

    refused(run("models", "path", "org/name"), "not cached")
    hub.requests.clear()
    hub.seconds.clear()
    assert contents(pulled(run("models", "pull", "org/name"))) == sharded
    assert "model-00001-of-00003.safetensors" not in hub.downloads()


def test_failed_pull_of_a_newer_revision_keeps_the_older(hub: Hub, run: Run) -> None:
    hub.add("org/name", MODEL)
    folder = pulled(run("models", "pull", "org/name"))
    hub.add("org/name", {name: data + b" " for name, data in MODEL.items()})
    hub.capture_errors["/model.safetensors"] = 403
    refused(run("models", "pull", "-q", "org/name"), "org/name")
    assert pulled(run("models", "path", "org/name")) == folder
    assert contents(folder) == MODEL


def test_half_a_model_of_another_tool_is_completed(hub: Hub, run: Run) -> None:
    sharded = shards("model", "safetensors", 3)
    hub.add("org/name", sharded)
    for file in ("config.json", "model.safetensors.index.json", "model-00001-of-00003.safetensors"):
        other_tool = f"from huggingface_hub import hf_hub_download; hf_hub_download('org/name', '{file}')"
        subprocess.run([sys.executable, "-c", other_tool], check=True)
    refused(run("models", "path", "org/name"), "not cached")
    assert contents(pulled(run("models", "pull", "org/name"))) == sharded


def test_two_pulls_at_once(hub: Hub) -> None:
    hub.add("org/name", MODEL)
    hub.seconds["model.safetensors"] = 2
    pulls = [start("models", "pull", "org/name") for _ in range(2)]
    outputs = [pull.communicate(timeout=30) for pull in pulls]
    assert [pull.returncode for pull in pulls] == [0, 0]
    (first, _), (second, _) = outputs
    assert first == second
    assert contents(Path(first.strip())) == MODEL
    assert sorted(hub.downloads()) == sorted(MODEL)
    assert "being pulled by another process; waiting" in "".join(stderr for _, stderr in outputs)


def shards(stem: str, suffix: str, count: int) -> dict[str, bytes]:
    """A model in several files, with the index that lists them."""
    files = {f"{stem}-{i:05}-of-{count:05}.{suffix}": os.urandom(200_000) for i in range(1, count + 1)}
    index = {"weight_map": {f"layer.{i}": name for i, name in enumerate(files)}}
    return {"config.json": b"{}", f"{stem}.{suffix}.index.json": json.dumps(index).encode()} | files


def test_adapter_is_pulled_with_its_base_model(hub, run, tiny, tmp_path):
    lora = make_lora(tmp_path / "lora", tiny)
    settings = json.loads((lora / "adapter_config.json").read_text()) | {"base_model_name_or_path": "org/base"}
    (lora / "adapter_config.json").write_text(json.dumps(settings))
    hub.add("org/base", tiny)
    hub.add("org/lora", lora, branch="v1")
    command = ["generate", "the quick", "--adapter", "org/lora@v1", "--max-new-tokens", 4, "--temperature", 0]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert "note: base model of the adapter: org/base" in done.stderr
    assert {"adapter_model.safetensors", "model.safetensors"} <= set(hub.downloads())
    assert run(*command, "--offline").stdout == done.stdout
    hub.add("org/pickled", {"adapter_config.json": b"{}", "adapter_model.bin": b"pickled"})
    refused(run("generate", "x", "--adapter", "org/pickled"), "org/pickled has no adapter_model.safetensors")
    refused(run("generate", "x", "-m", "org/lora@v1"), "an adapter with --adapter")
