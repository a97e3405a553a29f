#!/usr/bin/env bash
# Builds the deb and the rpm of server and agent into bin/packages, out of the binaries in bin/:
#   build.sh NFPM VERSION
set -euo pipefail
cd "$(dirname "$0")/../.."
nfpm=$1
# v1.2.3 and v1.3.0-rc.1 are versions as they are. What was made later than such a one, as "git describe" says it with
# -4-gabcdef and -dirty, sorts after it and before the next: a hyphen would sort it before, and an upgrade would be none.
# What is no version sorts before all of them.
VERSION=${2#v}
if [[ ! $VERSION =~ ^[0-9]+\.[0-9]+\.[0-9]+ ]]; then
	VERSION=0.0.0-dev.${VERSION//[^a-zA-Z0-9.]/.}
else
	later=
	if [[ $VERSION =~ ^(.+)-(dirty)$ ]]; then VERSION=${BASH_REMATCH[1]} later=.dirty; fi
	if [[ $VERSION =~ ^(.+)-([0-9]+)-(g[0-9a-f]+)$ ]]; then VERSION=${BASH_REMATCH[1]} later=.${BASH_REMATCH[2]}.${BASH_REMATCH[3]}$later; fi
	# Behind a pre-release (1.3.0-rc.1) it is one more part of it.
	if [[ $later && $VERSION != *-* ]]; then later=+${later#.}; fi
	VERSION+=$later
fi
ARCH=$(go env GOARCH)
export VERSION ARCH
mkdir -p bin/packages
rm -f bin/packages/*.deb bin/packages/*.rpm
for who in server agent; do
	for kind in deb rpm; do
		"$nfpm" package --config "deploy/packages/$who.yaml" --packager "$kind" --target bin/packages/
	done
done
ls -l bin/packages
