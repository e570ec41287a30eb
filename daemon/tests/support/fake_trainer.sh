#!/bin/sh
# A trainer that trains nothing: it speaks the protocol of daemon/src/protocol.rs for tests of the supervisor.
#
# Its folder is $FAKE_TRAINER. There it keeps `cursor`, `generation` and `step` (what its "files" hold) and `log` (every
# request line), and finds its orders, each a file:
#   die_at_step    holds a step: killed by SIGKILL on that step, once
#   die_always     holds a step: killed by SIGKILL on that step, each time
#   say_at_step    holds a step: says why and exits on that step, once
#   hang_at_step   holds a step: gives a last sign of life and hangs on that step, once
#   fail_step      holds a step: answers that it failed
#   skip_step      holds a step: answers that a gate skipped it
#   no_server      there: says that the server is gone at the start
#   wrong_step     there: answers another step than the one asked for
#   step_seconds   holds how long a step takes
#   sync_seconds   holds how long a sync takes
#   harm           there: answers to a sync that the guard found harm, once
#   not_restored   holds why that could not be taken back
D=${FAKE_TRAINER:?}
read_or() { if [ -f "$D/$1" ]; then cat "$D/$1"; else echo "$2"; fi; }
number() { printf '%s' "$line" | sed -n "s/.*\"$1\":\([0-9][0-9]*\).*/\1/p"; }
cursor=$(read_or cursor 0); generation=$(read_or generation 0); step=$(read_or step 0); seq=$cursor

synced() {
    sleep "$(read_or sync_seconds 0)"
    if [ -f "$D/harm" ]; then
        rm "$D/harm"
        applied=$seq
        printf '{"answer":"harmed","reason":"the loss rose","probed":{"probes":2,"loss":null,"reference":1.5,'
        printf '"rise":null,"limit":0.1,"worst":{"line":2,"loss":null,"reference":2}},"applied":%s,' "$applied"
        if [ -s "$D/not_restored" ]; then
            printf '"restored":{"Err":"%s"}}\n' "$(cat "$D/not_restored")"
            return
        fi
        cursor=$(read_or cursor 0); generation=$(read_or generation 0); step=$(read_or step 0); seq=$cursor
        printf '"restored":{"Ok":{"generation":%s,"cursor":%s,"step":%s,"weight_version":9}}}\n' "$generation" "$cursor" "$step"
        return
    fi
    cursor=$seq; generation=$((generation + 1))
    echo "$cursor" > "$D/cursor"; echo "$generation" > "$D/generation"; echo "$step" > "$D/step"
    printf '{"answer":"synced","generation":%s,"cursor":%s,"blocks_total":10,"blocks_changed":3,' "$generation" "$cursor"
    printf '"bytes_written":12288,"bytes_journal":100,"seconds":0.1}\n'
}

echo start >> "$D/log"
if [ -f "$D/no_server" ]; then
    echo '{"answer":"server_gone","reason":"nothing listens on the socket"}'
    exit 0
fi
printf '{"answer":"ready","epoch":"e1","server_pid":null,"generation":%s,"cursor":%s,"step":%s,' "$generation" "$cursor" "$step"
printf '"parameters":100,"trainable":90,"recovery":""}\n'

while IFS= read -r line; do
    echo "$line" >> "$D/log"
    case "$line" in
    *'"request":"train"'*)
        this=$(number step)
        sleep "$(read_or step_seconds 0)"
        if [ "$(read_or die_at_step 0)" = "$this" ]; then rm "$D/die_at_step"; kill -KILL $$; fi
        if [ "$(read_or say_at_step 0)" = "$this" ]; then
            rm "$D/say_at_step"
            echo '{"answer":"dying","reason":"CUDA error X (7) in y"}'
            exit 101
        fi
        if [ "$(read_or hang_at_step 0)" = "$this" ]; then
            rm "$D/hang_at_step"
            echo '{"answer":"alive"}'
            exec sleep 100
        fi
        if [ "$(read_or die_always 0)" = "$this" ]; then kill -KILL $$; fi
        if [ "$(read_or fail_step 0)" = "$this" ]; then
            echo '{"answer":"failed","request":"train","reason":"out of memory"}'
            continue
        fi
        results=""
        for seq in $(printf '%s' "$line" | grep -o '"seq":[0-9]*' | cut -d: -f2); do
            results="$results${results:+,}{\"seq\":$seq,\"loss\":0.5,\"tokens\":2}"
        done
        step=$this
        skipped=null
        if [ "$(read_or skip_step 0)" = "$this" ]; then skipped='"loss below train.loss_min"'; fi
        if [ -f "$D/wrong_step" ]; then rm "$D/wrong_step"; this=$((this + 1)); fi
        printf '{"answer":"trained","step":%s,"examples":[%s],"loss":0.5,"weight_version":%s,"skipped":%s,' \
            "$this" "$results" "$step" "$skipped"
        printf '"prefill_ms":1,"forward_ms":1,"backward_ms":1,"update_ms":1}\n'
        ;;
    *'"request":"sync"'*) synced ;;
    *'"request":"rollback"'*)
        if [ "$(number to)" -ge "$generation" ]; then
            echo '{"answer":"failed","request":"rollback","reason":"there is no such generation"}'
        else
            # Each generation of this trainer holds one more example than the one before.
            cursor=$(number to); seq=$cursor; generation=$((generation + 1))
            echo "$cursor" > "$D/cursor"; echo "$generation" > "$D/generation"
            printf '{"answer":"rolled_back","generation":%s,"cursor":%s}\n' "$generation" "$cursor"
        fi
        ;;
    *'"request":"shutdown"'*)
        case "$line" in *'"sync":true'*) synced ;; esac
        exit 0
        ;;
    esac
done
