#!/usr/bin/env bash
# A real Slurm cluster on one Debian machine, for tests: two nodes with two pretend GPUs each, accounting, preemption.
#
#   slurm/testbed/testbed.sh up        start it (as root, 8 s); down stops it and leaves nothing behind
#   eval "$(slurm/testbed/testbed.sh env)"    point Slurm's commands of this shell at it
#   slurm/testbed/testbed.sh node1 up|down|kill   one slurmd: start it, stop it, or kill it with all its jobs
#   slurm/testbed/testbed.sh status
#
# Needs Debian's slurmctld, slurmd, slurm-client, slurmdbd, munge and mariadb-server; `install` fetches them with apt-get.
# Nothing in /etc is touched: all lives in $TESTBED (/tmp/slurm-testbed), behind ports from $TESTBED_PORT (17000) on, so
# that a cluster that is already there, or another bed, is not disturbed.
set -euo pipefail

bed=${TESTBED:-/tmp/slurm-testbed}
port=${TESTBED_PORT:-17000}
nodes=${TESTBED_NODES:-2}
gpus=2
host=$(hostname -s)
export SLURM_CONF=$bed/etc/slurm.conf

await() { # SECONDS COMMAND...: until it succeeds
  local end=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    [ "$SECONDS" -lt "$end" ] || { echo "testbed: timed out: $*; see $bed/log" >&2; return 1; }
    sleep 0.1
  done
}

# A process whose parent does not reap it is a zombie, for which kill -0 succeeds.
alive() { [ -d "/proc/$1" ] && ! grep -q '^State:.Z' "/proc/$1/status" 2>/dev/null; }

stop() { # PIDFILE
  local pid
  pid=$(cat "$1" 2>/dev/null) || return 0
  kill "$pid" 2>/dev/null || return 0
  for _ in $(seq 150); do
    alive "$pid" || return 0
    sleep 0.1
  done
  kill -KILL "$pid" 2>/dev/null || true
}

answers() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

check() {
  [ "$(id -u)" = 0 ] || { echo "testbed: needs root" >&2; exit 3; }
  local missing=""
  for program in slurmctld slurmd sbatch slurmdbd munged mariadbd; do
    command -v "$program" >/dev/null || missing="$missing $program"
  done
  [ -z "$missing" ] || { echo "testbed: missing$missing; run $0 install" >&2; exit 3; }
}

install_packages() {
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -q
  apt-get install -y -q --no-install-recommends slurmctld slurmd slurm-client slurmdbd munge mariadb-server
}

configure() {
  mkdir -p "$bed"/{etc,state,log,run,db}
  chmod 755 "$bed" "$bed"/{etc,run,log}
  cat >"$bed/etc/slurm.conf" <<CONF
ClusterName=testbed
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits for as long as a credential lives: 121 s by default.
AuthInfo=cred_expire=5,socket=$bed/run/munge.sock
StateSaveLocation=$bed/state
SlurmdSpoolDir=$bed/spool.%n
SlurmctldPidFile=$bed/run/slurmctld.pid
SlurmdPidFile=$bed/run/slurmd.%n.pid
SlurmctldLogFile=$bed/log/slurmctld.log
SlurmdLogFile=$bed/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
# Without cgroups, memory is watched by asking now and then.
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill,UsePss
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0
MaxArraySize=${TESTBED_MAX_ARRAY:-1001}
MinJobAge=300
KillWait=5
SlurmdTimeout=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
MpiDefault=none
GresTypes=gpu
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((port + 1))
AccountingStoragePass=$bed/run/munge.sock
AccountingStorageTRES=gres/gpu
CONF
  : >"$bed/etc/gres.conf"
  for node in $(seq "$nodes"); do
    echo "NodeName=node$node NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 10 + node)) CPUs=${TESTBED_CPUS:-8} RealMemory=16000 Gres=gpu:$gpus State=UNKNOWN" >>"$bed/etc/slurm.conf"
    for gpu in $(seq 0 $((gpus - 1))); do
      [ -e "$bed/run/gpu$gpu" ] || mknod "$bed/run/gpu$gpu" c 1 3 # the numbers of /dev/null
      echo "NodeName=node$node Name=gpu File=$bed/run/gpu$gpu" >>"$bed/etc/gres.conf"
    done
  done
  cat >>"$bed/etc/slurm.conf" <<CONF
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=off
PartitionName=low Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=requeue GraceTime=20
CONF
  (
    umask 077 # slurmdbd refuses a file that others can read
    cat >"$bed/etc/slurmdbd.conf" <<CONF
DbdHost=$host
DbdAddr=127.0.0.1
DbdPort=$((port + 1))
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$bed/run/munge.sock
PidFile=$bed/run/slurmdbd.pid
LogFile=$bed/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$((port + 2))
StorageUser=slurm
StoragePass=testbed
StorageLoc=slurm_acct_db
CONF
    [ -s "$bed/etc/munge.key" ] || head -c 128 /dev/urandom >"$bed/etc/munge.key"
  )
}

up() {
  check
  configure
  munged --force --key-file="$bed/etc/munge.key" --socket="$bed/run/munge.sock" --pid-file="$bed/run/munged.pid" \
    --log-file="$bed/log/munged.log" --seed-file="$bed/run/munged.seed"
  await 10 munge -S "$bed/run/munge.sock" -n
  local sql="$bed/run/mysql/s.sock"
  if [ ! -d "$bed/db/mysql" ]; then
    chown mysql "$bed/db"
    mariadb-install-db --no-defaults --user=mysql --datadir="$bed/db" --auth-root-authentication-method=socket \
      --skip-test-db >"$bed/log/mariadb-install.log" 2>&1
  fi
  install -d -o mysql "$bed/run/mysql"
  mariadbd --no-defaults --user=mysql --datadir="$bed/db" --socket="$sql" --pid-file="$bed/run/mysql/mariadbd.pid" \
    --bind-address=127.0.0.1 --port=$((port + 2)) --skip-name-resolve --innodb-buffer-pool-size=64M \
    --innodb-log-file-size=16M --innodb-lock-wait-timeout=900 --innodb-flush-log-at-trx-commit=0 \
    </dev/null >"$bed/log/mariadbd.log" 2>&1 &
  disown
  await 60 mariadb -u root --socket="$sql" -e 'select 1'
  mariadb -u root --socket="$sql" -e "create database if not exists slurm_acct_db;
    create user if not exists slurm@'127.0.0.1' identified by 'testbed';
    grant all on slurm_acct_db.* to slurm@'127.0.0.1';"
  slurmdbd
  await 60 answers $((port + 1))
  await 30 sacctmgr -n show cluster
  # Before slurmctld starts, or it finds no cluster to register with.
  sacctmgr -n show cluster format=cluster | grep -qw testbed || sacctmgr -i add cluster testbed >/dev/null
  slurmctld
  await 30 scontrol ping
  for node in $(seq "$nodes"); do slurmd -N "node$node"; done
  await 60 sh -c "[ \$(sinfo -h -N -p main -t idle | wc -l) = $nodes ]"
  echo "testbed: $nodes nodes idle; eval \"\$($0 env)\""
}

down() {
  [ -e "$SLURM_CONF" ] || return 0
  if timeout 5 scontrol ping >/dev/null 2>&1; then
    timeout 10 scancel --user=root >/dev/null 2>&1 || true
    await 10 sh -c '[ -z "$(squeue -h)" ]' 2>/dev/null || true
  fi
  for file in "$bed"/run/slurmd.*.pid "$bed"/run/{slurmctld,slurmdbd}.pid "$bed/run/mysql/mariadbd.pid" "$bed/run/munged.pid"; do
    stop "$file"
  done
  [ "${TESTBED_KEEP:-0}" = 1 ] || rm -rf "$bed"
}

descendants() { # PID: it and all below it
  echo "$1"
  for child in $(cat /proc/"$1"/task/*/children 2>/dev/null); do descendants "$child"; done
}

node() { # NAME up|down|kill
  local file="$bed/run/slurmd.$1.pid"
  case $2 in
    up) slurmd -N "$1" ;;
    down) stop "$file" ;;
    kill) # what a power cut does: slurmd, the steps' daemons (found by this node's spool) and the jobs, at once
      local pids
      pids=$(cat "$file")
      for step in $(grep -lz '^slurmstepd' /proc/[0-9]*/cmdline 2>/dev/null | cut -d/ -f3); do
        tr '\0' '\n' <"/proc/$step/environ" 2>/dev/null | grep -q "^SLURM_CONF=$bed/" || continue
        if ls -l "/proc/$step/fd" 2>/dev/null | grep -q "$bed/\(spool.$1\|log/slurmd.$1.log\)"; then
          pids="$pids $(descendants "$step")"
        fi
      done
      # shellcheck disable=SC2086
      kill -KILL $pids 2>/dev/null || true
      ;;
    *) echo "usage: $0 $1 up|down|kill" >&2; exit 2 ;;
  esac
}

case ${1:-} in
  up) up ;;
  down) down ;;
  install) install_packages ;;
  check) check ;;
  env) echo "export SLURM_CONF=$SLURM_CONF" ;;
  status) scontrol ping; sinfo -N; squeue ;;
  node[0-9]*) node "$1" "${2:-}" ;;
  *) echo "usage: $0 up|down|status|env|install|check|nodeN up|down|kill" >&2; exit 2 ;;
esac
