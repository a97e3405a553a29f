#!/usr/bin/env bash
# Builds the deb and the rpm of server and agent into bin/packages, out of the binaries in bin/:
#   build.sh NFPM VERSION
set -euo pipefail
cd "$(dirname "$0")/../.."
nfpm=$1
# v1.2.3 and v1.2.3-4-gabcdef are versions as they are; what is none sorts before all of them.
VERSION=${2#v}
[[ $VERSION =~ ^[0-9]+\.[0-9]+\.[0-9]+ ]] || VERSION=0.0.0-dev.${VERSION//[^a-zA-Z0-9.]/.}
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
