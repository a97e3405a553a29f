#!/usr/bin/env bash
# The whole suite, as `make test` and CI run it. As root on Debian nothing is skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PATH:/usr/sbin:/sbin
if [ "${CI:-}" = true ]; then export REQUIRE_REAL=1; fi
SKIPPED=$(mktemp)
export SKIPPED
trap 'rm -f "$SKIPPED"' EXIT
for step in check lab lab-hosts lab-k8s compat robust hostile demo demo-evidence bench-short fuzz; do
	started=$SECONDS
	echo "== $step"
	make --no-print-directory "$step"
	echo "== $step: $((SECONDS - started)) s"
done
if [ -s "$SKIPPED" ]; then
	echo "skipped:"
	sort -u "$SKIPPED"
else
	echo "skipped: nothing"
fi
