#!/usr/bin/env bash
# Trains on Cloud TPU VMs: requests the slices, installs this checkout on every host, and trains. Repeats this after
# each preemption until training ends.
#
#     ssh-add ~/.ssh/google_compute_engine
#     ZONE=us-east5-a ACCELERATOR=v5p-128 launch/tpu_vm.sh NAME --config=configs/1b.py:flex-3 \
#         --workdir=gs://BUCKET/runs/1b-flex-3 --config.data.path=gs://BUCKET/c4
#
# The arguments after NAME are those of memoryllm_jax.train. SLICES=2 requests two slices, RUNTIME=IMAGE uses another
# image, and an empty CREATE_FLAGS= requests TPUs that are not spot. Run this script on a machine that stays up. It can
# be killed and run again.
set -euo pipefail

name=${1:?expected a name for the TPUs}
shift
zone=${ZONE:?expected a zone, for example us-east5-a}
accelerator=${ACCELERATOR:?expected a type, for example v5p-128}
slices=${SLICES:-1}
runtime=${RUNTIME:-v2-alpha-tpuv5}
read -ra create_flags <<< "${CREATE_FLAGS---spot}"
poll=${POLL:-60}              # seconds between queries of the request's state
crash_loop=${CRASH_LOOP:-600} # seconds; a run that crashes sooner after its start is not restarted

resource() { # VERB ARGUMENT...
    gcloud compute tpus queued-resources "$@" --zone="$zone"
}

state() { # prints NONE if there is no such request, UNKNOWN for other errors, which may pass
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

on_all_hosts() { # COMMAND. Without --batch-size=all gcloud runs it on 64 hosts at a time.
    resource ssh "$name" --node=all --worker=all --batch-size=all --command="$1"
}

install() {
    # Python 3.10 of the images is too old; uv installs 3.12.
    git -C "$(dirname "$0")/.." archive --format=tar.gz --output="$archive" HEAD &&
        resource scp "$archive" "$name:memoryllm.tar.gz" --node=all --worker=all --batch-size=all &&
        on_all_hosts "mkdir -p memoryllm && tar -xzf memoryllm.tar.gz -C memoryllm && cd memoryllm &&
            python3 -m pip install -q --user uv && python3 -m uv venv -q --allow-existing --python=3.12 .venv &&
            python3 -m uv pip install -q --python=.venv -e '.[prepare,gcs,tpu]'"
}

train() { # ARGUMENT... flock waits until the process of an earlier start has ended.
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
            sleep "$poll" # a preemption shows in the state only after a while
            # The codes are those of docs/pods.md. 1, 70, 71, 72, 130: an error that a restart would meet again, unless a
            # preemption caused it. 75: storage or network failed. 143: SIGTERM, after a checkpoint. 255: lost
            # connection. Others: a process is lost, or a crash.
            case $code in
                75 | 143 | 255) ;;
                1 | 70 | 71 | 72 | 130) if [ "$(state)" = ACTIVE ]; then exit "$code"; fi ;;
                *) if [ "$(state)" = ACTIVE ] && ((SECONDS - start < crash_loop)); then exit "$code"; fi ;;
            esac
            ;;
        FAILED | SUSPENDED) resource delete "$name" --force --quiet ;;
        *) sleep "$poll" ;;
    esac
done
echo "trained; the TPUs are still there: gcloud compute tpus queued-resources delete $name --zone=$zone --force"
