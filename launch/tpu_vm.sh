#!/usr/bin/env bash
# Trains on Cloud TPU VMs: requests the slices, installs this checkout on every host and trains. After a preemption it
# does all of this again, until training ends.
#
#     ssh-add ~/.ssh/google_compute_engine
#     ZONE=us-east5-a ACCELERATOR=v5p-128 launch/tpu_vm.sh NAME --config=configs/1b.py:flex-3 \
#         --workdir=gs://BUCKET/runs/1b-flex-3 --config.data.path=gs://BUCKET/c4
#
# The arguments after NAME are those of memoryllm_jax.train. SLICES=2 requests two slices, RUNTIME=... another image, and
# CREATE_FLAGS= TPUs that are not spot. Run it on a machine that stays up; it can be killed and run again.
set -euo pipefail

name=${1:?expected a name for the TPUs}
shift
zone=${ZONE:?expected a zone, for example us-east5-a}
accelerator=${ACCELERATOR:?expected a type, for example v5p-128}
slices=${SLICES:-1}
runtime=${RUNTIME:-v2-alpha-tpuv5}
read -ra create_flags <<< "${CREATE_FLAGS---spot}"
poll=${POLL:-60}              # seconds between looks at the state of the request
crash_loop=${CRASH_LOOP:-600} # seconds; a run that crashes sooner after its start is not restarted

resource() { # VERB ARGUMENT...
    gcloud compute tpus queued-resources "$@" --zone="$zone"
}

state() { # NONE only if there is no such request; other errors are taken to be temporary
    local answer
    if answer=$(resource describe "$name" --format='value(state.state)' 2>&1); then
        echo "${answer##*$'\n'}"
    elif [[ $answer == *NOT_FOUND* ]]; then
        echo NONE
    else
        echo "$answer" >&2
        echo UNKNOWN
    fi
}

create() {
    nodes=(--node-id="$name")
    if ((slices > 1)); then nodes=(--node-count="$slices" --node-prefix="$name"); fi
    resource create "$name" "${nodes[@]}" --accelerator-type="$accelerator" --runtime-version="$runtime" \
        "${create_flags[@]}"
}

on_all_hosts() { # COMMAND. --batch-size=all, as gcloud would let host 65 wait until host 1 has ended
    resource ssh "$name" --node=all --worker=all --batch-size=all --command="$1"
}

install() {
    # The images have Python 3.10, which is too old; uv brings 3.12.
    git -C "$(dirname "$0")/.." archive --format=tar.gz --output="$archive" HEAD &&
        resource scp "$archive" "$name:memoryllm.tar.gz" --node=all --worker=all --batch-size=all &&
        on_all_hosts "mkdir -p memoryllm && tar -xzf memoryllm.tar.gz -C memoryllm && cd memoryllm &&
            python3 -m pip install -q --user uv && python3 -m uv venv -q --allow-existing --python=3.12 .venv &&
            python3 -m uv pip install -q --python=.venv -e '.[prepare,gcs,tpu]'"
}

train() { # flock waits for a process of an earlier start that has not ended yet
    arguments=$(printf '%q ' "$@")
    on_all_hosts "cd memoryllm && flock run.lock .venv/bin/python -m memoryllm_jax.train $arguments--multihost"
}

archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT

while true; do
    case $(state) in
        NONE) create ;;
        ACTIVE)
            code=0 start=$SECONDS
            { install && train "$@"; } || code=$?
            if ((code == 0)); then break; fi
            echo "ended with code $code"
            sleep "$poll" # until a preemption shows in the state
            # 1 is an error that a restart would not mend, 143 a checkpoint after SIGTERM, 255 a lost connection.
            case $code in
                143 | 255) ;;
                1) if [ "$(state)" = ACTIVE ]; then exit 1; fi ;;
                *) if [ "$(state)" = ACTIVE ] && ((SECONDS - start < crash_loop)); then exit "$code"; fi ;;
            esac
            ;;
        FAILED | SUSPENDED) resource delete "$name" --force --quiet ;;
        *) sleep "$poll" ;;
    esac
done
echo "trained; the TPUs are still there: gcloud compute tpus queued-resources delete $name --zone=$zone --force"
