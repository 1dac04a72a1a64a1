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
    echo "$(date +%T) $at: $n questions" >&2
    "$valor" eval --bench rooms --tools real --greedy --seed 20261123 --look "$look" --n "$n" \
        --out "$at.jsonl" "$@" >"$at.part"
    mv "$at.part" "$at.txt"
}

base=(--planner base)
detector=(--set detector.model=embedded-base)
for look in studio lived-in; do
    run both $look 2000 --planner configured
    run both_shuffled $look 2000 --planner configured --shuffle-pictures
    run base $look 1000 "${base[@]}" "${detector[@]}"
    run tuned $look 1000 --planner configured "${detector[@]}"
    run detector $look 1000 "${base[@]}"
done
# As many questions as it takes to tell a family from the same one on shuffled pictures.
for shuffled in "" --shuffle-pictures; do
    name=${shuffled:+_shuffled}
    run exists$name lived-in 5000 --planner configured --families exists $shuffled
    run position$name lived-in 1000 --planner configured --families position $shuffled
    run families$name studio 5000 --planner configured --families count,exists $shuffled
    run count$name lived-in 8000 --planner configured --families count $shuffled
done
run counts_tuned lived-in 2000 --planner configured "${detector[@]}" --families compare-counts,count
run counts_detector lived-in 2000 "${base[@]}" --families compare-counts,count
run counts_both lived-in 2000 --planner configured --families compare-counts,count
