#!/usr/bin/env bash
# Runs every native fuzz target of the repository for FUZZTIME (default 5s) each.
set -euo pipefail
cd "$(dirname "$0")/.."
time=${FUZZTIME:-5s}
count=0
said=$(mktemp)
trap 'rm -f "$said"' EXIT
fuzz() { go test -run "^$" -fuzz "^$2\$" -fuzztime "$time" -fuzzminimizetime 10x "$1" 2>&1 | tee "$said"; }
while IFS=: read -r file target; do
	pkg=./$(dirname "$file")
	echo "fuzz $pkg $target ($time)"
	tries=3
	until fuzz "$pkg" "$target"; do
		# Where the time runs out just as a worker begins, the go command says so as if it were a finding.
		# A finding names the input that it wrote.
		if ! grep -q 'context deadline exceeded' "$said" || grep -q 'Failing input written' "$said"; then
			exit 1
		fi
		tries=$((tries - 1))
		if [ "$tries" = 0 ]; then
			exit 1
		fi
		echo "the time ran out within an input: once more"
	done
	count=$((count + 1))
done < <(git ls-files '*_test.go' | xargs grep -HoE '^func Fuzz[A-Za-z0-9_]+' | sed 's/func //' | sort)
echo "$count fuzz targets, $time each"
