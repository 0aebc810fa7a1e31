"""A hub of one's own on loopback: the paths and headers of the Hugging Face Hub, and its bad days.

It serves one dataset from a folder, whose main stands at `commit`. `faults` holds, by file name,
what the next downloads of that file shall suffer: a status (429, 503), "break" (the connection ends
in mid-file), "stall" (nothing comes from the middle on) or "change" (bytes of another hash);
"footer of NAME" is for reads of a piece of it. `requests` lists what was asked: (method, path,
Authorization header).
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "1234567890abcdef1234567890abcdef12345678"
NEXT_COMMIT = "234567890abcdef1234567890abcdef123456789"


class Hub:
    """`with Hub("owner/name", folder) as hub:` serves at `hub.endpoint`."""

    def __init__(self, dataset: str, folder: Path) -> None:
        self.dataset, self.folder, self.commit = dataset, folder, COMMIT
        self.faults: dict[str, list[int | str]] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.stalled, self.closed = threading.Event(), threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.closed.set()
        self.server.shutdown()
        self.server.server_close()

    def downloads(self, name: str) -> list[str]:
        """The GET requests for the content of one file."""
        return [p for method, p, _ in self.requests if method == "GET" and p.endswith(f"/{name}")]

    def files(self) -> list[Path]:
        return sorted(p for p in self.folder.rglob("*") if p.is_file())

    def entry(self, path: Path) -> dict[str, Any]:
        """A file or folder as the hub's tree lists it; all but README.md lies in LFS."""
        name = str(path.relative_to(self.folder))
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": COMMIT, "size": 0}
        data = path.read_bytes()
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry = {"type": "file", "path": name, "oid": git, "size": len(data)}
        if name != "README.md":
            sha256 = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 134}
        return entry

    def handler(hub) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: object) -> None:
                pass

            def do_GET(self) -> None:
                hub.answer(self)

            do_HEAD = do_POST = do_GET  # noqa: N815

        return Handler

    def answer(self, http: BaseHTTPRequestHandler) -> None:
        url = urlsplit(http.path)
        path = unquote(url.path)
        self.requests.append((http.command, path, http.headers.get("Authorization")))
        body = http.rfile.read(int(http.headers.get("Content-Length") or 0))
        api, files = f"/api/datasets/{self.dataset}", f"/datasets/{self.dataset}/resolve/"
        if path.startswith(files):
            revision, _, name = path.removeprefix(files).partition("/")
            if revision in ("main", self.commit) and (self.folder / name).is_file():
                self.send_file(http, name)
            else:
                self.send(
                    http, 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"}
                )
        elif path == api or path in (f"{api}/revision/main", f"{api}/revision/{self.commit}"):
            siblings = [{"rfilename": str(p.relative_to(self.folder))} for p in self.files()]
            facts = {"id": self.dataset, "sha": self.commit, "siblings": siblings, "tags": []}
            facts |= {"private": False, "disabled": False, "downloads": 0, "likes": 0}
            self.send(http, 200, facts)
        elif path.startswith(f"{api}/tree/"):
            inside = path.removeprefix(f"{api}/tree/").partition("/")[2]
            recursive = parse_qs(url.query).get("recursive", ["false"])[0].lower() in ("true", "1")
            folder = self.folder / inside
            found = sorted(folder.rglob("*") if recursive else folder.glob("*"))
            self.send(http, 200, [self.entry(p) for p in found])
        elif path.startswith(f"{api}/paths-info/"):
            wanted = (
                json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())["paths"]
            )
            found = [self.folder / name for name in wanted if (self.folder / name).exists()]
            self.send(http, 200, [self.entry(p) for p in found])
        else:
            self.send(
                http, 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
            )

    def send_file(self, http: BaseHTTPRequestHandler, name: str) -> None:
        data = (self.folder / name).read_bytes()
        entry = self.entry(self.folder / name)
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": self.commit, "Accept-Ranges": "bytes"}
        headers |= {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        asked = http.headers.get("Range", "")
        key = f"footer of {name}" if re.search(r"\d$", asked) else name
        fault = self.faults[key].pop(0) if http.command == "GET" and self.faults.get(key) else None
        if isinstance(fault, int):
            self.send(http, fault, {"error": "busy"}, {"Retry-After": "0"})
            return
        if fault == "change":
            data = bytes(len(data))
        status, content = 200, data
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start = int(first) if first else len(data) - int(last)
            stop = min(int(last) + 1, len(data)) if first and last else len(data)
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            status, content = 206, data[start:stop]
        http.send_response(status)
        headers["Content-Length"] = str(len(content))
        for key, value in headers.items():
            http.send_header(key, value)
        http.end_headers()
        if http.command == "HEAD":
            return
        if fault in ("break", "stall"):
            content = content[: len(content) // 2]
            http.close_connection = True
        http.wfile.write(content)
        if fault == "stall":
            self.stalled.set()
            self.closed.wait()

    def send(
        self,
        http: BaseHTTPRequestHandler,
        status: int,
        answer: Any,
        headers: dict[str, str] | None = None,
    ) -> None:
        data = json.dumps(answer).encode()
        http.send_response(status)
        headers = {"Content-Type": "application/json", "X-Repo-Commit": self.commit} | (
            headers or {}
        )
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            http.send_header(key, value)
        http.end_headers()
        if http.command != "HEAD":
            http.wfile.write(data)
