#!/usr/bin/env bash
# Tests launch/slurm.sbatch on a real SLURM cluster of one node, which this script sets up and takes down again.
#
#     apt-get install slurm-wlm munge
#     tests/launch/slurm.sh DATA FOLDER
#
# Run it as root. DATA is prepared text; FOLDER does not exist yet. Trains on the CPU with two tasks of PATH's `python`.
set -euo pipefail

data=$1 folder=$2
cd "$(dirname "$0")/../.."
mkdir -p "$folder"/{state,spool}
export PATH=$PATH:/usr/sbin SLURM_CONF=$folder/slurm.conf JAX_PLATFORMS=cpu CRASH_LOOP=0
# All starts compile the same steps. LLVM's optimisations would take three times as long as the rest of a start.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$folder/cache} JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 \
    JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1 XLA_FLAGS=${XLA_FLAGS:---xla_backend_optimization_level=0}

stop_cluster() {
    squeue --noheader --format=%i | xargs --no-run-if-empty scancel || true
    for ((i = 0; i < 400; i++)); do # slurmctld must still run to learn that the jobs have ended
        if [ -z "$(squeue --noheader)" ]; then break; fi
        sleep 0.1
    done
    jobs -p | xargs kill -KILL
}
trap stop_cluster EXIT

start_cluster() {
    head -c 128 /dev/urandom > "$folder/munge.key"
    chmod 600 "$folder/munge.key"
    port=$((20000 + RANDOM % 10000)) # JAX derives its port from the job's number
    printf 'Name=gpu File=/dev/%s\n' null zero full random > "$folder/gres.conf" # stand-ins for GPUs
    cat > "$SLURM_CONF" <<EOF
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort=$port
SlurmdPort=$((port + 1))
FirstJobId=$port
SlurmUser=root
AuthInfo=socket=$folder/munge.socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
SchedulerParameters=bf_interval=1,sched_interval=1
NodeName=localhost CPUs=4 Gres=gpu:4
PartitionName=main Nodes=ALL Default=YES
EOF
    munged --foreground --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
        --pid-file="$folder/munge.pid" --log-file="$folder/munge.log" --seed-file="$folder/munge.seed" \
        > "$folder/munged" 2>&1 & # --force: FOLDER may be readable by its owner only
    wait_for test -S "$folder/munge.socket"
    slurmctld -D -i > "$folder/slurmctld" 2>&1 &
    slurmd -D -N localhost > "$folder/slurmd" 2>&1 &
    wait_for node_is_idle
}

node_is_idle() { [ "$(sinfo --noheader --format=%T)" = idle ]; }

wait_for() { # COMMAND...: waits until it succeeds
    for ((i = 0; i < 2400; i++)); do
        if "$@" 2> /dev/null; then return; fi
        sleep 0.1
    done
    fail "did not succeed within four minutes: $*"
}

fail() {
    echo "$1" >&2
    squeue >&2
    tail -n 30 "$folder"/*.log >&2
    exit 1
}

submit() { # NAME ARGUMENT...: sets `job`, of two tasks or $tasks
    name=$1
    shift
    job=$(sbatch --parsable --ntasks-per-node="${tasks:-2}" --gpus-per-node=2 --cpus-per-task=1 --output="$folder/$name.log" \
        launch/slurm.sbatch --config=configs/tiny.py:memory --workdir="$folder/$name" --config.data.path="$data" \
        --config.{model.dim=16,model.layers=1,model.heads=2,seq_len=32,batch_size=4,steps=300,data.epochs=9} \
        --config.{log.every=1,log.tensorboard=false,eval.every=9999,eval.batches=1,checkpoint.every=9999} \
        --config.sample.tokens=0 "$@")
}

field() { scontrol show job "$job" | tr ' ' '\n' | sed -n "s/^$1=//p"; }
has() { [ "$(field "$1")" = "$2" ]; }
logged() { grep -q -- "$1" "$folder/$name.log"; }
logged_again() { [ "$(grep -c -- "$1" "$folder/$name.log")" = 2 ]; }
goes_on() { # NUMBER: five steps are done since that restart
    awk -v number="$1" '/^going on/ { starts++ } /^step/ && starts == number { n++ } END { exit n < 5 }' "$folder/$name.log"
}
task_1() { scontrol listpids "$job" | awk '$5 == 1 { print $1 }'; } # the process of the second task
expect() { "$@" || fail "expected: $*; found $(field JobState) $(field ExitCode), $(field Restarts) restarts"; }

echo "starting a cluster in $folder"
start_cluster

echo "SIGTERM to one task: both end after a checkpoint; the job is restarted from it"
submit train
train=$job
wait_for logged "step 5/"
kill -TERM "$(task_1)"
wait_for logged "stopped by a signal after step"

echo "a wrong config, while SLURM waits before the restart: the job is not restarted"
tasks=1 submit wrong --config.model.dim=7
wait_for has JobState FAILED
expect has ExitCode 1:0
expect has Restarts 0

echo "a task is killed: the job is restarted"
job=$train name=train
wait_for goes_on 1
kill -KILL "$(task_1)"

echo "scancel: saves a checkpoint; the job is not restarted"
wait_for goes_on 2
scancel "$train"
wait_for logged_again "stopped by a signal after step"
wait_for has JobState CANCELLED
expect has Restarts 2
last=$(sed -n 's/^stopped by a signal after step \([0-9]*\).*/\1/p' "$folder/train.log" | tail -n 1)
[ -d "$folder/train/$last" ] || fail "no checkpoint of step $last"
for ((step = 1; step <= last; step++)); do
    grep -q "\"step\": $step, \"kind\": \"train\"" "$folder/train/metrics.jsonl" || fail "no metrics of step $step"
done
echo "done in $SECONDS seconds"
