#!/usr/bin/env bash
# The whole suite, as `make test` and CI run it. As root on Debian nothing is skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PATH:/usr/sbin:/sbin
if [ "${CI:-}" = true ]; then export REQUIRE_REAL=1; fi
log=$(mktemp)
trap 'rm -f "$log"' EXIT
step() {
	local t0=$SECONDS name=$1
	shift
	echo "== $name"
	"$@" 2>&1 | tee -a "$log"
	echo "== $name: $((SECONDS - t0)) s"
}
step check make --no-print-directory check
step lab make --no-print-directory lab
step compat make --no-print-directory compat
step demo make --no-print-directory demo
step fuzz make --no-print-directory fuzz
skipped=$(grep -E '^ *(--- SKIP|SKIPPED:)' "$log" || true)
if [ -n "$skipped" ]; then
	echo "skipped:"
	echo "$skipped"
else
	echo "skipped: nothing"
fi
