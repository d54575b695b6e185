"""A small Hugging Face hub on 127.0.0.1, for tests: folders served as data sets and models.

    with HubServer({"owner/data": folder}) as hub:
        subprocess.run([...], env={**os.environ, **hub.environment(tmp_path)})

It answers what `datasets`, `huggingface_hub` and `transformers` ask when they read: repository
information, listings of trees and paths, and files, whole or in ranges. Every repository has one
commit, whose id depends on the content. `hub.fault` may spoil answers on purpose.
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Fault = Callable[["Handler", Path], bool]


class Handler(BaseHTTPRequestHandler):
    """One connection. URLs are those of huggingface.co; data sets have the prefix `datasets/`."""

    protocol_version = "HTTP/1.1"  # keeps connections open, as the real hub does
    server: "Server"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        self.server.hub.requests.append(f"{self.command} {path}")
        if match := re.fullmatch(r"/api/(?:datasets|models)/([^/]+/[^/]+)(?:/(.+))?", path):
            self._api(match[1], match[2] or "", body, query)
        elif match := re.fullmatch(
            r"/(?:datasets/)?([^/]+/[^/]+)/(?:resolve|raw)/([^/]+)/(.+)", path
        ):
            self._file(match[1], match[2], match[3])
        else:
            self._missing("EntryNotFound")

    def _api(self, repo: str, rest: str, body: bytes, query: dict[str, list[str]]) -> None:
        folder = self.server.hub.repos.get(repo)
        if folder is None:
            return self._missing("RepoNotFound")
        what, _, rest = rest.partition("/")
        revision, _, inside = rest.partition("/")
        commit = self.server.hub.commit(repo)
        if what and revision not in ("main", commit):
            return self._missing("RevisionNotFound")
        if what in ("", "revision"):
            files = [{"rfilename": name} for name in _names(folder)]
            return self._json({"id": repo, "sha": commit, "siblings": files, "private": False})
        if what == "tree":
            recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
            if inside and not (folder / inside).exists():
                return self._missing("EntryNotFound")
            return self._json(_entries(folder, inside, recursive))
        if what == "paths-info":
            asked = _asked_paths(body)
            return self._json([_entry(folder, name) for name in asked if (folder / name).exists()])
        self._missing("EntryNotFound")
        return None

    def _file(self, repo: str, revision: str, name: str) -> None:
        hub = self.server.hub
        folder = hub.repos.get(repo)
        if folder is None:
            return self._missing("RepoNotFound")
        if revision not in ("main", hub.commit(repo)):
            return self._missing("RevisionNotFound")
        path = folder / name
        if not path.is_file():
            return self._missing("EntryNotFound")
        if self.command == "GET" and hub.fault and hub.fault(self, path):
            return None
        data = path.read_bytes()
        start, stop = 0, len(data)
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(match[1]), min(stop, int(match[2] or stop) + 1)
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("X-Repo-Commit", hub.commit(repo))
        self.send_header("ETag", f'"{_oid(path)}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(stop - start))
        if "Range" in self.headers:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[start:stop])
        return None

    def _json(self, answer: Any) -> None:
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data if self.command != "HEAD" else b"")

    def _missing(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def refuse(self, status: int) -> None:
        """Answers with an error status instead, for use in a fault."""
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def break_off(self, path: Path) -> None:
        """Sends half of what it promised and drops the connection, for use in a fault."""
        data = path.read_bytes()
        if match := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            data = data[int(match[1]) : int(match[2]) + 1]
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])
        self.wfile.flush()
        self.close_connection = True


class Server(ThreadingHTTPServer):
    hub: "HubServer"
    daemon_threads = True


class HubServer:
    """Serves {"owner/name": folder}; `fault(handler, path)` returns True if it answered itself."""

    def __init__(self, repos: dict[str, Path]) -> None:
        self.repos = repos
        self.requests: list[str] = []
        self.fault: Fault | None = None
        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def commit(self, repo: str) -> str:
        """The 40 hex digits of the repository's only commit."""
        names = _names(self.repos[repo])
        state = [f"{name} {_oid(self.repos[repo] / name)}" for name in names]
        return hashlib.sha1("\n".join(state).encode()).hexdigest()

    def environment(self, cache: Path) -> dict[str, str]:
        """What to add to a child's environment: the libraries read it when they are imported."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


def _names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def _oid(path: Path) -> str:
    return hashlib.sha1(
        f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode()
    ).hexdigest()


def _entry(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
    return {"type": "file", "path": name, "oid": _oid(path), "size": path.stat().st_size}


def _entries(folder: Path, inside: str, recursive: bool) -> list[dict[str, Any]]:
    paths = (folder / inside).rglob("*") if recursive else (folder / inside).iterdir()
    return [_entry(folder, path.relative_to(folder).as_posix()) for path in sorted(paths)]


def _asked_paths(body: bytes) -> list[str]:
    """`paths-info` takes its paths as JSON or as a form."""
    try:
        paths = json.loads(body)["paths"]
    except ValueError:
        paths = parse_qs(body.decode())["paths"]
    return [paths] if isinstance(paths, str) else paths
