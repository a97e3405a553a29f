#!/usr/bin/env bash
# Remakes the committed generated code from the .proto files. Run by `make gen`.
# Needs protoc (Debian: protobuf-compiler); the Go plugins come from tools/go.mod.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$PWD/bin/tools
mkdir -p "$bin"
(cd tools && go build -o "$bin/" google.golang.org/protobuf/cmd/protoc-gen-go google.golang.org/grpc/cmd/protoc-gen-go-grpc)
sdk=$(go list -m -f '{{.Dir}}' github.com/spiffe/spire-api-sdk)/proto
for proto in $(git ls-files --cached --others --exclude-standard '*.proto'); do
	protoc -I "$sdk" -I . \
		--plugin="$bin/protoc-gen-go" --plugin="$bin/protoc-gen-go-grpc" \
		--go_out=. --go_opt=paths=source_relative \
		--go-grpc_out=. --go-grpc_opt=paths=source_relative,require_unimplemented_servers=true \
		"$proto"
	# What protoc calls itself differs from system to system; what it made does not.
	sed -i -E '/^\/\/ (\t|- )protoc +v/d' "${proto%.proto}".pb.go "${proto%.proto}"_grpc.pb.go 2>/dev/null || true
done
