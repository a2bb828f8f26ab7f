# SPDX-License-Identifier: Apache-2.0
"""A bucket of Google Cloud Storage on this machine: of the JSON API what tensorstore asks for.

Objects have generations, and a write or read may be on condition of one.
Source: https://cloud.google.com/storage/docs/json_api/v1/objects
"""

import contextlib
import http.server
import itertools
import json
import threading
import urllib.parse
from collections.abc import Iterator

OBJECTS = "/storage/v1/b/bucket/o"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    objects: dict[str, tuple[int, bytes]] = {}  # noqa: RUF012 replaced in every server
    generations: Iterator[int]
    lock: threading.Lock
    lose_answers = 0  # of so many writes to come

    def do_GET(self):
        path, query = self._parsed()
        if path == OBJECTS:
            names = sorted(
                name for name in self.objects if name.startswith(query.get("prefix", ""))
            )
            items = [{"name": x, "generation": str(self.objects[x][0])} for x in names]
            self._answer(200, json.dumps({"items": items}).encode())
            return
        name = path.removeprefix(f"{OBJECTS}/")
        if name not in self.objects:
            self._answer(404)
            return
        generation, value = self.objects[name]
        if query.get("ifGenerationNotMatch") == str(generation):
            self._answer(304)
        elif query.get("ifGenerationMatch", str(generation)) != str(generation):
            self._answer(412)
        else:
            self._answer(200, value, generation)

    def do_POST(self):
        _, query = self._parsed()
        value = self.rfile.read(int(self.headers["Content-Length"]))
        name = query["name"]
        with self.lock:
            if self._is_refused(name, query):
                self._answer(412)
                return
            generation = next(self.generations)
            self.objects[name] = generation, value
        if Handler.lose_answers:
            Handler.lose_answers -= 1
            self._answer(503)
            return
        facts = {"name": name, "generation": str(generation), "size": str(len(value))}
        self._answer(200, json.dumps(facts).encode())

    def do_DELETE(self):
        path, query = self._parsed()
        name = path.removeprefix(f"{OBJECTS}/")
        with self.lock:
            if self._is_refused(name, query):
                self._answer(412)
            else:
                self._answer(204 if self.objects.pop(name, None) else 404)

    def _is_refused(self, name: str, query: dict[str, str]) -> bool:
        found = str(self.objects.get(name, (0, b""))[0])
        return query.get("ifGenerationMatch", found) != found

    def _parsed(self) -> tuple[str, dict[str, str]]:
        parts = urllib.parse.urlsplit(self.path)
        return urllib.parse.unquote(parts.path), dict(urllib.parse.parse_qsl(parts.query))

    def _answer(self, code: int, body: bytes = b"", generation: int = 0) -> None:
        self.send_response(code)
        if generation:
            self.send_header("x-goog-generation", str(generation))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def bucket() -> Iterator[tuple[dict[str, str], dict[str, tuple[int, bytes]]]]:
    """(environment in which gs://bucket is this one, its objects: generation and bytes by name)."""
    made = type("Made", (Handler,), {
        "objects": {}, "generations": itertools.count(1_000), "lock": threading.Lock(),
    })  # fmt: skip
    server = http.server.ThreadingHTTPServer(("localhost", 0), made)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield (
            {
                "TENSORSTORE_GCS_HTTP_URL": f"http://localhost:{server.server_port}",
                "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            },
            made.objects,
        )
    finally:
        server.shutdown()
        server.server_close()
