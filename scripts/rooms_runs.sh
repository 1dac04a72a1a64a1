#!/usr/bin/env bash
# Runs what data/results/rooms.md says, for scripts/rooms_table.py.
#
#   scripts/rooms_runs.sh FOLDER [VALOR]
#
# A run that is there already is left as it is, so a script that was broken off goes on.
set -euo pipefail
folder=$1
valor=${2:-target/release/valor}
mkdir -p "$folder"

run() { # name, look, questions, options
    local at="$folder/p_$1_$2" look=$2 n=$3
    shift 3
    [ -e "$at.txt" ] && return
    echo "$at: $n questions" >&2
    "$valor" eval --bench rooms --tools real --greedy --seed 20261123 --look "$look" --n "$n" \
        --out "$at.jsonl" "$@" >"$at.part"
    mv "$at.part" "$at.txt"
}

base=(--planner base)
detector=(--set detector.model=embedded-base)
for look in studio lived-in; do
    run base $look 1000 "${base[@]}" "${detector[@]}"
    run tuned $look 1000 --planner configured "${detector[@]}"
    run detector $look 1000 "${base[@]}"
    run both $look 2000 --planner configured
    run both_shuffled $look 2000 --planner configured --shuffle-pictures
    run families $look 4000 --planner configured --families count,exists
    run families_shuffled $look 4000 --planner configured --families count,exists --shuffle-pictures
done
run counts_tuned lived-in 2000 --planner configured "${detector[@]}" --families compare-counts,count
run counts_detector lived-in 2000 "${base[@]}" --families compare-counts,count
run counts_both lived-in 2000 --planner configured --families compare-counts,count
