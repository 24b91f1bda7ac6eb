"""A small hub: the routes that huggingface_hub's client needs to make, fill and read a model repository."""

import base64
import hashlib
import json
import socket
import threading
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response

TOKEN = "hf_secret"


class Hub:
    """Repositories in memory: files of each commit, commits of each branch."""

    def __init__(self):
        self.commits, self.branches, self.private, self.large, self.requests = {}, {}, {}, {}, []
        self.url = ""

    def commit(self, repo, branch, files):
        sha = hashlib.sha1(f"{repo} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[repo][branch] = sha
        return sha

    def files(self, repo, revision):
        if repo not in self.branches:
            raise HTTPException(404, headers={"X-Error-Code": "RepoNotFound"})
        sha = self.branches[repo].get(revision, revision)
        if sha not in self.commits:
            raise HTTPException(404, headers={"X-Error-Code": "RevisionNotFound"})
        return sha, self.commits[sha]


def make_app(hub):
    app = FastAPI()

    @app.middleware("http")
    async def authorize(request: Request, answer):
        hub.requests.append(f"{request.method} {request.url.path}")
        signed = request.headers.get("authorization") == f"Bearer {TOKEN}"
        open_to_all = request.method in ("HEAD", "GET") and "whoami" not in request.url.path
        if signed or open_to_all or request.url.path.startswith("/upload/"):  # its address is the key
            return await answer(request)
        return Response('{"error": "Invalid credentials"}', 401)

    @app.get("/api/whoami-v2")
    def whoami():
        return {"name": "user", "type": "user"}

    @app.post("/api/repos/create")
    async def create(request: Request):
        asked = await request.json()
        repo = f"{asked['organization']}/{asked['name']}"
        if repo in hub.branches:
            raise HTTPException(409)
        hub.branches[repo], hub.private[repo] = {}, asked.get("visibility") == "private" or asked.get("private", False)
        hub.commit(repo, "main", {})
        return {"url": f"{hub.url}/{repo}"}

    @app.post("/api/validate-yaml")
    def validate():
        return {"warnings": [], "errors": []}

    @app.post("/api/models/{user}/{name}/branch/{branch}")
    def branch(user: str, name: str, branch: str):
        hub.branches[f"{user}/{name}"].setdefault(branch, hub.branches[f"{user}/{name}"]["main"])

    @app.post("/api/models/{user}/{name}/preupload/{revision}")
    async def preupload(request: Request):
        files = (await request.json())["files"]
        mode = {True: "lfs", False: "regular"}
        modes = [{"path": f["path"], "uploadMode": mode[f["path"].endswith(".safetensors")]} for f in files]
        return {"files": [file | {"shouldIgnore": False} for file in modes]}

    @app.post("/{user}/{name}.git/info/lfs/objects/batch")
    async def batch(request: Request):
        objects = (await request.json())["objects"]
        actions = [o | {"actions": {"upload": {"href": f"{hub.url}/upload/{o['oid']}"}}} for o in objects]
        return {"objects": actions, "transfer": "basic"}

    @app.put("/upload/{oid}")
    async def upload(oid: str, request: Request):
        content = await request.body()
        assert hashlib.sha256(content).hexdigest() == oid
        hub.large[oid] = content

    @app.post("/api/models/{user}/{name}/commit/{branch}")
    async def commit(user: str, name: str, branch: str, request: Request):
        repo = f"{user}/{name}"
        files = dict(hub.files(repo, branch)[1])
        for line in (await request.body()).splitlines():
            value = json.loads(line)["value"]
            if "content" in value:
                files[value["path"]] = base64.b64decode(value["content"])
            elif "oid" in value:
                files[value["path"]] = hub.large[value["oid"]]
        sha = hub.commit(repo, branch, files)
        return {"commitUrl": f"{hub.url}/{repo}/commit/{sha}", "commitOid": sha, "success": True}

    @app.get("/api/models/{user}/{name}")
    @app.get("/api/models/{user}/{name}/revision/{revision}")
    def info(user: str, name: str, revision: str = "main"):
        sha, files = hub.files(f"{user}/{name}", revision)
        return {"id": f"{user}/{name}", "sha": sha, "siblings": [{"rfilename": path} for path in files]}

    @app.get("/api/models/{user}/{name}/tree/{revision}")
    def tree(user: str, name: str, revision: str):
        files = hub.files(f"{user}/{name}", revision)[1]
        return [{"type": "file", "path": p, "size": len(c), "oid": _etag(c)} for p, c in files.items()]

    @app.api_route("/{user}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
    def resolve(user: str, name: str, revision: str, path: str):
        sha, files = hub.files(f"{user}/{name}", revision)
        if path not in files:
            raise HTTPException(404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        return Response(files[path], headers={"X-Repo-Commit": sha, "ETag": f'"{_etag(files[path])}"'})

    return app


def _etag(content):
    return hashlib.sha1(content).hexdigest()


@contextmanager
def running():
    """A hub that listens on loopback."""
    hub, taken = Hub(), socket.create_server(("127.0.0.1", 0))
    hub.url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(make_app(hub), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
    thread.start()
    try:
        yield hub
    finally:
        server.should_exit = True
        thread.join()
