#!/bin/sh
# Stands in for panglot-worker: behaves as the plan's name says.
plan=
for word in "$@"; do
    case $previous in --plan) plan=$word ;; esac
    previous=$word
done
name=$(sed -n 's/^  "name": "\(.*\)",$/\1/p' "$plan")
run=$(dirname "$plan")
case $name in
finishes)
    echo '{"event":"phase","name":"pretending"}'
    echo 'a library chatters'
    printf 'and says \\377\\n'
    echo '{"event":"note","text":"resumed from step 7"}'
    echo '{"event":"done","result":{"steps":20}}'
    ;;
says-its-place)
    env | grep -E '^(RANK|WORLD_SIZE|LOCAL_RANK|SLURM_[A-Z_]*|PMI[A-Z_]*|OMPI_COMM_WORLD_[A-Z_]*)=' | sort > "$run/place-$RANK"
    ;;
exits-with-*) exit "${name#exits-with-}" ;;
waits-for-a-signal)
    trap 'echo "{\"event\":\"note\",\"text\":\"got TERM\"}"; exit 75' TERM
    trap 'echo "{\"event\":\"note\",\"text\":\"got USR1\"}"; exit 76' USR1
    echo '{"event":"note","text":"ready"}'
    while :; do sleep 0.05; done
    ;;
dies-as-under-mpirun)
    trap 'exit 1' TERM
    echo '{"event":"note","text":"ready"}'
    while :; do sleep 0.05; done
    ;;
ignores-term)
    trap '' TERM
    echo '{"event":"note","text":"ready"}'
    while :; do sleep 0.05; done
    ;;
leaves-a-stray)
    # In a session of its own, as a rank that has lost its mpirun; it holds our standard output open.
    setsid sh -c 'echo $$ > "$0/stray"; exec sleep 1000' "$run" &
    while [ ! -s "$run/stray" ]; do sleep 0.01; done
    ;;
rank-1-is-killed)
    [ "$RANK" = 1 ] && kill -KILL $$
    echo $$ > "$run/worker-$RANK"
    exec sleep 1000
    ;;
rank-1-stops)
    echo $$ > "$run/worker-$RANK"
    echo '{"event":"beat"}'
    [ "$RANK" = 1 ] && kill -STOP $$
    while :; do sleep 0.5; echo '{"event":"beat"}'; done
    ;;
finds-rank-2-lost)
    [ "$RANK" = 0 ] && echo '{"event":"lost","code":74,"text":"rank 2 on n9: no space left"}'
    exit $((76 + RANK))
    ;;
outlives)
    echo $$ > "$run/worker"
    exec sleep 1000
    ;;
esac
