#!/usr/bin/env bash
# Runs every native fuzz target of the repository for FUZZTIME (default 5s) each.
set -euo pipefail
cd "$(dirname "$0")/.."
time=${FUZZTIME:-5s}
count=0
while IFS=: read -r file target; do
	pkg=./$(dirname "$file")
	echo "fuzz $pkg $target ($time)"
	go test -run "^$" -fuzz "^$target\$" -fuzztime "$time" -fuzzminimizetime 10x "$pkg"
	count=$((count + 1))
done < <(git ls-files '*_test.go' | xargs grep -HoE '^func Fuzz[A-Za-z0-9_]+' | sed 's/func //' | sort)
echo "$count fuzz targets, $time each"
