"""``adapterkern serve``, a real process, over HTTP."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from adapterkern import cli
from tests.support import tiny_chat, tiny_served

pytest.importorskip("fastapi", reason="fastapi is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")
pytestmark = pytest.mark.slow

KEY = "a key"
GOLDEN = Path(__file__).parents[1] / "golden" / "runs"
GREEDY = {"model": "run0", "prompt": "w1 w2", "temperature": 0}
LONG = 3000  # tokens, far more than are generated before the client or the server ends


class Server:
    """A process and its address."""

    def __init__(self, process: "subprocess.Popen[str]", port: int, log: Path) -> None:
        self.process, self.port, self.log = process, port, log

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)

    def send(self, path: str, body: Any = None, key: str | None = KEY) -> http.client.HTTPConnection:
        """A connection whose response has not been read."""
        connection = self.connection()
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        text = body if isinstance(body, str | None) else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, text, headers)
        return connection

    def ask(self, path: str, body: Any = None, key: str | None = KEY) -> tuple[int, Any]:
        with contextlib.closing(self.send(path, body, key)) as connection:
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    def stream(self, path: str, body: dict[str, Any]) -> list[str]:
        with contextlib.closing(self.send(path, body | {"stream": True})) as connection:
            response = connection.getresponse()
            assert response.getheader("content-type") == "text/event-stream; charset=utf-8"
            return events(response.read().decode())

    def until(self, waiting: int, running: int) -> None:
        """Wait for what /health says."""
        end = time.monotonic() + 60
        while (found := self.ask("/health")[1]) != {"status": "ok", "waiting": waiting, "running": running}:
            assert time.monotonic() < end, found
            time.sleep(0.01)

    def end(self, number: int) -> tuple[int, str]:
        """Send a signal; the exit status, and what was written to stderr."""
        self.process.send_signal(number)
        return self.process.wait(timeout=120), self.log.read_text()


def events(text: str) -> list[str]:
    lines = [line for line in text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


@contextlib.contextmanager
def started(folder: Path, runs: list[str], *options: str, **environment: str) -> Iterator[Server]:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "adapterkern", "serve", *runs, "--model", "llama", "--port", "0", *options]
    log = folder / f"{time.monotonic_ns()}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--dtype", "fp32"],
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(root)} | environment,
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"serving (.*) at http://127\.0\.0\.1:(\d+)\n", line)
        assert found, (line, log.read_text())
        yield Server(process, int(found[2]), log)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("served")
    tiny_served.save_runs(made, 8)
    return made


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """Eight adapters, for whose requests a batch waits half a second unless it is full."""
    runs = [f"run{number}" for number in range(8)]
    with started(folder, runs, "--window-ms", "500", "--max-tokens", "64", ADAPTERKERN_API_KEY=KEY) as made:
        yield made


@pytest.fixture(scope="module")
def narrow(folder: Path) -> Iterator[Server]:
    """One request runs and one waits."""
    options = ("--max-batch", "1", "--queue", "1", "--window-ms", "0", "--max-tokens", str(tiny_served.CONTEXT))
    with started(folder, ["run0"], *options) as made:
        yield made


def text_of(ids: list[int]) -> str:
    return str(tiny_chat.tokenizer().decode(ids, skip_special_tokens=True))


def test_eight_clients_with_eight_adapters_at_once_get_what_each_gets_alone(server: Server, folder: Path) -> None:
    def ask(number: int) -> tuple[int, Any]:
        body = {"model": f"run{number}", "prompt": tiny_served.prompt(number), "temperature": 0, "max_tokens": 12}
        return server.ask("/v1/completions", body)

    with ThreadPoolExecutor(8) as clients:
        found = list(clients.map(ask, range(8)))
    expected = [tiny_served.alone(folder, folder / f"run{n}", tiny_served.prompt(n), 12) for n in range(8)]
    assert len({tuple(ids) for ids in expected}) == 8
    for number, ((status, answer), ids) in enumerate(zip(found, expected, strict=True)):
        assert status == 200, answer
        assert (answer["object"], answer["model"]) == ("text_completion", f"run{number}")
        (choice,) = answer["choices"]
        assert choice["text"].strip() == text_of(ids)
        assert choice["finish_reason"] == "length"
        prompt = len(tiny_served.prompt(number).split())
        assert answer["usage"] == {"prompt_tokens": prompt, "completion_tokens": 12, "total_tokens": prompt + 12}


def test_what_is_served(server: Server) -> None:
    assert server.ask("/health", key=None) == (200, {"status": "ok", "waiting": 0, "running": 0})
    status, found = server.ask("/v1/models")
    names = [*(f"run{number}" for number in range(8)), "__base__"]
    assert (status, found["object"], [one["id"] for one in found["data"]]) == (200, "list", names)
    assert server.ask("/v1/models/run3") == (200, found["data"][3])
    status, found = server.ask("/v1/models/run9")
    assert (status, found["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("key", [None, "another", "", KEY + "x"])
@pytest.mark.parametrize("path", ["/v1/models", "/v1/completions"])
def test_no_answer_without_the_key(server: Server, path: str, key: str | None) -> None:
    status, found = server.ask(path, None if path == "/v1/models" else GREEDY, key)
    assert status == 401
    assert found["error"]["code"] == "invalid_api_key"
    assert KEY not in found["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/v1/completions", GREEDY | {"top_k": 3}, 400, "top_k"),
        ("/v1/completions", GREEDY | {"max_tokens": 65}, 400, "max_tokens"),
        ("/v1/chat/completions", GREEDY, 400, "prompt"),
        ("/v1/completions", GREEDY | {"model": "no"}, 404, "model"),
        ("/v1/completions", GREEDY | {"prompt": ["w1"] * 65}, 400, "prompt"),
        ("/v1/completions", "{", 400, None),
        ("/v1/completions", "\xff", 400, None),
        pytest.param("/v1/completions", "x" * (16 * 2**20 + 1), 413, None, id="large"),
        ("/v1/completions", None, 405, None),
        ("/v1/embeddings", GREEDY, 404, None),
    ],
)
def test_errors_are_openais(server: Server, path: str, body: Any, status: int, param: str | None) -> None:
    found = server.ask(path, body)
    assert found[0] == status
    error = found[1]["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


def test_a_stream_is_the_answer_in_pieces(server: Server) -> None:
    body = GREEDY | {"prompt": ["w1 w2", "w3 w4 w5"], "max_tokens": 9}
    whole = server.ask("/v1/completions", body)[1]
    *parts, last, done = server.stream("/v1/completions", body | {"stream_options": {"include_usage": True}})
    assert done == "[DONE]"
    assert json.loads(last)["usage"] == whole["usage"]
    found = [json.loads(part)["choices"][0] for part in parts]
    for index, choice in enumerate(whole["choices"]):
        mine = [one for one in found if one["index"] == index]
        assert len(mine) > 5
        assert "".join(one["text"] for one in mine) == choice["text"]
        assert [one["finish_reason"] for one in mine] == [None] * (len(mine) - 1) + ["length"]


def test_a_chat(server: Server) -> None:
    body = {"model": "run1", "messages": tiny_chat.said("w1 w2"), "max_tokens": 7, "temperature": 1, "seed": 5}
    status, whole = server.ask("/v1/chat/completions", body)
    assert (status, whole["object"]) == (200, "chat.completion")
    assert whole["choices"][0]["message"]["role"] == "assistant"
    assert whole["usage"]["prompt_tokens"] == 2 + 5  # the template adds five
    first, *parts, done = server.stream("/v1/chat/completions", body)
    assert json.loads(first)["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert done == "[DONE]"
    deltas = [json.loads(part)["choices"][0]["delta"] for part in parts]
    assert "".join(delta.get("content", "") for delta in deltas) == whole["choices"][0]["message"]["content"]
    assert json.loads(parts[-1])["choices"][0]["finish_reason"] == "length"


def test_a_full_queue_and_clients_that_leave(narrow: Server) -> None:
    """The first request runs, the second waits, the third is refused; each is dropped when its client leaves."""
    path, body = "/v1/completions", GREEDY | {"max_tokens": LONG}
    first = narrow.send(path, body | {"stream": True})
    assert first.getresponse().read1(6) == b"data: "
    second = narrow.send(path, body)
    narrow.until(waiting=1, running=1)
    with contextlib.closing(narrow.send(path, body)) as third:
        response = third.getresponse()
        assert (response.status, response.getheader("Retry-After")) == (429, "1")
        assert json.loads(response.read())["error"]["code"] == "queue_full"
    leave(second)
    narrow.until(waiting=0, running=1)
    leave(first)
    narrow.until(waiting=0, running=0)
    third = narrow.send(path, body)  # one that runs, and is not streamed
    narrow.until(waiting=0, running=1)
    leave(third)
    narrow.until(waiting=0, running=0)
    assert narrow.ask(path, GREEDY | {"max_tokens": 2})[0] == 200


def leave(connection: http.client.HTTPConnection) -> None:
    sock = connection.sock
    if sock is not None:
        sock.shutdown(socket.SHUT_RDWR)
    connection.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_ends_the_server_after_its_answers(folder: Path, number: signal.Signals) -> None:
    with started(folder, ["run0"], "--window-ms", "0") as server:
        path, body = "/v1/completions", GREEDY | {"max_tokens": 300, "stream": True}
        connection = server.send(path, body)
        response = connection.getresponse()
        begin = response.read1(6)
        status, log = server.end(number)
        assert status == 0, log
        *parts, done = events((begin + response.read()).decode())
        assert done == "[DONE]"
        assert json.loads(parts[-1])["choices"][0]["finish_reason"] == "length"
        assert "Traceback" not in log
        with pytest.raises(ConnectionRefusedError):
            server.ask("/health")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("classification", "classification: expected a run of causal-lm"),
        ("no-run", "no-run: no such folder"),
        ("causal-lm --model no-model", "no-model"),
        ("causal-lm --port 70000", "--port: expected an integer from 0 to 65535, got 70000"),
        ("causal-lm --max-batch 0", "--max-batch: expected an integer >= 1, got 0"),
        ("causal-lm --window-ms -1", "--window-ms: expected a number in [0, 10000], got -1.0"),
        ("causal-lm --queue 0", "--queue: expected an integer >= 1, got 0"),
        ("causal-lm --max-tokens 0", "--max-tokens: expected an integer >= 1, got 0"),
        ("causal-lm --api-key=", "--api-key: expected ASCII characters"),
        (
            "causal-lm --host 203.0.113.1",
            "--host, --port: expected a free address of this machine, got 203.0.113.1:",
        ),
    ],
)
def test_refused_before_anything_is_served(
    line: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(GOLDEN)
    assert cli.main(["serve", *line.split()]) == 1
    assert message in capsys.readouterr().err


def test_a_port_in_use(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(GOLDEN)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", "causal-lm", "--port", str(port)]) == 1
    assert f"--host, --port: expected a free address of this machine, got 127.0.0.1:{port} (" in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delitem(sys.modules, "adapterkern.inference.server.run", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert cli.main(["serve", str(GOLDEN / "causal-lm")]) == 1
    assert "uvicorn" in (message := capsys.readouterr().err)
    assert "pip install 'adapterkern[train,serve]'" in message


@pytest.mark.parametrize(
    ("options", "warned"),
    [(["--host", "0.0.0.0"], True), (["--host", "0.0.0.0", "--api-key", KEY], False), ([], False)],
)
def test_an_open_server_without_a_key_is_warned_of(
    options: list[str], warned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from adapterkern.inference.server import run

    served: list[Any] = []
    stand_in: Callable[..., None] = lambda *_, **settings: served.append(settings)  # noqa: E731
    monkeypatch.setattr(run, "serve", stand_in)
    monkeypatch.chdir(GOLDEN)
    assert cli.main(["serve", "causal-lm", "--model", "backbone", "--port", "0", *options]) == 0
    assert ("anybody who reaches it may use the server; set ADAPTERKERN_API_KEY" in caplog.text) is warned
    assert len(served) == 1
