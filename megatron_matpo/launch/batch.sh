# The part of a batch script that decides what happens after a run. Generated files hold it as it is; it
# runs on the job's first node, outside of any container, and needs bash and scontrol only.
#
#   exit code 0    done
#   exit code 75   stopped early after saving (preemption, time limit): requeued
#   exit code 2    the configuration is wrong: never requeued
#   anything else  failed: requeued, but at most matpo_max_restarts times without a newer checkpoint
#
# RUN/slurm/ keeps between attempts: job.json (for `matpo status`), attempts (JOB COUNT CHECKPOINT),
# exits/NODE (TIME CODE NODE REASON of each task of this attempt), bad_nodes (names, by the preflight).

matpo_cancelled=0
matpo_attempt=0

matpo_say() {
    printf '%(%F %T)T matpo: %s\n' -1 "$*"
}

# The newest checkpoint's name; "none" before the first.
matpo_checkpoint() {
    local name=""
    [[ -r "$matpo_run/checkpoints/latest" ]] && read -r name <"$matpo_run/checkpoints/latest"
    printf '%s' "${name:-none}"
}

matpo_write_attempts() {
    printf '%s %s %s\n' "$SLURM_JOB_ID" "$1" "$2" >"$matpo_run/slurm/attempts.new"
    mv "$matpo_run/slurm/attempts.new" "$matpo_run/slurm/attempts"
}

# Another job of the same run owns its folder as long as it runs; a second one must not touch it.
matpo_refuse_second() {
    local other=""
    [[ -r "$matpo_run/slurm/job.json" ]] || return 0
    other=$(sed -n 's/.*"job_id": "\([^"]*\)".*/\1/p' "$matpo_run/slurm/job.json")
    [[ -n "$other" && "$other" != "$SLURM_JOB_ID" ]] || return 0
    if scontrol show job -o "$other" 2>/dev/null | grep -q "^JobId=$other .*JobState=RUNNING"; then
        matpo_say "job $other of the same run is running: cancel it, or choose another run.name"
        exit 2
    fi
}

# A job that is warned at its very start would stop, requeue itself and stop again, for ever.
matpo_check_time() {
    local end left
    end=$(scontrol show job -o "$SLURM_JOB_ID" 2>/dev/null | sed -n 's/.* EndTime=\([^ ]*\).*/\1/p')
    end=$(date -d "${end:-none}" +%s 2>/dev/null) || return 0 # it has no limit
    left=$((end - $(date +%s)))
    if ((left <= matpo_stop_lead)); then
        matpo_say "the job may run for $left s, and is warned slurm.stop_lead_s=$matpo_stop_lead before"
        matpo_say "its end: ask for more time (slurm.time_limit, or sbatch --time), or lower stop_lead_s"
        exit 2
    fi
}

# Counts this attempt, refuses one too many, and sends all output to the run's folder.
matpo_start() {
    local job="" count=0 before="" now
    matpo_refuse_second
    matpo_check_time
    mkdir -p "$matpo_run/slurm" "$matpo_run/logs" || exit 2
    matpo_say "the log of this job is $matpo_run/logs/slurm-$SLURM_JOB_ID.log"
    exec >>"$matpo_run/logs/slurm-$SLURM_JOB_ID.log" 2>&1
    now=$(matpo_checkpoint)
    [[ -r "$matpo_run/slurm/attempts" ]] && read -r job count before <"$matpo_run/slurm/attempts"
    if [[ "$job" != "$SLURM_JOB_ID" || "$before" != "$now" ]]; then
        count=0
    fi
    matpo_attempt=$((count + 1))
    rm -rf "$matpo_run/slurm/exits"
    mkdir -p "$matpo_run/slurm/exits"
    matpo_write_attempts "$matpo_attempt" "$now"
    printf '{"job_id": "%s", "nodes": "%s", "attempt": %d, "max_restarts": %d, "restarts": %d}\n' \
        "$SLURM_JOB_ID" "$SLURM_JOB_NODELIST" "$matpo_attempt" "$matpo_max_restarts" \
        "${SLURM_RESTART_COUNT:-0}" >"$matpo_run/slurm/job.json"
    trap 'matpo_cancelled=1' TERM
    trap 'matpo_end "$?"' EXIT
    matpo_say "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, attempt $matpo_attempt from checkpoint $now"
    if ((matpo_attempt > matpo_max_restarts + 1)); then
        # Slurm itself requeues after a node failure and does not ask matpo_end.
        matpo_say "giving up: $((matpo_attempt - 1)) attempts without a checkpoint newer than $now"
        trap - EXIT
        exit 1
    fi
}

# The line of the task that decides: a wrong configuration, else the first failure, else (3) that
# another node failed, else a stop.
matpo_deciding_exit() {
    sort -n "$matpo_run"/slurm/exits/* 2>/dev/null | awk '
        $2 == 2 && !wrong { wrong = $0 }
        $2 != 0 && $2 != 2 && $2 != 3 && $2 != 75 && $2 != 130 && $2 != 143 && !failed {
            failed = $0
        }
        $2 == 3 && !other { other = $0 }
        $2 == 75 && !stopped { stopped = $0 }
        END { print wrong ? wrong : failed ? failed : other ? other : stopped }'
}

# The nodes to leave out from now on: those of the cluster file and those that failed the preflight.
matpo_excluded() {
    local bad=() allocated=0 name
    if [[ -r "$matpo_run/slurm/bad_nodes" ]]; then
        mapfile -t bad < <(sort -u "$matpo_run/slurm/bad_nodes")
    fi
    for name in "${bad[@]+"${bad[@]}"}"; do
        [[ ! -e "$matpo_run/slurm/exits/$name" ]] || allocated=$((allocated + 1))
    done
    if ((allocated > 1 && allocated >= SLURM_JOB_NUM_NODES)); then
        matpo_say "every node failed the preflight, so the nodes are not to blame" >&2
        rm -f "$matpo_run/slurm/bad_nodes"
        bad=()
    fi
    local IFS=,
    printf '%s' "$matpo_exclude${bad[*]:+${matpo_exclude:+,}${bad[*]}}"
}

matpo_requeue() {
    local excluded tries
    excluded=$(matpo_excluded)
    matpo_say "requeueing job $SLURM_JOB_ID: $1"
    if ! scontrol requeue "$SLURM_JOB_ID"; then
        matpo_say "Slurm did not requeue the job; submitting the same again resumes the run"
        return
    fi
    # Only a pending job's list can be changed, so this races with our own end, which ignores TERM.
    [[ -e "$matpo_run/slurm/bad_nodes" ]] || return 0
    for ((tries = 0; tries < 10; tries++)); do
        if scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=$excluded"; then
            matpo_say "leaving out $excluded"
            return
        fi
        sleep 1
    done
}

# Slurm ends a job that is cancelled and one whose time is over alike. The first must stay ended.
matpo_out_of_time() {
    [[ "$(scontrol show job -o "$SLURM_JOB_ID" 2>/dev/null)" == *Reason=TimeLimit* ]]
}

# Ends the script: says what happened and why, and requeues if that helps.
matpo_end() {
    local code=$1 line="" reason="" decided node
    trap - EXIT
    trap '' TERM
    set +e
    if ((code != 0)); then
        line=$(matpo_deciding_exit)
        if [[ -n "$line" ]]; then
            read -r _ decided node reason <<<"$line"
            code=$decided
            reason="$node: $reason"
        else
            reason="no task said why (exit code $code), see the lines above"
        fi
        matpo_say "attempt $matpo_attempt ended with exit code $code"
        matpo_say "reason: $reason"
    fi
    if ((matpo_cancelled)) && matpo_out_of_time; then
        matpo_say "the time limit is over; slurm.stop_lead_s was too short for the run to save"
        matpo_cancelled=0
    fi
    if ((code == 0)); then
        matpo_say "done"
        rm -f "$matpo_run/slurm/attempts"
    elif ((matpo_cancelled)); then
        # Preempted after it saved: that is no failure.
        ((code != 75)) || matpo_write_attempts "$((matpo_attempt - 1))" "$(matpo_checkpoint)"
        matpo_say "not requeued: the job was cancelled, or Slurm itself starts it again"
    elif ((code == 75)); then
        matpo_write_attempts "$((matpo_attempt - 1))" "$(matpo_checkpoint)"
        matpo_requeue "the run saved and stopped early"
    elif ((code == 2)); then
        matpo_say "not requeued: the configuration has to be changed first"
    elif [[ "$(matpo_checkpoint)" == "$(cut -d ' ' -f 3 "$matpo_run/slurm/attempts")" ]] &&
        ((matpo_attempt > matpo_max_restarts)); then
        matpo_say "giving up: $matpo_attempt attempts without a newer checkpoint"
    else
        matpo_requeue "trying again from checkpoint $(matpo_checkpoint)"
    fi
    exit "$code"
}
