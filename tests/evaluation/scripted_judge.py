"""A judge with known strengths behind a real OpenAI-compatible endpoint, on the standard library alone.

It recognises contestants by the word before the colon of their answers, and draws every verdict from Davidson's model
with a generator seeded by the request itself: the same request gets the same verdict, in any order, from any thread.
"""

import json
import math
import random
import re
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

ELO_PER_LOGIT = 400 / math.log(10)
ANSWER = re.compile(r"<answer of assistant ([12])>\n(\w+):")


class ScriptedJudge:
    """Serves while it is entered; `requests` holds every body that was answered with 200."""

    def __init__(
        self,
        strengths: Mapping[str, float],
        *,
        first_bonus: float = 0.0,
        seconds: float = 0.0,
        failures: list[tuple[int, dict[str, str]]] | None = None,
        unparsable_share: float = 0.0,
        reply: str | None = None,
    ) -> None:
        """`failures`: statuses and headers that are answered first; `first_bonus`: Elo points of being shown first."""
        self.strengths = strengths
        self.first_bonus = first_bonus
        self.seconds = seconds
        self.failures = list(failures or [])
        self.unparsable_share = unparsable_share
        self.reply = reply
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self._lock = threading.Lock()
        judge = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, headers, answer = judge.handle(body, self.headers.get("Authorization", ""))
                data = json.dumps(answer).encode()
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                """Silent."""

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:
                """A client that was killed hangs up; nobody needs to read that."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.base_url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def handle(self, body: dict[str, Any], key: str) -> tuple[int, dict[str, str], dict[str, Any]]:
        time.sleep(self.seconds)
        with self._lock:
            self.keys.append(key)
            if self.failures:
                status, headers = self.failures.pop(0)
                return status, headers, {"error": {"message": f"scripted failure; you sent {key}", "code": "scripted"}}
            self.requests.append(body)
        text = self.reply if self.reply is not None else self.verdict(body["messages"][-1]["content"])
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        return (
            200,
            {},
            {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage},
        )

    def verdict(self, prompt: str) -> str:
        names = dict(ANSWER.findall(prompt))
        draw = random.Random(prompt)
        if draw.random() < self.unparsable_share:
            return "I would rather not say."
        half = (self.strengths[names["1"]] + self.first_bonus - self.strengths[names["2"]]) / ELO_PER_LOGIT / 2
        weights = [math.exp(half), math.exp(-half), 0.5]
        return f"I compared them.\n{draw.choices('123', weights)[0]}"

    def __enter__(self) -> "ScriptedJudge":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
