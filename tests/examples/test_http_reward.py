"""Tests the HTTP reward with a server in a thread, which gives chosen answers."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from examples.http_reward import HttpReward
from rlhf.inputs.records import Prompt
from rlhf.rewards.functions import FunctionReward, load_function
from tests.rlhf.answers import of_text

Answer = tuple[int, bytes]


class Server(ThreadingHTTPServer):
    """Answers with the length of each response, after other answers if there are any."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[Answer] = []
        self.questions: list[dict[str, Any]] = []


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        question = json.loads(body)
        self.server.questions.append(question)
        if self.server.answers:
            status, answer = self.server.answers.pop(0)
        else:
            scores = [len(response) for response in question["responses"]]
            status, answer = 200, json.dumps({"scores": scores}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Write nothing to stderr."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Record the seconds of each wait instead of waiting."""
    waited: list[float] = []
    monkeypatch.setattr("examples.http_reward.time.sleep", waited.append)
    return waited


def reward_of(server: Server, **settings: Any) -> HttpReward:
    return HttpReward(f"http://127.0.0.1:{server.server_port}/score", **settings)


def ask(reward: Callable[..., list[float]], *responses: str) -> list[float]:
    metas = [{"number": i} for i in range(len(responses))]
    return reward(["p"] * len(responses), list(responses), metas)


def test_responses_go_in_batches_and_come_back_in_order(server: Server) -> None:
    assert ask(reward_of(server, batch_size=2), "a", "bb", "ccc", "", "ccccc") == [1, 2, 3, 0, 5]
    assert [one["responses"] for one in server.questions] == [["a", "bb"], ["ccc", ""], ["ccccc"]]
    assert server.questions[1] == {
        "prompts": ["p", "p"],
        "responses": ["ccc", ""],
        "metas": [{"number": 2}, {"number": 3}],
    }


def test_a_busy_server_is_asked_again_after_longer_and_longer(
    server: Server, waits: list[float]
) -> None:
    server.answers = [(503, b"busy"), (429, b"slow down"), (500, b"")]
    assert ask(reward_of(server, first_wait_seconds=0.5), "four") == [4]
    assert waits == [0.5, 1.0, 2.0]
    assert len(server.questions) == 4


def test_a_server_that_stays_busy_is_given_up(server: Server, waits: list[float]) -> None:
    server.answers = [(503, b"")] * 9
    with pytest.raises(RuntimeError, match=r"/score gave no scores in 3 tries; last: HTTP 503"):
        ask(reward_of(server, num_tries=3), "x")
    assert waits == [1.0, 2.0]


def test_a_refusal_is_final(server: Server, waits: list[float]) -> None:
    server.answers = [(401, b"")]
    with pytest.raises(RuntimeError, match="refused the request: HTTP 401 Unauthorized"):
        ask(reward_of(server), "x")
    assert waits == []


def test_no_server_at_all(server: Server, waits: list[float]) -> None:
    nobody = reward_of(server, num_tries=2)
    server.server_close()
    with pytest.raises(RuntimeError, match=r"in 2 tries; last: URLError: .*[Cc]onnection refused"):
        ask(nobody, "x")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"<html>", "with 2 numbers; it answered b'<html>'"),
        (b'{"score": [1, 2]}', "KeyError: 'scores'"),
        (b'{"scores": [1]}', "1 scores for 2 responses"),
        (b'{"scores": 1}', "TypeError"),
        (b"[1, 2]", "TypeError"),
    ],
)
def test_another_answer_is_shown(server: Server, answer: bytes, message: str) -> None:
    server.answers = [(200, answer)]
    with pytest.raises(RuntimeError, match=message):
        ask(reward_of(server), "x", "y")


def test_ppo_takes_it_by_name() -> None:
    found = load_function("examples.http_reward:score")
    assert isinstance(found, HttpReward)


def test_what_goes_wrong_reaches_the_user(server: Server, waits: list[float]) -> None:
    server.answers = [(404, b"")] * 9
    reward = FunctionReward(reward_of(server), "examples.http_reward:score")
    with pytest.raises(ValueError, match=r"failed on row 0.*refused the request: HTTP 404"):
        reward.score([of_text(Prompt("p"), text) for text in ("x", "y")])
