"""Several --endpoint: requests are shared out, and a server that dies costs nothing but time."""

import json
import threading
import time

import pytest
from test_endpoint import Server, lines


@pytest.fixture
def servers(monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.001)
    servers = [Server(), Server()]
    yield servers
    for server in servers:
        stop(server)


def stop(server):
    server.shutdown()
    server.server_close()


@pytest.fixture
def served(llmcli, servers):
    urls = [arg for server in servers for arg in ("--endpoint", server.url)]
    return lambda *args, **settings: llmcli("generate", "--lines", "--json", *urls, *args, **settings)


def answers(ran):
    return [record.get("generated_text") for record in ran.records]


def test_servers_share_requests_and_each_has_its_limit(served, servers):
    texts = [f"slow {i}" for i in range(6)]
    ran = served("--concurrency", 3, stdin=lines(*texts))
    assert (answers(ran), ran.stderr) == ([f"{text}!" for text in texts], "")
    assert [len(server.bodies) for server in servers] == [3, 3]
    assert [server.most_at_once for server in servers] == [3, 3]


def test_faster_server_gets_more_requests(llmcli, servers):
    servers[0].mangle = lambda text: time.sleep(0.2) or f"{text}!"
    args = ("chat", "--lines", "--concurrency", 2, "--endpoint", servers[0].url, "--endpoint", servers[1].url)
    ran = llmcli(*args, stdin=lines(*[f"fine {i}" for i in range(100)]))
    assert ran.stdout.splitlines() == [f"fine {i}!" for i in range(100)]
    assert len(servers[0].bodies) < 10 < 90 < len(servers[1].bodies)


def test_server_that_dies_is_left_out(served, servers):
    texts = [f"slow {i}" for i in range(20)]

    def end():
        while len(servers[0].bodies) < 3:
            time.sleep(0.01)
        stop(servers[0])

    ending = threading.Thread(target=end)
    ending.start()
    ran = served("-m", "tiny", "--concurrency", 2, stdin=lines(*texts))
    ending.join()
    assert (answers(ran), ran.exit_status) == ([f"{text}!" for text in texts], 0)
    url = f"{servers[0].url}/v1/"
    assert ran.stderr == f"warning: {url} is left out: cannot reach {url}\n"
    assert servers[1].most_at_once == 2


@pytest.mark.parametrize("dead", [0, 1])
@pytest.mark.parametrize("name", [(), ("-m", "tiny")])
def test_server_dead_at_start_is_left_out(served, servers, dead, name):
    stop(servers[dead])
    ran = served(*name, stdin=lines("fine 0", "fine 1"))
    assert (answers(ran), ran.exit_status) == (["fine 0!", "fine 1!"], 0)
    assert ran.stderr.count("\n") == ran.stderr.count("warning: ") == 1


def test_all_servers_dead_is_error_of_one(served, servers):
    for server in servers:
        stop(server)
    for name in ((), ("-m", "tiny")):
        ran = served(*name, stdin=lines("fine 0", "fine 1"))
        assert (ran.exit_status, ran.stdout) == (4, "")
        assert ran.stderr.splitlines()[-2:] == [
            f"error: cannot reach {servers[1].url}/v1/", "hint: check that the server is running"
        ]  # fmt: skip


@pytest.mark.parametrize(("kind", "type"), [("broken", "server_error"), ("gone", "server_unreachable")])
def test_request_that_server_cannot_answer_gets_another(served, servers, kind, type):
    ran = served("-m", "tiny", stdin=lines(f"{kind} 0", "flaky 1", "fine 2"))
    assert (answers(ran), ran.records[0]["error"]["type"]) == ([None, "flaky 1!", "fine 2!"], type)
    counts = sorted(server.tries[f"{kind} 0"] for server in servers)
    # A try on a connection that the server has just closed does not reach it.
    assert (counts[0] in (3, 4), counts[1] in (10, 11)) == (True, True)


def test_error_that_all_servers_have_ends_run(served):
    ran = served("-m", "tiny", stdin=lines("unknown", "fine 1"))
    assert (ran.exit_status, ran.stderr.count("warning: ")) == (4, 1)
    assert "error: server returned HTTP 404: Not Found" in ran.stderr


def test_servers_may_change_between_runs(llmcli, servers, tmp_path):
    (tmp_path / "in").write_bytes(lines(*[f"fine {i}" for i in range(20)]))
    args = ("generate", "--lines", "--json", "-f", tmp_path / "in", "-m", "tiny", "--output", tmp_path / "out")
    urls = [server.url for server in servers]
    assert llmcli(*args, "--resume", "--endpoint", urls[0], "--endpoint", urls[0]).exit_status == 0
    whole = (tmp_path / "out").read_bytes()
    (tmp_path / "out").write_bytes(whole[:500])
    assert llmcli(*args, "--resume", "--endpoint", urls[1], "--endpoint", urls[0]).exit_status == 0
    assert (tmp_path / "out").read_bytes() == whole
    assert [json.loads(line)["generated_text"] for line in whole.splitlines()][-1] == "fine 19!"


def test_one_invalid_url_of_several_is_named(llmcli, servers):
    ran = llmcli("chat", "Hi", "--endpoint", servers[0].url, "--endpoint", "localhost:1", "-m", "tiny")
    assert (ran.exit_status, "invalid --endpoint 'localhost:1'" in ran.stderr) == (2, True)
