"""cluster/local-head.sh with a stand-in for `ray`: what it starts and says, and that it ends its own processes only.

With the real Ray the script is run by hand (cluster/README.md): a second Ray beside the one of the test suite would
disturb it.
"""

import importlib.util
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "cluster" / "local-head.sh"

# Answers like the job server, and starts a child in its group and one, as jobs are, in a session of its own. The latter
# and the head itself ignore polite requests when told to.
FAKE_RAY = """#!{python}
import http.server, os, signal, subprocess, sys
if "--fail" in sys.argv:
    sys.exit("fake ray: refused")
options = dict(a.split("=", 1) for a in sys.argv if a.startswith("--") and "=" in a)
token = open(os.environ["RAY_AUTH_TOKEN_PATH"]).read()
assert os.environ["RAY_AUTH_MODE"] == "token" and len(token) == 64
children = [subprocess.Popen(["sleep", "300"]), subprocess.Popen(["sleep", "300"], start_new_session=True)]
print("children", *(c.pid for c in children), flush=True)
print("options", *sys.argv[1:], flush=True)
def end(*_):
    children[0].terminate()
    os._exit(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN if "--stubborn" in sys.argv else end)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.headers["Authorization"] == "Bearer " + token else 401)
        self.end_headers()
http.server.HTTPServer((options["--dashboard-host"], int(options["--dashboard-port"])), Handler).serve_forever()
"""


class Head:
    """The script with its own state, ports and `ray`."""

    def __init__(self, folder: Path) -> None:
        self.state = folder / "state"
        tools = folder / "bin"
        tools.mkdir()
        (tools / "ray").write_text(FAKE_RAY.format(python=sys.executable))
        (tools / "ray").chmod(0o755)
        self.dashboard = free_port()
        script = SCRIPT.read_text().replace("stop_timeout_s=30", "stop_timeout_s=2")
        self.script = folder / "local-head.sh"
        self.script.write_text(script)
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
            "PATH": f"{tools}:{os.environ['PATH']}",
            "DMI_HEAD_DIR": str(self.state),
            "DMI_HEAD_TMP": str(folder / "tmp"),
            "DMI_HEAD_PORT": str(free_port()),
            "DMI_DASHBOARD_PORT": str(self.dashboard),
        }

    def __call__(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        command = ["bash", str(self.script), *arguments]
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False, timeout=60
        )

    def logged(self, word: str) -> list[str]:
        lines = (self.state / "log").read_text().splitlines()
        return next(line.split()[1:] for line in lines if line.startswith(word))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    head = Head(tmp_path)
    yield head
    head("stop")


def test_start_shares_nothing_but_a_private_token_and_stop_ends_everything(head: Head) -> None:
    bystander = subprocess.Popen(["sleep", "300"])
    started = head("start", "--num-cpus=7")
    assert started.returncode == 0, started.stderr
    assert stat.S_IMODE((head.state / "token").stat().st_mode) == 0o600
    assert stat.S_IMODE(head.state.stat().st_mode) == 0o700
    assert {"--dashboard-host=127.0.0.1", "--block"} <= set(head.logged("options"))
    assert head.logged("options")[-1] == "--num-cpus=7", "the user's option comes last and wins"
    assert head("status").returncode == 0

    ours = [int((head.state / "pid").read_text().split()[0]), *(int(p) for p in head.logged("children"))]
    assert all(alive(pid) for pid in ours)
    assert head("stop").returncode == 0
    assert not [pid for pid in ours if alive(pid)]
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()
    assert not (head.state / "token").exists()
    assert head("status").returncode == 1


def test_what_does_not_end_politely_is_killed(head: Head) -> None:
    assert head("start", "--stubborn").returncode == 0
    ours = [int((head.state / "pid").read_text().split()[0]), *(int(p) for p in head.logged("children"))]
    stopped = head("stop")
    assert "killing what did not end in 2 s" in stopped.stderr
    assert not [pid for pid in ours if alive(pid)]


def test_second_start_is_refused_and_the_first_goes_on(head: Head) -> None:
    head("start")
    token = (head.state / "token").read_text()
    again = head("start")
    assert again.returncode == 1
    assert "already running" in again.stderr
    assert (head.state / "token").read_text() == token
    assert head("status").returncode == 0


def test_env_gives_address_and_token_to_a_shell(head: Head) -> None:
    lines = head("env").stdout
    show = 'echo "$RAY_AUTH_MODE $RAY_AUTH_TOKEN_PATH $RAY_API_SERVER_ADDRESS"'
    done = subprocess.run(["bash", "-c", f"{lines}\n{show}"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["token", str(head.state / "token"), f"http://127.0.0.1:{head.dashboard}"]


def test_a_head_that_fails_shows_its_log_and_leaves_nothing(head: Head) -> None:
    failed = head("start", "--fail")
    assert failed.returncode == 1
    assert "fake ray: refused" in failed.stderr
    assert not (head.state / "token").exists()
    assert head("status").returncode == 1


def test_a_port_in_use_is_named_before_anything_starts(head: Head) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", head.dashboard))
        taken.listen()
        failed = head("start")
    assert failed.returncode == 1
    assert f"port {head.dashboard} cannot be used" in failed.stderr
    assert not head.state.exists()


def test_a_reused_process_id_is_not_taken_for_the_head(head: Head) -> None:
    bystander = subprocess.Popen(["sleep", "300"])
    head.state.mkdir()
    (head.state / "pid").write_text(f"{bystander.pid} 1\n")
    assert head("status").returncode == 1
    assert head("stop").returncode == 0
    time.sleep(0.1)
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


def test_without_a_verb_it_prints_how_to_use_it(head: Head) -> None:
    done = head()
    assert done.returncode == 2
    assert "cluster/local-head.sh start" in done.stdout
    assert "set -euo" not in done.stdout


@pytest.fixture(scope="module")
def raylets() -> ModuleType:
    spec = importlib.util.spec_from_file_location("raylets", ROOT / "cluster" / "raylets.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_raylets_passes_the_command_on_with_its_options(raylets: ModuleType) -> None:
    options = raylets.parse(["--nodes", "2", "--", "python", "-c", "x", "--cpus", "9"])
    assert (options.nodes, options.cpus, options.command) == (2, 2, ["python", "-c", "x", "--cpus", "9"])


@pytest.mark.parametrize(
    "arguments", [[], ["--"], ["--nodes", "0", "--", "true"], ["--cpus", "0", "--", "true"]]
)
def test_raylets_without_command_or_nodes_is_refused(raylets: ModuleType, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        raylets.parse(arguments)
    assert caught.value.code == 2
