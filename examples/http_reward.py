"""Get a reward from another machine: send batches over HTTP, and try again if it is busy.

    REWARD_URL=http://localhost:8000/score python -m stages.ppo --config configs/ppo/tiny.yaml \\
        --reward.model null --reward.function examples.http_reward:score

The server gets {"prompts": [...], "responses": [...], "metas": [...]} by POST and answers
{"scores": [...]} with a number for each response. Copy the file and change it to fit your server.
Only the standard library is used.
"""

import json
import os
import time
import urllib.error
import urllib.request
from typing import Any

BUSY = (408, 429, 500, 502, 503, 504)
"""HTTP statuses that are worth another try; others, such as 401 or 404, will not change."""


class HttpReward:
    """Scores responses by asking a server."""

    def __init__(
        self,
        url: str,
        *,
        batch_size: int = 32,
        timeout_seconds: float = 60.0,
        num_tries: int = 5,
        first_wait_seconds: float = 1.0,
    ) -> None:
        """Set the server and the limits; each wait between tries is twice the one before."""
        self.url = url
        self.batch_size = batch_size
        self.timeout_seconds = timeout_seconds
        self.num_tries = num_tries
        self.first_wait_seconds = first_wait_seconds

    def __call__(
        self, prompts: list[Any], responses: list[str], metas: list[dict[str, Any]]
    ) -> list[float]:
        """Return one score for each response.

        Raises:
            RuntimeError: the server refused, stayed busy, or answered something else.
        """
        scores: list[float] = []
        for start in range(0, len(responses), self.batch_size):
            batch = slice(start, start + self.batch_size)
            scores += self._ask(
                {
                    "prompts": prompts[batch],
                    "responses": responses[batch],
                    "metas": metas[batch],
                }
            )
        return scores

    def _ask(self, question: dict[str, list[Any]]) -> list[float]:
        request = urllib.request.Request(
            self.url,
            data=json.dumps(question).encode(),
            headers={"Content-Type": "application/json"},
        )
        answer = self._send(request)
        num_responses = len(question["responses"])
        try:
            scores = json.loads(answer)["scores"]
            if len(scores) != num_responses:
                raise ValueError(f"{len(scores)} scores for {num_responses} responses")
        except (ValueError, KeyError, TypeError) as error:
            raise RuntimeError(
                f'{self.url} must answer {{"scores": [...]}} with {num_responses} numbers; it '
                f"answered {answer[:80]!r} ({type(error).__name__}: {error})"
            ) from error
        return scores

    def _send(self, request: urllib.request.Request) -> bytes:
        for number in range(self.num_tries):
            if number:
                time.sleep(self.first_wait_seconds * 2 ** (number - 1))
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_seconds) as answer:
                    return answer.read()
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code} {error.reason}"
                if error.code not in BUSY:
                    raise RuntimeError(f"{self.url} refused the request: {problem}") from error
            except OSError as error:  # no server, no network, no answer in time
                problem = f"{type(error).__name__}: {error}"
        raise RuntimeError(f"{self.url} gave no scores in {self.num_tries} tries; last: {problem}")


score = HttpReward(os.environ.get("REWARD_URL", "http://localhost:8000/score"))
