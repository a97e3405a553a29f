# Assay: `make` builds, `make demo` shows it, `make check` is the everyday loop, `make test` is all.
SHELL   := /bin/bash
GO      ?= go
BIN     := bin
# go test, and at the end what was skipped and why. Some tests build programs, which takes a machine that never built
# them longer than go test's own limit of ten minutes.
TEST    := $(GO) run ./test/report -timeout 20m
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LDFLAGS := -s -w -X github.com/assay-id/assay/cmd/cli.Version=$(VERSION)
# grpcnotrace leaves out gRPC's debug pages, and with their HTML templates what keeps the linker from
# dropping methods nobody calls: a fifth of each binary, and of the memory it takes to hold it.
TAGS    := grpcnotrace
# Fuzz targets run this long each in `make fuzz`.
FUZZTIME ?= 5s

.PHONY: all build pkcs11 images demo demo-evidence check fmt vet lint arch unit script gen-check gen test packages lab lab-hosts lab-k8s k8s robust hostile compat fuzz bench bench-short clean tools setup help

all: build

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

build: ## build the binaries into bin/
	@mkdir -p $(BIN)
	CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false -tags '$(TAGS)' -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/assay-server ./cmd/assay-agent ./cmd/assay ./cmd/assay-csi

pkcs11: ## build bin/assay-pkcs11, the helper for hardware security modules: it needs a C compiler
	@mkdir -p $(BIN)
	CGO_ENABLED=1 $(GO) build -trimpath -buildvcs=false -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/assay-pkcs11

demo: build ## the main job, end to end, in under a minute
	@CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false -ldflags '-s -w' -o $(BIN)/demo/ ./test/demo ./test/demo/workload
	@$(BIN)/demo/demo -bin $(BIN)

demo-evidence: build ## identity follows what is known of an image: real containers, a real peer, printed times
	@CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false -ldflags '-s -w' -o $(BIN)/demo/ ./test/demo ./test/demo/workload
	@$(BIN)/demo/demo -bin $(BIN) -evidence

check: fmt vet lint arch unit script gen-check ## format, vet, lint, arch, unit tests with -race, scripts, generated code

fmt: tools
	@out=$$(gofmt -l $$(git ls-files '*.go' | grep -v '\.pb\.go$$')); if [ -n "$$out" ]; then echo "not gofmt'd:"; echo "$$out"; exit 1; fi

vet:
	$(GO) vet ./...

lint: tools
	$(BIN)/tools/golangci-lint run ./...

arch:
	$(GO) test ./test/arch

# Everything that needs neither root nor another program.
unit:
	$(TEST) -race $$($(GO) list ./... | grep -vE '/test/(arch|script|lab|labhosts|labk8s|robust|hostile|compat|demo|bench)(/|$$)')

script:
	$(TEST) ./test/script

gen-check: gen
	@git diff --exit-code --stat -- '*.pb.go' || { echo "generated code is out of date: commit what 'make gen' made"; exit 1; }

gen: ## remake the committed generated code from the .proto files
	./test/gen.sh

packages: build $(BIN)/tools/nfpm ## deb and rpm of server and agent, into bin/packages
	./deploy/packages/build.sh $(BIN)/tools/nfpm $(VERSION)

$(BIN)/tools/nfpm: tools/packages/go.mod tools/packages/go.sum
	@mkdir -p $(BIN)/tools
	cd tools/packages && $(GO) build -o ../../$(BIN)/tools/ github.com/goreleaser/nfpm/v2/cmd/nfpm

tools: $(BIN)/tools/golangci-lint

$(BIN)/tools/golangci-lint: tools/go.mod tools/go.sum
	@mkdir -p $(BIN)/tools
	cd tools && $(GO) build -o ../$(BIN)/tools/ github.com/golangci/golangci-lint/v2/cmd/golangci-lint

setup: ## on Debian as root: install the packages that the tests need
	./test/setup.sh

test: setup ## the whole suite: check, fuzz, real Docker, real SPIRE agent, the demo
	./test/all.sh

lab: build $(BIN)/k8s/kube-apiserver packages ## real Docker, real systemd, Kubernetes' API server
	$(TEST) -count=1 ./test/lab/... ./attestor/docker/... ./attestor/systemd/... ./attestor/tpm

lab-hosts: build packages ## hosts of each kind, a router between them: links cut, clocks set, reboots; prints the times
	CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false -ldflags '-s -w' -o $(BIN)/labhosts/ ./test/labhosts/app
	@rm -f $(BIN)/labhosts/report
	LAB_REPORT=$(CURDIR)/$(BIN)/labhosts/report $(TEST) -count=1 -timeout 10m ./test/labhosts
	@if [ -e $(BIN)/labhosts/report ]; then cat $(BIN)/labhosts/report; fi # there is none if it was skipped

# Kubernetes is built from source in a module of its own: the API server takes 15 minutes of processor time
# when the build cache is cold, the other three 6 more, and all of them seconds when it is warm.
K8S         := k8s.io/kubernetes/cmd
K8S_LDFLAGS := -s -w -X k8s.io/component-base/version.gitVersion=v1.36.3

$(BIN)/k8s/%: test/lab/k8s/go.mod test/lab/k8s/go.sum
	@mkdir -p $(BIN)/k8s
	cd test/lab/k8s && nice $(GO) build -o ../../../$(BIN)/k8s/$* -ldflags '$(K8S_LDFLAGS)' $(K8S)/$*

# Names and network policies: CoreDNS and kube-router's controller, in a module of their own too (80 s when cold).
$(BIN)/k8s/coredns $(BIN)/k8s/netpol: $(BIN)/k8s/%: test/lab/k8snet/go.mod test/lab/k8snet/go.sum test/lab/k8snet/coredns/main.go test/lab/k8snet/netpol/main.go
	@mkdir -p $(BIN)/k8s
	cd test/lab/k8snet && CGO_ENABLED=0 nice $(GO) build -trimpath -o ../../../$(BIN)/k8s/$* -ldflags '-s -w' ./$*

k8s: $(BIN)/k8s/coredns $(BIN)/k8s/netpol $(BIN)/k8s/kube-apiserver $(BIN)/k8s/kube-controller-manager $(BIN)/k8s/kube-scheduler $(BIN)/k8s/kubelet $(BIN)/k8s/kube-proxy $(BIN)/k8s/kubectl ## build the Kubernetes that the labs run

lab-k8s: images k8s ## a whole real Kubernetes: pods get, lose and regain identity; prints the times
	@rm -f $(BIN)/k8s/report
	LAB_REPORT=$(CURDIR)/$(BIN)/k8s/report $(TEST) -count=1 ./test/labk8s
	@if [ -e $(BIN)/k8s/report ]; then cat $(BIN)/k8s/report; fi # likewise

robust: build ## kill, fill, damage, take away; history compared with a model after each
	$(TEST) -count=1 -parallel 8 ./test/robust

hostile: build ## every field of every RPC, and the transport below
	$(TEST) -count=1 ./test/hostile

compat: build ## public SPIFFE clients and tools, the real spire-agent among them
	$(TEST) -count=1 -timeout 30m ./test/compat/...

fuzz: ## every fuzz target for FUZZTIME
	FUZZTIME=$(FUZZTIME) ./test/fuzz.sh

bench: build ## the numbers we promise
	$(GO) test -run '^$$' -bench . -benchmem ./server/... ./agent/... ./workloadapi/... ./attestor/... ./test/world
	$(GO) run ./test/bench -bin $(BIN)

bench-short: build ## that everything can be measured: small counts, fails on wrong counts and errors only
	$(GO) run ./test/bench -bin $(BIN) -short

images: build ## container images of the binaries and nothing else, with bills of materials, in bin/images
	@$(GO) run ./deploy/images -bin $(BIN) -out $(BIN)/images -tag $(VERSION)

clean:
	rm -rf $(BIN)
