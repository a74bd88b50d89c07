#!/usr/bin/env bash
# An MLflow server with PostgreSQL behind it, for results that many sweeps and people share: tracking=server.
#
#   slurm/tracking.sh up        start both (their first start takes a minute); up again after a reboot goes on
#   slurm/tracking.sh down      stop both; the runs stay in $TRACKING
#   slurm/tracking.sh uri       what tracking.uri=... or $MLFLOW_TRACKING_URI must be
#
# Needs Debian's postgresql (as root: apt-get install postgresql) and psycopg beside mlflow (uv pip install
# 'psycopg[binary]'). All lives in $TRACKING (results/tracking). MLflow listens on $TRACKING_HOST (127.0.0.1) at
# $TRACKING_PORT (5000), PostgreSQL on 127.0.0.1 at the port above it. Another address lets in whoever reaches it: MLflow
# asks for no password (--app-name basic-auth adds one). It answers to this machine's names and private addresses; what
# else it is called by, list in $MLFLOW_SERVER_ALLOWED_HOSTS, with the port or `:*`. PostgreSQL's password is drawn at
# random and kept in $TRACKING/password.
set -euo pipefail

home=$(realpath -m "${TRACKING:-results/tracking}")
host=${TRACKING_HOST:-127.0.0.1}
port=${TRACKING_PORT:-5000}
python=${PYTHON:-python}
pg=$(ls -d /usr/lib/postgresql/*/bin 2>/dev/null | sort -V | tail -1 || true)
pg=${pg:-$(dirname "$(command -v initdb || echo /nowhere/initdb)")}

check() {
  [ -x "$pg/initdb" ] || { echo "tracking: PostgreSQL is missing; as root: apt-get install postgresql" >&2; exit 3; }
  "$python" -c 'import mlflow, psycopg' 2>/dev/null ||
    { echo "tracking: $python lacks mlflow or psycopg; uv pip install 'psycopg[binary]'" >&2; exit 3; }
}

# PostgreSQL refuses to run as root.
as_owner() {
  if [ "$(id -u)" = 0 ]; then runuser -u postgres -- "$@"; else "$@"; fi
}

answers() {
  "$python" -c "import urllib.request as u; u.urlopen('http://$host:$port/health', timeout=5)" 2>/dev/null
}

# What a request may call the server; MLflow's own list knows no host name, and refuses all but /health to others.
names() {
  local name
  printf '10.*,192.168.*,172.1[6-9].*,172.2[0-9].*,172.3[01].*,fc00:*,fd00:*,[[]::1]:*'
  for name in localhost 127.0.0.1 0.0.0.0 "$host" "$(hostname)" "$(hostname -f 2>/dev/null || hostname)"; do
    printf ',%s,%s:*' "$name" "$name"
  done
}

up() {
  check
  if [ -f "$home/mlflow.pid" ] && kill -0 "$(cat "$home/mlflow.pid")" 2>/dev/null && answers; then
    echo "tracking: http://$host:$port"
    return 0
  fi
  mkdir -p "$home"
  if [ ! -d "$home/db" ]; then
    (
      umask 077
      head -c 24 /dev/urandom | base64 | tr -d '/+=' >"$home/password"
    )
    install -d -m 700 "$home/db.new"
    cp "$home/password" "$home/db.new.password"
    [ "$(id -u)" != 0 ] || chown postgres "$home/db.new" "$home/db.new.password"
    as_owner "$pg/initdb" -D "$home/db.new" -U mlflow -A scram-sha-256 --pwfile "$home/db.new.password" -E UTF8 >"$home/initdb.log"
    rm "$home/db.new.password"
    mv "$home/db.new" "$home/db"
  fi
  as_owner "$pg/pg_ctl" -D "$home/db" status >/dev/null ||
    as_owner "$pg/pg_ctl" -D "$home/db" -l "$home/db/server.log" -w -t 120 \
      -o "-p $((port + 1)) -c listen_addresses=127.0.0.1 -c unix_socket_directories=" start >/dev/null
  PGPASSWORD=$(cat "$home/password") "$pg/createdb" -h 127.0.0.1 -p $((port + 1)) -U mlflow mlflow 2>/dev/null || true
  # The address in the environment, not among the words, which every user of the machine can read. And a worker that a
  # busy machine keeps waiting for five seconds would be killed for it.
  MLFLOW_BACKEND_STORE_URI="postgresql+psycopg://mlflow:$(cat "$home/password")@127.0.0.1:$((port + 1))/mlflow" \
    MLFLOW_SERVER_ALLOWED_HOSTS="$(names)${MLFLOW_SERVER_ALLOWED_HOSTS:+,$MLFLOW_SERVER_ALLOWED_HOSTS}" \
    MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true setsid "$python" -m mlflow server \
    --artifacts-destination "$home/files" --host "$host" --port "$port" --workers "${TRACKING_WORKERS:-2}" \
    --uvicorn-opts "--timeout-worker-healthcheck 120" >"$home/mlflow.log" 2>&1 </dev/null &
  echo $! >"$home/mlflow.pid"
  for _ in $(seq 600); do
    ! answers || { echo "tracking: http://$host:$port"; return 0; }
    kill -0 "$(cat "$home/mlflow.pid")" 2>/dev/null || break
    sleep 0.5
  done
  echo "tracking: the server did not start; see $home/mlflow.log" >&2
  exit 1
}

down() {
  if [ -f "$home/mlflow.pid" ]; then
    kill -- "-$(cat "$home/mlflow.pid")" 2>/dev/null || true # its group: the workers too
    rm "$home/mlflow.pid"
  fi
  [ ! -d "$home/db" ] || as_owner "$pg/pg_ctl" -D "$home/db" -m fast -w stop >/dev/null || true
}

case ${1:-} in
  up) up ;;
  down) down ;;
  check) check ;;
  uri) echo "http://$host:$port" ;;
  *) echo "usage: $0 up|down|uri|check" >&2; exit 2 ;;
esac
