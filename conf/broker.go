package conf

import (
	"net"
	"path/filepath"
	"slices"
	"strings"

	"github.com/hashicorp/hcl/v2"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Broker is where SPIFFE's Broker API is served, and to whom.
type Broker struct {
	SocketPath, Address string // either may be empty; both are: nowhere
	Allow               []BrokerGrant
}

// BrokerGrant is what one broker may refer to.
type BrokerGrant struct {
	ID spiffeid.ID
	// Types are type URLs of references, or "*", each with whether it may be used over TCP.
	Types map[string]bool
}

// brokerBlock is agent.broker.
type brokerBlock struct {
	Where   hcl.Range          `hcl:",def_range"`
	Socket  string             `hcl:"socket_path,optional"`
	Address string             `hcl:"bind_address,optional"`
	Allow   []brokerAllowBlock `hcl:"allow,block"`
}

// brokerAllowBlock is allow "spiffe://…" { … } in it.
type brokerAllowBlock struct {
	ID      string    `hcl:"name,label"`
	Where   hcl.Range `hcl:",def_range"`
	Types   []string  `hcl:"reference_types,optional"`
	OverTCP []string  `hcl:"reference_types_over_tcp,optional"`
}

// broker checks who may call, and where. public is the Workload API's socket.
func (l *loader) broker(b *brokerBlock, public string) Broker {
	if b == nil {
		return Broker{}
	}
	const key = "agent.broker."
	out := Broker{Address: b.Address}
	if b.Socket != "" {
		out.SocketPath = l.socket(key+"socket_path", b.Socket, "")
		if filepath.Dir(out.SocketPath) == filepath.Dir(public) {
			l.say(key+"socket_path", "Invalid socket path", "%q is in the directory of the Workload API's socket, which is handed to workloads; choose another directory.", out.SocketPath)
		}
	}
	if b.Address != "" {
		host, port, err := net.SplitHostPort(b.Address)
		if err != nil || port == "" || host != "" && net.ParseIP(host) == nil {
			l.say(key+"bind_address", "Invalid address", "%q is no address to listen at: write IP:PORT, as in \"0.0.0.0:8443\".", b.Address)
		}
	}
	if b.Socket == "" && b.Address == "" {
		l.at(b.Where, "Missing address", "Brokers need somewhere to call: set socket_path, bind_address or both.")
	}
	if len(b.Allow) == 0 {
		l.at(b.Where, "Missing broker", `Nobody may call yet; add allow "spiffe://…" { reference_types = [ … ] }.`)
	}
	seen := map[spiffeid.ID]bool{}
	for _, a := range b.Allow {
		id, err := spiffeid.FromString(a.ID)
		switch {
		case err != nil || id.Path() == "":
			l.at(a.Where, "Invalid SPIFFE ID", quoted([]string{a.ID})+" is no SPIFFE ID with a path.")
			continue
		case seen[id]:
			l.at(a.Where, "Duplicate broker", id.String()+" is there twice; keep one of the blocks.")
			continue
		}
		seen[id] = true
		out.Allow = append(out.Allow, BrokerGrant{ID: id, Types: l.references(a)})
	}
	return out
}

// referenceNames are the messages that a broker can refer to somebody by.
var referenceNames = []string{"spiffe.broker.WorkloadPIDReference", "spiffe.broker.KubernetesObjectReference"}

func (l *loader) references(a brokerAllowBlock) map[string]bool {
	types := map[string]bool{}
	if len(a.Types)+len(a.OverTCP) == 0 {
		l.at(a.Where, "Missing reference types", `The broker may refer to nothing; add reference_types = ["type.googleapis.com/spiffe.broker.WorkloadPIDReference"].`)
	}
	for i, list := range [][]string{a.Types, a.OverTCP} {
		for _, url := range list {
			if url != "*" && !strings.Contains(url, "/") {
				l.at(a.Where, "Invalid reference type", quoted([]string{url})+` is no type URL; write "type.googleapis.com/spiffe.broker.WorkloadPIDReference", or "*" for any.`)
				continue
			}
			if name := url[strings.LastIndexByte(url, '/')+1:]; url != "*" && !slices.Contains(referenceNames, name) {
				l.at(a.Where, "Unknown reference type", quoted([]string{name})+" is nothing that this agent can look up; there are "+quoted(referenceNames)+".")
				continue
			}
			types[url] = types[url] || i == 1
		}
	}
	return types
}
