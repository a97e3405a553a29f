package conf

import (
	"maps"
	"net"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/sirupsen/logrus"

	"github.com/assay-id/assay/attestor/external"
)

// Log is where a daemon's log goes and how much of it.
type Log struct {
	Level logrus.Level
	// File is the absolute path of the log file; empty means standard error.
	File string
	// JSON asks for one JSON object per line.
	JSON bool
	// Source puts the place in the code into every line.
	Source bool
}

// Health is the HTTP listener for liveness and readiness probes.
type Health struct {
	// Address is host:port; empty means that there is no listener.
	Address             string
	LivePath, ReadyPath string
}

// healthBlock is health_checks { … }, with SPIRE's names.
type healthBlock struct {
	Enabled   bool   `hcl:"listener_enabled,optional"`
	Address   string `hcl:"bind_address,optional"`
	Port      *int   `hcl:"bind_port,optional"`
	LivePath  string `hcl:"live_path,optional"`
	ReadyPath string `hcl:"ready_path,optional"`
}

// telemetryBlock is telemetry { … }, with SPIRE's names.
type telemetryBlock struct {
	Prometheus *prometheusBlock `hcl:"prometheus,block"`
}

type prometheusBlock struct {
	Host string `hcl:"host,optional"`
	Port *int   `hcl:"port,optional"`
}

// Addresses of the listeners for probes and metrics where the file does not say. They are loopback:
// neither asks who calls.
const (
	defaultHost       = "127.0.0.1"
	serverHealthPort  = 8080
	agentHealthPort   = 8082
	serverMetricsPort = 9988
	agentMetricsPort  = 9989
	defaultLivePath   = "/live"
	defaultReadyPath  = "/ready"
)

func (l *loader) health(b *healthBlock, port int) Health {
	if b == nil {
		return Health{}
	}
	const key = "health_checks."
	h := Health{
		LivePath:  l.urlPath(key+"live_path", b.LivePath, defaultLivePath),
		ReadyPath: l.urlPath(key+"ready_path", b.ReadyPath, defaultReadyPath),
	}
	if h.LivePath == h.ReadyPath {
		l.say(key+"ready_path", "Invalid path", "live_path and ready_path are both %q; they answer different questions and need different paths.", h.LivePath)
	}
	host := l.ip(key+"bind_address", b.Address, defaultHost)
	port = l.port(key+"bind_port", b.Port, port, 0)
	if b.Enabled {
		h.Address = net.JoinHostPort(host, strconv.Itoa(port))
	}
	return h
}

func (l *loader) urlPath(key, text, byDefault string) string {
	if text == "" {
		return byDefault
	}
	if !strings.HasPrefix(text, "/") || strings.ContainsAny(text, " ?#{}") {
		l.say(key, "Invalid path", "%q is no URL path: it must begin with a slash and have no query.", text)
		return byDefault
	}
	return text
}

func (l *loader) metrics(b *telemetryBlock, port int) string {
	if b == nil || b.Prometheus == nil {
		return ""
	}
	const key = "telemetry.prometheus."
	host := l.ip(key+"host", b.Prometheus.Host, defaultHost)
	return net.JoinHostPort(host, strconv.Itoa(l.port(key+"port", b.Prometheus.Port, port, 0)))
}

// log reads the four keys that the server and the agent share.
func (l *loader) log(block, level, format, file string, source bool) Log {
	return Log{
		Level: l.logLevel(block+".log_level", level),
		JSON:  l.oneOf(block+".log_format", strings.ToLower(format), "text", "json") == "json",
		File:  l.inFile(block+".log_file", file),

		Source: source,
	}
}

// AgentKeyManagers are the kinds of key managers that an agent can have, each with what makes its configuration.
func AgentKeyManagers() map[string]func() any {
	return map[string]func() any{
		"disk": func() any { return new(diskDirectory) }, "memory": func() any { return new(struct{}) },
		"tpm": func() any { return new(tpmKeys) }, external.Type: func() any { return new(external.Config) },
	}
}

// ServerShape and AgentShape are the structs that files are decoded into, for who writes such files.
func ServerShape() reflect.Type { return reflect.TypeFor[serverFile]() }

// AgentShape is ServerShape of an agent's file.
func AgentShape() reflect.Type { return reflect.TypeFor[agentFile]() }

// keyManager reads the one key_manager block, which may be of the kinds in have; "disk" if there is none.
func (l *loader) keyManager(blocks []typeBlock, have map[string]func() any) Chosen {
	l.one(blocks, "key manager", "keys live in one place")
	k := kinds{role: "key manager"}
	for _, name := range slices.Sorted(maps.Keys(have)) {
		k.add(name, have[name])
	}
	c := Chosen{"disk", have["disk"]()}
	l.decodeTypes(blocks, k, func(t string, config any) { c = Chosen{t, config} })
	return c
}
