package arch

// The floors: arrows only point down. Floor 0 also knows floor 0.
const (
	words  = iota // what everybody may speak of
	tools         // one thing each
	flows         // what a change or a request runs through
	wiring        // a daemon
	doors         // a command
	tests         // anything; nothing but tests imports it
)

// rule gives a package its place. A pattern is a path within the module, in which * is any one part and
// ... at the end is whatever follows, itself included. The first rule that fits counts.
type rule struct {
	pattern string
	floor   int
	// also names what may be imported besides the floors below, and why is the reason.
	also []string
	why  string
}

var rules = []rule{
	{pattern: "attestor", floor: words},
	{pattern: "attestor/procfs", floor: words, why: "what the kernel tells of a process, read by more than one attestor"},
	{pattern: "attestor/cgroup", floor: words, why: "which container a process is in, asked by more than one attestor, and these do not import each other"},
	{pattern: "attestor/agentpath", floor: words, why: "how an operator's template makes an agent's path, for more than one attestor, and these do not import each other"},
	{pattern: "attestor/tpmchip", floor: words, why: "what a TPM is and how it is spoken to, for more than one attestor and the agent's keys"},
	{pattern: "attestor/awsapi", floor: words, why: "signed requests to AWS, which more than one attestor makes, and these do not import each other"},
	{pattern: "attestor/plugin", floor: words, why: "how a plugin of SPIRE is run, which attestors, keys and upstream authorities may all be"},
	{pattern: "attestor/measures", floor: words, why: "what plugins measured, which run in both daemons"},
	{pattern: "attestor/external", floor: words, why: "the block of such a plugin, whatever it is for"},
	{pattern: "workloadapi/identity", floor: words},
	{pattern: "workloadapi/unixsocket", floor: words, why: "how a daemon opens its sockets, the server's too"},
	{pattern: "server/wire/...", floor: words},
	{pattern: "agent/admin/wire/...", floor: words, why: "the wire of the agent's own socket, spoken by its command too"},
	{pattern: "server/store/kv", floor: words},
	{pattern: "server/store/durable", floor: words, why: "how a file gets onto the disk whole, for all that keep one beside the store"},
	{pattern: "conf", floor: words},

	{pattern: "attestor/attestortest", floor: tools},
	{pattern: "attestor/*", floor: tools},
	{pattern: "attestor/*/node", floor: tools, also: []string{"attestor/*"}, why: "an attestor's two sides share its names"},
	{pattern: "attestor/*/server", floor: tools, also: []string{"attestor/*"}, why: "likewise"},
	{pattern: "attestor/*/workload", floor: tools, also: []string{"attestor/*"}, why: "likewise"},
	{pattern: "workloadapi/peer", floor: tools},
	{pattern: "server/store/*", floor: tools},
	{pattern: "server/records/stored", floor: words, why: "generated: what records stores"},
	{pattern: "server/records", floor: tools},
	{pattern: "server/ca/keys", floor: tools},
	{pattern: "server/ca/keys/*", floor: tools, also: []string{"server/ca/keys", "server/ca/vault", "server/ca/aws"}, why: "each keeps keys as keys says, and two ask services that upstream asks too"},
	{pattern: "server/ca/vault", floor: tools},
	{pattern: "server/ca/aws", floor: tools},
	{pattern: "server/ca/upstream", floor: tools},
	{pattern: "server/ca/upstream/*", floor: tools, also: []string{"server/ca/upstream", "server/ca/vault", "server/ca/aws"}, why: "each kind speaks in the words of upstream, and two ask services that keys ask too"},
	{pattern: "server/ca", floor: tools, also: []string{"server/ca/...", "server/records"}, why: "the journal is records' type"},
	{pattern: "server/audit", floor: tools},
	{pattern: "server/turn", floor: tools},
	{pattern: "agent/keep", floor: tools},
	{pattern: "agent/dial", floor: tools},
	{pattern: "agent/keep/external", floor: tools, also: []string{"agent/keep"}, why: "keeps the agent's key as keep says, in a plugin of SPIRE"},
	{pattern: "server/verdict/image", floor: tools, why: "what a digest is proved to lead to, which nothing else of verdict needs"},
	{pattern: "server/verdict/report", floor: tools, why: "parsers of reports, which nothing else of verdict needs"},
	{pattern: "server/verdict/policy", floor: tools, also: []string{"server/verdict/report"}, why: "a policy is about reports"},
	{pattern: "server/verdict/trust", floor: tools, also: []string{"server/verdict/report"}, why: "what was signed is provenance, which report reads"},

	{pattern: "server/view/viewtest", floor: flows},
	{pattern: "server/view", floor: flows},
	{pattern: "server/api/caller", floor: flows, also: []string{"server/view"}, why: "who calls is looked up in the view"},
	{pattern: "server/api/roles", floor: flows, also: []string{"server/api/caller"}, why: "who a caller is, is caller's business; what the operator grants is read from the file here"},
	{pattern: "server/backup", floor: flows},
	{pattern: "server/feed", floor: flows, also: []string{"server/view", "server/api/caller"}, why: "streams differences of pictures to who calls"},
	{pattern: "server/admit", floor: flows, also: []string{"server/view", "server/api/caller"}, why: "is this node banned?"},
	{
		pattern: "server/api", floor: flows,
		also: []string{"server/api/caller", "server/admit", "server/view", "server/feed", "server/verdict", "server/backup"},
		why:  "the services hand over to the flows, and feed answers SPIRE's sync calls",
	},
	{pattern: "server/kube", floor: flows, why: "makes entries of a cluster's pods, over the public API alone"},
	{pattern: "server/trust", floor: flows, also: []string{"server/view"}, why: "publishes the bundle of the picture"},
	{pattern: "server/verdict/rules", floor: flows, also: []string{"server/verdict", "server/verdict/policy", "server/verdict/trust"}, why: "reads their blocks from the file"},
	{pattern: "server/verdict", floor: flows, also: []string{"server/view", "server/api/caller", "server/verdict/image", "server/verdict/policy", "server/verdict/report", "server/verdict/trust"}, why: "verdicts are about what the picture shows"},
	{pattern: "agent/issue", floor: flows, also: []string{"agent/view"}, why: "signs what the picture shows"},
	{pattern: "agent/admin", floor: flows, also: []string{"agent/view", "workloadapi"}, why: "explains what they decided"},
	{pattern: "agent/delegate", floor: flows, also: []string{"workloadapi"}, why: "attests delegates and the processes they name as workloads are"},
	{pattern: "agent/broker", floor: flows, also: []string{"workloadapi"}, why: "attests the processes that brokers refer to as workloads are"},
	{pattern: "agent/join", floor: flows},
	{pattern: "agent/uplink", floor: flows, also: []string{"agent/view"}, why: "feeds the picture"},
	{pattern: "agent/view", floor: flows},
	{pattern: "workloadapi/sds", floor: flows, also: []string{"workloadapi"}, why: "the same streams in Envoy's words"},
	{pattern: "workloadapi/files", floor: flows, why: "a client of the Workload API, which needs nothing of the server's side of it"},
	{pattern: "workloadapi/workloadapitest", floor: flows},
	{pattern: "workloadapi", floor: flows},

	{pattern: "server", floor: wiring},
	{pattern: "agent", floor: wiring},

	{pattern: "cmd/...", floor: doors, also: []string{"cmd/..."}, why: "commands share flags and signals"},

	{pattern: "deploy/images", floor: doors, why: "a program that packs what make built"},

	{pattern: "test/...", floor: tests, also: []string{"test/..."}, why: "harnesses stand on harnesses"},
}

// sides keep the two daemons apart, whatever the floors allow: from may import nothing that fits not,
// but for what fits but.
var sides = []struct {
	from, not string
	but       []string
}{
	{"agent/...", "server/...", []string{"server/wire/..."}},
	{"workloadapi/...", "server/...", []string{"server/wire/..."}},
	{"server/...", "agent/...", nil},
	{"server/...", "workloadapi/...", []string{"workloadapi/identity", "workloadapi/unixsocket"}},
	{"attestor/...", "server/...", []string{"server/wire/..."}},
	{"attestor/...", "agent/...", nil},
	{"attestor/...", "workloadapi/...", nil},
	{"conf", "server/...", nil},
	{"conf", "agent/...", nil},
}

// homes are where heavy libraries live; nothing else imports them. Tests may.
var homes = []struct {
	library string
	at      []string
}{
	{"k8s.io", []string{"cmd/assay-csi", "attestor/k8s.../...", "server/kube", "test/..."}},
	{"sigs.k8s.io", []string{"attestor/k8s.../...", "server/kube", "test/..."}},
	{"github.com/moby/moby", []string{"attestor/docker/...", "test/..."}},
	{"go.etcd.io/etcd", []string{"server/store/etcdkv", "test/..."}},
	{"github.com/container-storage-interface", []string{"cmd/assay-csi", "test/..."}},
	{"go.etcd.io/bbolt", []string{"server/store/boltkv", "test/..."}},
	{"github.com/sigstore", []string{"server/verdict/trust", "test/..."}},
	{"github.com/aws", []string{"attestor/...", "server/ca/aws", "test/..."}},
	{"github.com/miekg/pkcs11", []string{"cmd/assay-pkcs11"}},
	{"go.yaml.in/yaml", []string{"server/ca/upstream/certmanager", "test/..."}},
	{"cloud.google.com", []string{"attestor/...", "server/ca/keys/...", "server/ca/upstream/..."}},
	{"github.com/Azure", []string{"attestor/...", "server/ca/keys/...", "server/ca/upstream/..."}},
	{"github.com/vmware/govmomi", []string{"attestor/vsphere/server", "test/..."}},
	{"github.com/smallstep/pkcs7", []string{"attestor/awsiid/server"}},
	{"github.com/google/go-tpm", []string{"attestor/tpm/...", "attestor/tpmchip", "attestor/tpmdevid/...", "agent/keep", "test/..."}},
	{"golang.org/x/crypto/ssh", []string{"attestor/sshpop/...", "test/..."}},
	{"github.com/godbus/dbus", []string{"attestor/systemd/...", "test/..."}},
	{"github.com/envoyproxy", []string{"workloadapi/sds", "test/..."}},
	{"github.com/google/go-containerregistry", []string{"server/verdict/...", "deploy/images", "test/..."}},
	{"github.com/hashicorp/hcl", []string{"conf", "server/verdict/rules", "server/api/roles", "attestor/attestortest", "attestor/all/...", "cmd/...", "test/..."}},
	{"github.com/hashicorp/go-plugin", []string{"test/..."}},
	{"github.com/spiffe/spire-plugin-sdk", []string{"attestor/plugin", "attestor/external/...", "agent/keep/external", "server/ca/keys/external", "server/ca/upstream/external", "test/..."}},
	{"github.com/spf13/cobra", []string{"cmd/...", "test/..."}},
}

// closures are what a binary must not contain, with whatever it imports, and why.
var closures = []struct {
	binary string
	not    []string // import paths; a leading ./ stands for this module
	but    []string
	why    string
	// excused may be there all the same as long as nobody but the package named here imports it.
	excused map[string]string
}{
	{
		"cmd/assay-agent",
		[]string{
			"./server/...", "./attestor/*/server", "./test/...",
			"go.etcd.io/...", "k8s.io/client-go/...", "sigs.k8s.io/...", "github.com/sigstore/...", "github.com/aws/...", "github.com/miekg/pkcs11",
			"cloud.google.com/go/kms/...", "github.com/Azure/azure-sdk-for-go/...",
			"github.com/mattn/go-sqlite3", "modernc.org/...", "github.com/jackc/...", "github.com/go-sql-driver/...", "github.com/lib/pq", "gorm.io/...",
			"testing", "github.com/hashicorp/go-plugin/...", "github.com/hashicorp/yamux/...",
		},
		[]string{"./server/wire/..."},
		"it runs on every node, and its size and memory are promised numbers",
		nil,
	},
	{
		"cmd/assay-server",
		[]string{"./agent/...", "./attestor/*/node", "./attestor/*/workload", "./test/...", "github.com/moby/moby/...", "github.com/hashicorp/go-plugin/...", "testing"},
		[]string{"./agent/admin/wire/..."},
		"it attests no workloads, and the less it contains the less can be wrong with it",
		leftInside,
	},
	{
		"cmd/assay-csi",
		[]string{"./agent/...", "./server/...", "./attestor/...", "./test/...", "k8s.io/client-go/...", "testing"}, []string{"./attestor", "./attestor/external", "./server/wire/..."},
		"it is privileged on every node, and so contains as little as can be", nil,
	},
	{"cmd/assay", []string{"./test/...", "testing"}, nil, "tests are not shipped", leftInside},
}

// leftInside: sigstore-go reads timestamps with pkcs7, one of whose test files (verify_test_dsa.go) does
// not end in _test.go and so is part of the package.
var leftInside = map[string]string{"testing": "github.com/digitorus/pkcs7"}

// badNames say nothing about what a package is.
var badNames = []string{"util", "utils", "common", "helper", "helpers", "types", "models", "misc", "base", "lib", "pkg", "internal", "shared"}

// kvWriters may make transactions: one road for every change.
var kvWriters = []string{"server/records", "server/store/..."}
