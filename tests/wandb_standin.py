"""A stand-in for W&B's servers, in a thread of the test: enough for wandb's own client to sweep, log and resume.

The answers have the forms that wandb 0.31 asks for. A sweep's trials are handed out in a fixed order; one that was
preempted (marked so, and ended with another status than 0) is handed out again, as W&B does.
"""

import gzip
import json
import re
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

ENTITY = "entity"
KEY = "k" * 40


@dataclass
class Run:
    """What arrived of a run."""

    name: str
    project: str = ""
    sweep: str | None = None
    display_name: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: dict[int, dict[str, Any]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_codes: list[int] = field(default_factory=list)
    preempting: bool = False
    resumed: int = 0

    def values(self) -> dict[str, Any]:
        """The config without wandb's wrapping and its own entry."""
        return {name: entry["value"] for name, entry in self.config.items() if name != "_wandb"}

    def series(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) of all rows that hold the metric, in the order of W&B's own counter."""
        rows = [self.history[line] for line in sorted(self.history)]
        return [(row["step"], row[metric]) for row in rows if metric in row]

    def bucket(self) -> dict[str, Any]:
        """The run as the client asks for it."""
        last = [json.dumps(self.history[max(self.history)])] if self.history else []
        return {
            "id": f"id-{self.name}",
            "name": self.name,
            "displayName": self.display_name or self.name,
            "config": json.dumps(self.config),
            "wandbConfig": json.dumps({"t": 1}),
            "sweepName": self.sweep,
            "project": _project(self.project),
            "historyLineCount": len(self.history),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps(last),
            "eventsTail": "[]",
            "summaryMetrics": json.dumps(self.summary),
            "tags": [],
        }


@dataclass
class Sweep:
    """A sweep and what is left to hand out."""

    name: str
    config: dict[str, Any]
    text: str
    waiting: list[dict[str, Any]]


class Backend:
    """State of the servers; `runs` and `sweeps` are what tests look at.

    Args:
        trials: Trials of a sweep, at most.
    """

    def __init__(self, trials: int) -> None:
        self.runs: dict[str, Run] = {}
        self.sweeps: dict[str, Sweep] = {}
        self.unknown: list[str] = []
        self.url = ""
        self._trials = trials
        self._agents: dict[str, str] = {}
        self._lock = threading.RLock()

    def environment(self) -> dict[str, str]:
        """Variables that lead wandb here."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY, "WANDB_MODE": "online", "WANDB_ENTITY": ENTITY}

    def answer(self, name: str, variables: Mapping[str, Any]) -> dict[str, Any] | None:
        """The data of a GraphQL operation; None for one that is not known."""
        operation: Callable[[Mapping[str, Any]], dict[str, Any]] | None = getattr(self, f"_op_{name}", None)
        if operation is None:
            self.unknown.append(name)
            return None
        with self._lock:
            return operation(variables)

    def stream(self, run_name: str, body: Mapping[str, Any]) -> None:
        """Lines of a run's files."""
        with self._lock:
            run = self.runs[run_name]
            for name, part in (body.get("files") or {}).items():
                rows = [json.loads(line) for line in part["content"]]
                if name == "wandb-history.jsonl":
                    run.history.update(dict(enumerate(rows, part["offset"])))
                elif name == "wandb-summary.json":
                    run.summary = rows[-1]
            run.preempting = run.preempting or bool(body.get("preempting"))
            if body.get("complete") is not None and body.get("exitcode") is not None:
                self._end(run, body["exitcode"])

    def _end(self, run: Run, exit_code: int) -> None:
        run.exit_codes.append(exit_code)
        if run.preempting and exit_code and run.sweep:
            trial = {"run_id": run.name, "args": {k: v for k, v in run.config.items() if k in self._keys(run.sweep)}}
            self.sweeps[run.sweep].waiting.insert(0, {"type": "resume", **trial})
        run.preempting = False

    def _keys(self, sweep: str) -> set[str]:
        return set(self.sweeps[sweep].config["parameters"])

    def _op_Viewer(self, v: Mapping[str, Any]) -> dict[str, Any]:
        viewer = {"id": "u", "username": "u", "entity": ENTITY, "email": "u@x", "flags": "{}", "admin": False}
        return {"viewer": {**viewer, "name": "u", "teams": {"edges": []}, "apiKeys": {"edges": []}}}

    _op_GetDefaultEntity = _op_Viewer

    def _op_UpsertSweep(self, v: Mapping[str, Any]) -> dict[str, Any]:
        name = uuid.uuid4().hex[:8]
        config = yaml.safe_load(v["config"])
        points = [{key: _point(spec, i) for key, spec in config["parameters"].items()} for i in range(self._trials)]
        waiting = [
            {"type": "run", "run_id": uuid.uuid4().hex[:8], "args": {k: {"value": x} for k, x in point.items()}}
            for point in points
        ]
        self.sweeps[name] = Sweep(name, config, v["config"], waiting)
        sweep = {"name": name, "project": _project(v.get("projectName"))}
        return {"upsertSweep": {"sweep": sweep, "configValidationWarnings": []}}

    def _op_SweepWithRuns(self, v: Mapping[str, Any]) -> dict[str, Any]:
        sweep = self.sweeps[v["sweep"]]
        empty = "description createdAt heartbeatAt updatedAt earlyStopJobRunning bestLoss controller scheduler"
        told = {"id": sweep.name, "name": sweep.name, "method": "grid", "state": "RUNNING", "config": sweep.text}
        return {"project": {"sweep": {**dict.fromkeys(empty.split()), **told, "runs": {"edges": []}}}}

    def _op_CreateAgent(self, v: Mapping[str, Any]) -> dict[str, Any]:
        agent = uuid.uuid4().hex[:8]
        self._agents[agent] = v["sweep"]
        return {"createAgent": {"agent": {"id": agent}}}

    def _op_Heartbeat(self, v: Mapping[str, Any]) -> dict[str, Any]:
        sweep = self.sweeps[self._agents[v["id"]]]
        commands: list[dict[str, Any]] = []
        if not json.loads(v["runState"] or "{}"):
            commands = [{"type": "exit"}]
            if sweep.waiting:
                commands = [{"program": sweep.config["program"], **sweep.waiting.pop(0)}]
        return {"agentHeartbeat": {"agent": {"id": v["id"]}, "commands": json.dumps(commands)}}

    def _op_UpsertBucket(self, v: Mapping[str, Any]) -> dict[str, Any]:
        inserted = v["name"] not in self.runs
        run = self.runs.setdefault(v["name"], Run(v["name"], v.get("project") or ""))
        run.config = json.loads(v["config"]) if v.get("config") else run.config
        run.sweep = v.get("sweep") or run.sweep
        run.display_name = v.get("displayName") or run.display_name
        return {"upsertBucket": {"bucket": run.bucket(), "inserted": inserted}}

    def _op_RunResumeStatus(self, v: Mapping[str, Any]) -> dict[str, Any]:
        run = self.runs.get(v["name"])
        if run is not None:
            run.resumed += 1
        entity = {"id": "e", "name": ENTITY}
        return {"model": {"id": "p", "name": v.get("project"), "entity": entity, "bucket": run and run.bucket()}}

    def _op_CreateRunFiles(self, v: Mapping[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/storage/{v['run']}/{name}"} for name in v["files"]]
        return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}


def _project(name: str | None) -> dict[str, Any]:
    entity = {"id": "e", "name": ENTITY}
    return {"id": "p", "name": name or "uncategorized", "entityName": ENTITY, "entity": entity}


def _point(spec: Mapping[str, Any], number: int) -> Any:
    """The value of a parameter in trial `number`: its choices in turn, or somewhere between its bounds."""
    if "value" in spec:
        return spec["value"]
    if "values" in spec:
        return spec["values"][number % len(spec["values"])]
    return spec["min"] + (spec["max"] - spec["min"]) * (number + 1) / (number + 8)


@contextmanager
def serving(trials: int) -> Iterator[Backend]:
    """A backend that answers on a free port of this machine."""
    backend = Backend(trials)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"backend": backend}))
    backend.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, name="wandb stand-in", daemon=True)
    thread.start()
    try:
        yield backend
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    backend: Backend
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        """Quiet."""

    def handle(self) -> None:
        """A client that hangs up is no fault."""
        try:
            super().handle()
        except ConnectionError:
            return

    def do_GET(self) -> None:
        self._reply({})

    def do_PUT(self) -> None:
        self._body()
        self._reply({})

    def do_POST(self) -> None:
        body = self._body()
        if self.path.endswith("/file_stream"):
            self.backend.stream(self.path.split("/")[-2], json.loads(body or b"{}"))
            self._reply({})
        elif self.path.endswith("/graphql"):
            asked = json.loads(body)
            named = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
            name = asked.get("operationName") or (named[1] if named else "?")
            data = self.backend.answer(name, asked.get("variables") or {})
            self._reply({"data": data} if data else {"errors": [{"message": f"no {name} here"}], "data": None})
        else:
            self._reply({})  # telemetry

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _reply(self, answer: dict[str, Any]) -> None:
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
