#!/usr/bin/env bash
# A Ray head on this machine with token authentication, for `ray job submit`.
#
#   cluster/local-head.sh start [options of `ray start`]   e.g. --num-cpus=8
#   eval "$(cluster/local-head.sh env)"                    address and token for `ray job ...` in this shell
#   cluster/local-head.sh status
#   cluster/local-head.sh stop                             ends the processes that `start` started and no others
#
# Environment (defaults in parentheses)
#   DMI_HEAD_DIR     state: token, pid, log (~/.local/state/distributed-mi/head)
#   DMI_HEAD_TMP     Ray's session files and sockets; short, because a socket's path is limited to 107 characters
#                    (/tmp/dmi-ray-<uid>)
#   DMI_HEAD_PORT    port of the GCS (6379), DMI_DASHBOARD_PORT port of the job server (8265)
#
# The GCS listens on every interface of the machine (the dashboard on 127.0.0.1 only), hence the token.
# `ray stop` ends every Ray of the machine, also of other users of the same account: it is not used here.
set -euo pipefail

state=${DMI_HEAD_DIR:-${XDG_STATE_HOME:-$HOME/.local/state}/distributed-mi/head}
session=${DMI_HEAD_TMP:-/tmp/dmi-ray-$(id -u)}
port=${DMI_HEAD_PORT:-6379}
dashboard=${DMI_DASHBOARD_PORT:-8265}
start_timeout_s=180
stop_timeout_s=30

say() { echo "local-head: $*" >&2; }

# Start time of a process in clock ticks (field 22 of stat, counted behind the command's closing bracket): with it a
# reused process id is not mistaken for ours. Nothing for a process that has ended and waits to be reaped.
born() { sed -n 's/.*) //; /^[ZX]/!p' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }

is_ours() { [ -n "${2:-}" ] && [ "$(born "$1")" = "$2" ]; }

running() {
    [ -s "$state/pid" ] || return 1
    read -r pid birth <"$state/pid"
    is_ours "$pid" "$birth"
}

# Every process below one, jobs in sessions of their own included: "pid birth" lines.
descendants() {
    local child
    for child in $(cat /proc/"$1"/task/*/children 2>/dev/null); do
        echo "$child $(born "$child")"
        descendants "$child"
    done
}

# Ray itself waits for ever when somebody else has the job server's port.
ports_free() {
    python3 - "$port" "$dashboard" <<'PY'
import socket
import sys

for port in sys.argv[1:]:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(port)))
        except OSError as error:
            sys.exit(f"local-head: port {port} cannot be used ({error}); see DMI_HEAD_PORT and DMI_DASHBOARD_PORT")
PY
}

answers() {
    python3 - "$dashboard" "$state/token" <<'PY' 2>/dev/null
import sys
from pathlib import Path
from urllib.request import Request, urlopen

token = Path(sys.argv[2]).read_text().strip()
url = f"http://127.0.0.1:{sys.argv[1]}/api/version"
urlopen(Request(url, headers={"Authorization": f"Bearer {token}"}), timeout=5).read()
PY
}

print_env() {
    printf 'export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=%q RAY_API_SERVER_ADDRESS=http://127.0.0.1:%s\n' \
        "$state/token" "$dashboard"
}

start() {
    if running; then
        say "already running, process $pid"
        return 1
    fi
    ports_free || return 1
    umask 077
    mkdir -p "$state" "$session"
    rm -f "$state/token"
    python3 -c 'import secrets; print(secrets.token_hex(32), end="")' >"$state/token" # 0600 by the umask
    eval "$(print_env)"
    export RAY_USAGE_STATS_ENABLED=0 RAY_worker_niceness=0
    export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 # by default 30 s at `stop`, for work to move to nodes that we do not have
    local cores
    cores=$(nproc)
    # Four logical CPUs at least: a graph of Ray Data stages with fewer CPUs than stages waits for ever.
    setsid ray start --head --block --port="$port" --temp-dir="$session" \
        --dashboard-host=127.0.0.1 --dashboard-port="$dashboard" \
        --num-cpus=$((cores > 4 ? cores : 4)) --object-store-memory=$((1 << 30)) \
        "$@" >"$state/log" 2>&1 </dev/null &
    pid=$!
    echo "$pid $(born "$pid")" >"$state/pid"
    local until=$((SECONDS + start_timeout_s))
    until answers; do
        if ! running || [ "$SECONDS" -ge "$until" ]; then
            say "did not start; the end of $state/log:"
            tail -n 20 "$state/log" >&2
            stop || true
            return 1
        fi
        sleep 0.3
    done
    say "running, process $pid, log $state/log"
    say "next: eval \"\$($0 env)\" && ray job submit --working-dir . -- python jobs/pipeline.py ..."
}

stop() {
    if ! running; then
        say "not running"
        rm -f "$state/pid" "$state/token"
        return 0
    fi
    local ours left until=$((SECONDS + stop_timeout_s))
    ours=$(echo "$pid $birth"; descendants "$pid")
    kill -TERM "$pid"
    while :; do
        left=$(while read -r p b; do is_ours "$p" "$b" && echo "$p"; done <<<"$ours" || true)
        [ -n "$left" ] || break
        if [ "$SECONDS" -ge "$until" ]; then
            say "killing what did not end in $stop_timeout_s s: $(echo $left)"
            kill -KILL $left 2>/dev/null || true
            [ "$SECONDS" -lt $((until + 20)) ] || return 1
        fi
        sleep 0.3
    done
    rm -f "$state/pid" "$state/token"
    say "stopped, $(wc -l <<<"$ours") processes"
}

case "${1:-}" in
start) shift && start "$@" ;;
stop) stop ;;
env) print_env ;;
status)
    if running; then say "running, process $pid, http://127.0.0.1:$dashboard"; else say "not running" && exit 1; fi
    ;;
*) sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//' && exit 2 ;;
esac
