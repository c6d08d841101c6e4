"""A stand-in for a W&B server on 127.0.0.1: it answers the few questions that a run with metrics asks, and keeps them.

history: the rows of the run's history, as the server would hold them; a second process that resumes the run is told of
them. requests: (method, path) of all that came.
"""

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

USER = {"id": "u", "entity": "me", "username": "me", "email": "", "flags": "{}", "teams": {"edges": []}}


class WandbServer:
    def __init__(self) -> None:
        self.history: list[dict[str, Any]] = []
        self.ids: set[str] = set()
        self.requests: list[tuple[str, str]] = []
        self.finished: list[int] = []
        keeper = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                keeper.requests.append((self.command, self.path))
                text = json.dumps(keeper.reply(self.path, body)).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_POST = do_PUT = do_CONNECT = answer

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that leave are no event
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def reply(self, path: str, body: bytes) -> dict[str, Any]:
        if path.endswith("/file_stream"):
            sent = json.loads(body)
            if lines := sent.get("files", {}).get("wandb-history.jsonl"):
                self.history[lines["offset"] :] = [json.loads(line) for line in lines["content"]]
            if sent.get("complete"):
                self.finished.append(sent["exitcode"])
            return {"exitcode": None, "limits": {}}
        return {"data": self.graphql(json.loads(body))} if path == "/graphql" else {}

    def graphql(self, asked: dict[str, Any]) -> dict[str, Any]:
        given = asked.get("variables") or {}
        entity = {"id": "e", "name": "me"}
        match asked.get("operationName"):
            case "RunResumeStatus":
                known = given["name"] in self.ids
                bucket = {
                    "id": "r", "name": given["name"], "displayName": "d", "config": "{}", "wandbConfig": '{"t": 1}',
                    "summaryMetrics": "{}", "tags": [], "logLineCount": 0, "eventsLineCount": 0, "eventsTail": "[]",
                    "historyLineCount": len(self.history),
                    "historyTail": json.dumps([json.dumps(row) for row in self.history[-1:]]),
                }  # fmt: skip
                model = {"id": "p", "name": "polarity", "entity": entity, "bucket": bucket if known else None}
                return {"model": model}
            case "UpsertBucket":
                fresh = given["name"] not in self.ids
                self.ids.add(given["name"])
                project = {"id": "p", "name": given["project"], "entity": entity}
                bucket = {
                    "id": "r", "name": given["name"], "displayName": given.get("displayName"), "config": "{}",
                    "sweepName": None, "historyLineCount": len(self.history), "project": project,
                }  # fmt: skip
                return {"upsertBucket": {"bucket": bucket, "inserted": fresh}}
            case "CreateRunFiles":
                files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in given["files"]]
                return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        return {"viewer": USER}
