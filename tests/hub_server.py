"""A small Hugging Face hub on 127.0.0.1, for tests: folders served as data sets and models.

    with HubServer({"owner/data": folder}) as hub:
        subprocess.run([...], env={**os.environ, **hub.environment(tmp_path)})

It answers what `datasets`, `huggingface_hub` and `transformers` ask of repositories, trees, paths
and files. Each repository has one commit, whose id depends on its content. `hub.fault` may spoil
answers on purpose.
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections open, as the real hub does
    server: "HubServer"
    breaks_off = False  # a fault sets it to have only half of the answer sent

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlsplit(self.path)
        # /api/datasets/OWNER/NAME/WHAT/REVISION/PATH or /datasets/OWNER/NAME/resolve/REVISION/FILE
        pattern = r"(?:/api)?(?:/datasets|/models)?/([^/]+/[^/]+)(?:/([^/]+)/([^/]+)(?:/(.+))?)?"
        match = re.fullmatch(pattern, unquote(url.path))
        repo, what, revision, name = match.groups("") if match else ("", "", "", "")
        hub = self.server
        if repo not in hub.repos:
            return self._missing("RepoNotFound")
        folder, commit = hub.repos[repo], hub.commit(repo)
        if what and revision not in ("main", commit):
            return self._missing("RevisionNotFound")
        if what == "resolve" and (folder / name).is_file():
            return self._file(folder / name, commit)
        content: Any
        if what in ("", "revision"):
            files = [{"rfilename": name} for name in _names(folder)]
            content = {"id": repo, "sha": commit, "siblings": files, "private": False}
        elif what == "tree" and (folder / name).is_dir():
            recursive = parse_qs(url.query).get("recursive", [""])[0].lower() in ("true", "1")
            found = sorted((folder / name).glob("**/*" if recursive else "*"))
            content = [_entry(folder, path.relative_to(folder).as_posix()) for path in found]
        elif what == "paths-info":
            form = parse_qs(body.decode())
            names = form["paths"] if form else json.loads(body)["paths"]
            content = [_entry(folder, name) for name in names if (folder / name).exists()]
        else:
            return self._missing("EntryNotFound")
        return self.answer(200, json.dumps(content).encode(), Content_Type="application/json")

    do_HEAD = do_GET
    do_POST = do_GET

    def answer(self, status: int, data: bytes = b"", **headers: str) -> None:
        """A complete answer. A fault may give one too, such as `handler.answer(503)`."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.breaks_off:
            data = data[: len(data) // 2]
            self.close_connection = True
        if self.command != "HEAD":
            self.wfile.write(data)

    def _missing(self, code: str) -> None:
        self.answer(404, X_Error_Code=code, X_Error_Message=code)

    def _file(self, path: Path, commit: str) -> None:
        hub = self.server
        if self.command == "GET" and hub.fault and hub.fault(self, path):
            return None
        data = path.read_bytes()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_oid(path)}"', "Accept-Ranges": "bytes"}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None:
            return self.answer(200, data, **headers)
        start, stop = int(match[1]), min(int(match[2] or len(data)) + 1, len(data))
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        return self.answer(206, data[start:stop], **headers)


class HubServer(ThreadingHTTPServer):
    """Serves {"owner/name": folder}; `fault(handler, path)` returns True if it answered itself."""

    daemon_threads = True

    def __init__(self, repos: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos = repos
        self.fault: Callable[[Handler, Path], bool] | None = None

    def commit(self, repo: str) -> str:
        state = [f"{name} {_oid(self.repos[repo] / name)}" for name in _names(self.repos[repo])]
        return hashlib.sha1("\n".join(state).encode()).hexdigest()

    def environment(self, cache: Path) -> dict[str, str]:
        """What to add to a child's environment: the libraries read it when they are imported."""
        endpoint = f"http://127.0.0.1:{self.server_port}"
        off = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "NO_PROXY": "127.0.0.1", **off}

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


def _names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def _oid(path: Path) -> str:
    status = path.stat()
    return hashlib.sha1(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()


def _entry(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    kind = "directory" if path.is_dir() else "file"
    return {"type": kind, "path": name, "oid": _oid(path), "size": path.stat().st_size}
