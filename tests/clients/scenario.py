"""What a user of the official `miosa` package does in a day; run with the interpreter of one of its environments.

python scenario.py BASE_URL API_KEY STRICT_BASE_URL STRICT_API_KEY

The strict server allows so few requests that its limit is soon met. Each step prints a line. The package is used as it
is; what one of its releases cannot do is skipped by its version, with the reason.
"""

from __future__ import annotations

import importlib.metadata
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import httpx
import miosa
from miosa import errors

VERSION = tuple(int(part) for part in importlib.metadata.version("miosa").split("."))

BINARY = bytes(range(256)) * 17
LARGE = BINARY * 2000
PACKAGE_JSON = b'{\n  "name": "caf\xc3\xa9",\n  "content": "YWJj",\n  "data": {"content": "YWJj"}\n}\n'


class Scenario:
    """The steps, in order: each method that starts with `step_`."""

    def __init__(self, base_url: str, api_key: str, strict_base_url: str, strict_api_key: str) -> None:
        self.base_url = base_url
        self.api_key = api_key
        self.strict_base_url = strict_base_url
        self.strict_api_key = strict_api_key
        self.client = miosa.Miosa(api_key=api_key, base_url=base_url)

    def run(self) -> None:
        for name in [name for name in vars(type(self)) if name.startswith("step_")]:
            began = time.monotonic()
            getattr(self, name)()
            print(f"ok {name[5:]} {time.monotonic() - began:.2f} s", flush=True)

    @property
    def tag(self) -> str:
        return "client-" + "-".join(map(str, VERSION))

    def step_create(self) -> None:
        self.sandbox = self.client.sandboxes.create(
            template_id="miosa-sandbox",
            name=self.tag,
            tags=[self.tag],
            metadata={"k": "v"},
            env={"GREETING": "hello"},
            timeout_sec=900,
            external_user_id="user-1",
        )
        assert self.sandbox.state == "running", self.sandbox.state
        assert self.sandbox.template_id == "miosa-sandbox"
        assert self.sandbox.metadata == {"k": "v"}
        assert self.sandbox.timeout_sec == 900

    def step_wait_until_ready(self) -> None:
        with counted(self.client) as requests:
            assert self.sandbox.wait_until_ready(timeout=30) is True
        # From 1.3.8 on the client fetches the sandbox afterwards; more would mean that it polls.
        assert len(requests) == (2 if VERSION >= (1, 3, 8) else 1), requests
        assert self.sandbox.readiness()["ready"] is True

    def step_find(self) -> None:
        assert self.client.sandboxes.get(self.sandbox.id).id == self.sandbox.id
        assert self.client.sandboxes.get_by_name(self.tag).id == self.sandbox.id
        self.sandbox.refresh()
        assert self.sandbox.tags.set([self.tag, "x"])["tags"] == [self.tag, "x"]

    def step_exec(self) -> None:
        result = self.sandbox.exec.run(
            "echo $GREETING $EXTRA; pwd; echo oops >&2; exit 7",
            {
                "cwd": "/tmp",
                "env": {"EXTRA": "you"},
                "timeout": 30,
            },
        )
        assert (result.stdout, result.stderr, result.exit_code) == ("hello you\n/tmp\n", "oops\n", 7), result
        assert self.sandbox.exec("cd /workspace && pwd").stdout == "/workspace\n"
        timed_out = self.sandbox.exec.run("sleep 30", {"timeout": 1})
        assert timed_out.exit_code == 124, timed_out

    def step_files(self) -> None:
        files = self.sandbox.files
        files.write("/workspace/text.txt", "häh\n")
        assert files.read_text("/workspace/text.txt") == "häh\n"
        files.write("/workspace/binary", BINARY)
        assert files.read("/workspace/binary") == BINARY
        files.write("/workspace/package.json", PACKAGE_JSON)
        assert files.read("/workspace/package.json") == PACKAGE_JSON
        files.write("/workspace/large", LARGE)
        assert files.read("/workspace/large") == LARGE
        files.write("/workspace/empty", b"")
        assert files.read("/workspace/empty") == b""
        files.write("/workspace/a b#.txt", "odd")
        assert self.sandbox.exec.run("cat '/workspace/a b#.txt'").stdout == "odd"
        if VERSION >= (2, 2, 2):  # releases before cut the path of a read at "#"
            assert files.read_text("/workspace/a b#.txt") == "odd"

    def step_list_and_stat(self) -> None:
        files = self.sandbox.files
        files.write_files(
            [{"path": "/workspace/many/1", "data": "one"}, {"path": "/workspace/many/2", "data": b"\xff"}]
        )
        listing = files.list("/workspace", depth=2)
        entries = {entry["path"]: entry for entry in listing["entries"]}
        assert entries["/workspace/many"]["is_dir"] is True
        assert entries["/workspace/many/1"]["size"] == 3
        assert "/workspace/a b#.txt" in entries
        stat = files.stat("/workspace/binary")
        assert (stat["size"], stat["is_dir"], type(stat["mode"])) == (len(BINARY), False, int), stat
        if VERSION >= (1, 1, 0):
            tree = files.tree("/workspace", depth=2)
            assert "many" in [child["name"] for child in tree["children"]], tree
            answer = files.write_many([{"path": "/workspace/many/3", "content": "three"}])
            assert answer["written"] == ["/workspace/many/3"], answer

    def step_watch(self) -> None:
        seen: list[tuple[str, str]] = []
        found = threading.Event()

        def watch() -> None:
            for change in self.sandbox.files.watch_dir("/workspace"):
                seen.append((change.event, change.path))
                if change.path == "/workspace/watched":
                    found.set()
                    return

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        # The client does not tell when its watch is in force, so the file is written until it is.
        for _ in range(40):
            self.sandbox.files.write("/workspace/watched", str(time.monotonic()))
            if found.wait(0.5):
                break
        assert found.is_set(), seen
        watcher.join(10)

    def step_background_process(self) -> None:
        process = self.sandbox.commands.run("echo started; sleep 300", background=True)
        assert process.pid > 0
        assert process.status()["state"] == "running"
        if VERSION >= (1, 1, 0):
            running = [item["pid"] for item in self.sandbox.processes.list() if item["running"]]
            assert running == [process.pid], running
            until(lambda: self.sandbox.processes.logs(process.pid) == "started\n")
            assert next(self.sandbox.processes.stream(process.pid))["line"] == "started\n"
        if VERSION < (2, 6):  # later releases have no such call
            reader = self.sandbox.commands.run("cat > /workspace/stdin", background=True)
            self.sandbox.commands.send_stdin(reader.pid, "typed\n")
            until(lambda: self.sandbox.exec.run("cat /workspace/stdin").stdout == "typed\n")
            reader.kill()
        process.kill()
        until(lambda: process.status()["state"] == "exited")

    def step_stream(self) -> None:
        events = list(self.sandbox.exec.stream("echo one; echo two >&2; printf three; exit 3", {"timeout": 30}))
        said = sorted((event.type, event.data["line"]) for event in events[:-1])
        assert said == [("stderr", "two\n"), ("stdout", "one\n"), ("stdout", "three")], events
        assert (events[-1].type, events[-1].data["exit_code"]) == ("exit", 3), events

    def step_environment_and_logs(self) -> None:
        if VERSION >= (1, 1, 0):
            self.sandbox.env.set([{"key": "LATER", "value": "yes"}])
            assert self.sandbox.exec.run("echo $LATER").stdout == "yes\n"
            self.sandbox.env.delete("LATER")
        assert {"key": "GREETING", "value": "hello"} in self.sandbox.env.list()["vars"]
        assert isinstance(self.sandbox.logs.get(50)["lines"], list)

    def step_expose(self) -> None:
        self.sandbox.files.write("/workspace/site/index.html", "<h1>hello from inside</h1>")
        self.sandbox.commands.run("cd /workspace/site && exec python3 -m http.server 8000", background=True)
        url = urlsplit(self.sandbox.expose(8000))
        assert url.netloc.startswith("8000-"), url

        def fetch() -> httpx.Response:
            # Not every resolver knows that *.localhost is this machine.
            headers = {"host": url.netloc, "authorization": f"Bearer {self.api_key}"}
            return httpx.get(f"http://127.0.0.1:{url.port}/", headers=headers, timeout=10)

        until(lambda: fetch().text == "<h1>hello from inside</h1>")
        assert [item["port"] for item in self.sandbox.previews.list()] == [8000]

    def step_share(self) -> None:
        preview = self.sandbox.previews.create(port=8000, visibility="private")
        share = self.sandbox.previews.share(preview["id"], ttl_seconds=60)
        url = urlsplit(preview["url"])

        def fetch(token: str) -> int:
            headers = {"host": url.netloc, "x-miosa-preview-token": token}
            return httpx.get(f"http://127.0.0.1:{url.port}/", headers=headers, timeout=10).status_code

        assert fetch("wrong") in (401, 403)
        until(lambda: fetch(share["preview_token"]) == 200)
        self.sandbox.previews.revoke_share(preview["id"])
        until(lambda: fetch(share["preview_token"]) in (401, 403))

    def step_templates(self) -> None:
        assert self.client.sandboxes.get_template("miosa-sandbox")["name"]
        assert self.client.sandboxes.list_templates()["data"]

    def step_events(self) -> None:
        destroyed = self.client.sandboxes.create(template_id="miosa-sandbox", tags=[self.tag])
        found = threading.Event()

        def listen() -> None:
            for event in self.sandbox_events(destroyed):
                if event["type"] == "sandbox.destroyed":
                    found.set()
                    return

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        time.sleep(0.5)
        destroyed.destroy()
        assert found.wait(20)
        listener.join(10)

    def sandbox_events(self, sandbox: miosa.Sandbox) -> Iterator[dict[str, object]]:
        return sandbox.events.stream()

    def step_snapshot_restore_and_fork(self) -> None:
        sandbox = self.client.sandboxes.create(template_id="miosa-sandbox", tags=[self.tag], timeout_sec=900)
        sandbox.files.write("/workspace/state", "before")
        count = "i=0; while sleep 0.1; do i=$((i+1)); echo $i > /tmp/count; done"
        sandbox.commands.run(count, background=True)
        until(lambda: counted_to(sandbox) > 0)
        taken = sandbox.create_snapshot("after the set-up")
        assert (taken["comment"], taken["sandbox_id"]) == ("after the set-up", sandbox.id), taken
        sandbox.files.write("/workspace/state", "after")

        back = sandbox.restore_snapshot(taken["id"])
        assert (back.id, back.state) == (sandbox.id, "running"), back.data
        assert back.files.read_text("/workspace/state") == "before"
        goes_on(back)

        fork = back.fork(name=f"{self.tag}-fork")
        assert (fork.state, fork.data["parent_id"]) == ("running", sandbox.id), fork.data
        assert fork.files.read_text("/workspace/state") == "before"
        fork.files.write("/workspace/state", "of the fork")
        goes_on(fork)
        assert back.files.read_text("/workspace/state") == "before"
        fork.destroy()

        quick = back.snapshot()
        listed = {item["id"]: item["status"] for item in back.list_snapshots()}
        assert listed == {taken["id"]: "ready", quick: "ready"}, listed
        back.delete_snapshot(taken["id"])
        assert [item["id"] for item in back.list_snapshots()] == [quick]
        gone = raised(errors.NotFoundError, lambda: back.restore_snapshot(taken["id"]))
        assert "snapshot" in str(gone).lower(), gone
        back.destroy()

    def step_pause_and_resume(self) -> None:
        sandbox = self.client.sandboxes.create(template_id="miosa-sandbox", tags=[self.tag], timeout_sec=900)
        count = "i=0; while sleep 0.1; do i=$((i+1)); echo $i > /tmp/count; done"
        sandbox.commands.run(count, background=True)
        until(lambda: counted_to(sandbox) > 0)
        assert sandbox.pause().state == "paused"
        assert self.client.sandboxes.get(sandbox.id).state == "paused"
        assert sandbox.resume().state == "running"
        goes_on(sandbox)
        if VERSION >= (2, 6):  # earlier releases have no such call
            assert sandbox.stop().state == "paused"
            assert sandbox.resume().state == "running"
            goes_on(sandbox)
        sandbox.destroy()

    def step_build_a_template(self) -> None:
        spec = {
            "from": "miosa-sandbox",
            "steps": [{"run": "mkdir -p site && echo built > site/index.html"}],
            "env": {"FROM_TEMPLATE": "yes"},
            "startCmd": "cd site && exec python3 -m http.server 8000",
            "readyCmd": "curl -sf http://127.0.0.1:8000/",
            "memoryMib": 512,
        }
        assert self.client.sandboxes.validate_build_spec(spec)["valid"] is True
        made = self.client.sandboxes.create_template(name=f"{self.tag} site", build_spec=spec)
        (build,) = self.client.sandboxes.list_template_builds(made["id"])["data"]
        until(lambda: self.client.sandboxes.get_template_build(build["id"])["finished_at"], timeout_s=60)
        ended = self.client.sandboxes.get_template_build(build["id"])
        assert ended["state"] == "ready", ended
        assert self.client.sandboxes.get_template(made["id"])["status"] == "ready"

        sandbox = self.client.sandboxes.create(template_id=made["slug"], tags=[self.tag], timeout_sec=900)
        # What the template started runs already.
        served = sandbox.exec.run("curl -s http://127.0.0.1:8000/; echo $FROM_TEMPLATE", {"timeout": 10})
        assert served.stdout == "built\nyes\n", served
        sandbox.destroy()

    def step_list_of_25(self) -> None:
        listed = self.client.sandboxes.list()
        assert len(listed) >= 25, len(listed)
        assert self.sandbox.id in {sandbox.id for sandbox in listed}

    def step_errors(self) -> None:
        missing = raised(
            errors.NotFoundError, lambda: self.client.sandboxes.get("00000000-0000-4000-8000-000000000000")
        )
        assert "sandbox" in str(missing).lower(), missing
        stranger = miosa.Miosa(api_key="msk_live_wrong", base_url=self.base_url)
        refused = raised(errors.AuthenticationError, stranger.sandboxes.list)
        assert "key" in str(refused), refused
        invalid = raised(
            errors.ValidationError, lambda: self.client.sandboxes.create(template_id="miosa-sandbox", timeout_sec=0)
        )
        assert "timeout_sec" in str(invalid), invalid
        gone = raised(errors.NotFoundError, lambda: self.sandbox.files.stat("/workspace/none"))
        assert "/workspace/none" in str(gone), gone
        if VERSION >= (1, 2, 28):  # earlier releases keep the code to themselves
            codes = [error.code for error in (missing, refused, invalid, gone)]
            assert codes == ["sandbox_not_found", "unauthorized", "validation_error", "not_found"], codes
        assert all(error.request_id.startswith("req_") for error in (missing, refused, invalid))

    def step_rate_limit(self) -> None:
        hasty = miosa.Miosa(api_key=self.strict_api_key, base_url=self.strict_base_url, max_retries=0)

        def use_up() -> None:
            for _ in range(100):
                hasty.sandboxes.list()

        limited = raised(errors.RateLimitError, use_up)
        assert limited.retry_after >= 1, limited
        assert "requests" in str(limited).lower(), limited

    def step_long_exec_runs_once(self) -> None:
        """Longer than the client's patience, twice: kept alive by white space, and repeated by releases before 2.6."""
        client = miosa.Miosa(api_key=self.api_key, base_url=self.base_url, timeout=7)
        patient = client.sandboxes.get(self.sandbox.id)
        result = patient.exec.run("echo x >> /workspace/kept-alive; sleep 9; echo done", {"timeout": 60})
        assert result.stdout == "done\n", result
        assert self.sandbox.files.read_text("/workspace/kept-alive") == "x\n"

        client = miosa.Miosa(api_key=self.api_key, base_url=self.base_url, timeout=2)
        impatient = client.sandboxes.get(self.sandbox.id)
        command = "echo x >> /workspace/repeated; sleep 4; echo done"
        if VERSION < (2, 6):
            assert impatient.exec.run(command, {"timeout": 60}).stdout == "done\n"
        else:
            raised(errors.TimeoutError, lambda: impatient.exec.run(command, {"timeout": 60}))
        assert self.sandbox.files.read_text("/workspace/repeated") == "x\n"

    def step_destroy(self) -> None:
        self.sandbox.destroy()
        assert self.client.sandboxes.get(self.sandbox.id).state == "destroyed"
        refused = raised(errors.MiosaError, lambda: self.client.sandboxes.get_by_name(self.tag))
        assert refused.status_code == 404, refused


def counted_to(sandbox: miosa.Sandbox) -> int:
    """How far a background process of the sandbox has counted."""
    return int(sandbox.exec.run("cat /tmp/count 2>/dev/null || echo 0").stdout or 0)


def goes_on(sandbox: miosa.Sandbox) -> None:
    """Fail unless the process that counts still does."""
    # The file may be read, or have been saved, just when it had been emptied.
    until(lambda: counted_to(sandbox) > 0)
    before = counted_to(sandbox)
    until(lambda: counted_to(sandbox) > before)


@contextmanager
def counted(client: miosa.Miosa) -> Iterator[list[str]]:
    """The paths the client asks for meanwhile."""
    paths: list[str] = []
    hooks = client._transport._client.event_hooks["request"]
    hooks.append(lambda request: paths.append(request.url.path))
    yield paths
    hooks.clear()


def raised(kind: type[Exception], action: Callable[[], object]) -> Exception:
    """What the action raises, which must be of that kind."""
    try:
        action()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def until(holds: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)


if __name__ == "__main__":
    Scenario(*sys.argv[1:]).run()
