"""A server on loopback that speaks as much of the Hugging Face hub's protocol as a push takes.

Datasets are dictionaries of files, a commit each: creating and describing a dataset, listing its
tree, the first and second half of a commit (every file goes in as a regular one), and files by
revision. `huggingface_hub` itself talks to it, in processes whose ``HF_ENDPOINT`` it is.
"""

import base64
import hashlib
import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from flask import Flask, Response, jsonify, request
from werkzeug.serving import make_server

TOKEN = "hf_standin"


@dataclass
class Dataset:
    """The commits of a dataset, each with all of its files."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict[str, dict[str, bytes]])
    branches: dict[str, str] = field(default_factory=dict[str, str])
    messages: list[str] = field(default_factory=list[str])

    def commit(self, files: dict[str, bytes], message: str, branch: str = "main") -> str:
        sha = hashlib.sha1(f"{len(self.commits)}{message}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.messages.append(message)
        return sha


@dataclass
class Hub:
    """The datasets of a stand-in, and what was asked of it."""

    url: str = ""
    datasets: dict[str, Dataset] = field(default_factory=dict[str, Dataset])
    asked: list[str] = field(default_factory=list[str])
    before_commit: list[Callable[[], None]] = field(default_factory=list[Callable[[], None]])

    def files(self, repo: str) -> dict[str, bytes]:
        dataset = self.datasets[repo]
        return dataset.commits[dataset.branches["main"]]


def _oid(content: bytes) -> str:
    """What git calls a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _refused(code: str, status: int) -> Response:
    response = jsonify({"error": code})
    response.status_code = status
    response.headers["X-Error-Code"] = code
    return response


def _app(hub: Hub) -> Flask:
    app = Flask("hub")

    def writes() -> bool:
        return request.headers.get("authorization") == f"Bearer {TOKEN}"

    def found(repo: str, revision: str) -> tuple[Dataset, str] | Response:
        dataset = hub.datasets.get(repo)
        if dataset is None or (dataset.private and not writes()):
            return _refused("RepoNotFound", 404 if writes() else 401)
        sha = dataset.branches.get(revision, revision)
        return (dataset, sha) if sha in dataset.commits else _refused("RevisionNotFound", 404)

    @app.before_request
    def note() -> None:
        hub.asked.append(f"{request.method} {request.path}")

    @app.post("/api/repos/create")
    def create() -> Any:
        if not writes():
            return _refused("", 401)
        asked = request.get_json()
        repo = f"{asked['organization']}/{asked['name']}" if "organization" in asked else ""
        if repo in hub.datasets:
            return _refused("exists", 409)
        assert asked["type"] == "dataset"
        private = asked.get("private", False) or asked.get("visibility") == "private"
        hub.datasets[repo] = Dataset(private)
        hub.datasets[repo].commit({".gitattributes": b"*.bin lfs\n"}, "initial commit")
        return jsonify({"url": f"{hub.url}/datasets/{repo}", "id": repo})

    @app.post("/api/validate-yaml")
    def validate() -> Any:
        return jsonify({"errors": [], "warnings": []})

    @app.get("/api/datasets/<user>/<name>")
    @app.get("/api/datasets/<user>/<name>/revision/<path:revision>")
    def describe(user: str, name: str, revision: str = "main") -> Any:
        repo = found(f"{user}/{name}", revision)
        if isinstance(repo, Response):
            return repo
        dataset, sha = repo
        siblings = [{"rfilename": path} for path in sorted(dataset.commits[sha])]
        about = {"id": f"{user}/{name}", "sha": sha, "private": dataset.private}
        return jsonify({**about, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0})

    @app.get("/api/datasets/<user>/<name>/tree/<revision>")
    @app.get("/api/datasets/<user>/<name>/tree/<revision>/<path:path>")
    def tree(user: str, name: str, revision: str, path: str = "") -> Any:
        repo = found(f"{user}/{name}", revision)
        if isinstance(repo, Response):
            return repo
        files = repo[0].commits[repo[1]]
        below = f"{path}/" if path else ""
        deep = request.args.get("recursive", "").lower() in ("true", "1")
        entries: dict[str, dict[str, Any]] = {}
        for file, content in files.items():
            if not file.startswith(below):
                continue
            parts = file.removeprefix(below).split("/")
            for n in range(1, len(parts) if deep else min(2, len(parts))):
                folder = below + "/".join(parts[:n])
                entries[folder] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": folder}
            if deep or len(parts) == 1:
                entries[file] = _entry(file, content)
        if not entries and path:
            return _refused("EntryNotFound", 404)
        return jsonify(list(entries.values()))

    def _entry(path: str, content: bytes) -> dict[str, Any]:
        return {"type": "file", "oid": _oid(content), "size": len(content), "path": path}

    @app.post("/api/datasets/<user>/<name>/paths-info/<revision>")
    def paths(user: str, name: str, revision: str) -> Any:
        repo = found(f"{user}/{name}", revision)
        if isinstance(repo, Response):
            return repo
        files = repo[0].commits[repo[1]]
        asked = request.form.getlist("paths") or (request.get_json(silent=True) or {})["paths"]
        entries = [_entry(path, files[path]) for path in asked if path in files]
        for path in asked:
            if path not in files and any(file.startswith(f"{path}/") for file in files):
                folder = {"type": "directory", "oid": "0" * 40, "size": 0, "path": path}
                entries.append(folder)
        return jsonify(entries)

    @app.post("/api/datasets/<user>/<name>/preupload/<revision>")
    def preupload(user: str, name: str, revision: str) -> Any:
        repo = found(f"{user}/{name}", revision)
        if isinstance(repo, Response):
            return repo
        files = repo[0].commits[repo[1]]
        return jsonify(
            {
                "files": [
                    {
                        "path": asked["path"],
                        "uploadMode": "regular",
                        "shouldIgnore": False,
                        "oid": _oid(files[asked["path"]]) if asked["path"] in files else None,
                    }
                    for asked in request.get_json()["files"]
                ]
            }
        )

    @app.post("/api/datasets/<user>/<name>/commit/<revision>")
    def commit(user: str, name: str, revision: str) -> Any:
        repo = found(f"{user}/{name}", revision)
        if isinstance(repo, Response):
            return repo
        if not writes():
            return _refused("", 401 if "authorization" not in request.headers else 403)
        while hub.before_commit:
            hub.before_commit.pop()()
        dataset, sha = repo[0], repo[0].branches.get(revision, revision)
        files = dict(dataset.commits[sha])
        lines = [json.loads(line) for line in request.get_data().splitlines() if line.strip()]
        (header,) = (line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, sha):
            return _refused("A commit has happened since.", 412)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "deletedFolder":
                gone = value["path"].rstrip("/") + "/"
                files = {path: each for path, each in files.items() if not path.startswith(gone)}
        oid = dataset.commit(files, header["summary"], revision)
        url = f"{hub.url}/datasets/{user}/{name}/commit/{oid}"
        return jsonify({"success": True, "commitOid": oid, "commitUrl": url})

    @app.get("/datasets/<user>/<name>/resolve/<revision>/<path:path>")
    def resolve(user: str, name: str, revision: str, path: str) -> Any:
        repo = found(f"{user}/{name}", revision)
        if isinstance(repo, Response):
            return repo
        content = repo[0].commits[repo[1]].get(path)
        if content is None:
            return _refused("EntryNotFound", 404)
        response = Response(content, mimetype="application/octet-stream")
        response.headers["X-Repo-Commit"] = repo[1]
        response.headers["ETag"] = f'"{_oid(content)}"'
        return response.make_conditional(request, accept_ranges=True, complete_length=len(content))

    return app


@contextmanager
def standing_in() -> Iterator[Hub]:
    """A hub without datasets, on loopback."""
    hub = Hub()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server("127.0.0.1", 0, _app(hub), threaded=True)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
