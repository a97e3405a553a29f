package hostile

import (
	"bytes"
	"context"
	"fmt"
	"runtime/metrics"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
)

// services knocks at a socket with every method of every service that is linked into this program,
// which all that a server or an agent could register are, and returns the methods that are there.
func services(t *testing.T, conn *grpc.ClientConn) (found []protoreflect.MethodDescriptor) {
	t.Helper()
	protoregistry.GlobalFiles.RangeFiles(func(file protoreflect.FileDescriptor) bool {
		for i := range file.Services().Len() {
			methods := file.Services().Get(i).Methods()
			for j := range methods.Len() {
				m := methods.Get(j)
				a := converse(t.Context(), conn, m, true, nil, turns{func([]byte) ([]byte, error) { return []byte{0x07}, nil }})
				text := status.Convert(a.err).Message()
				if status.Code(a.err) == codes.Unimplemented && (strings.HasPrefix(text, "unknown service") || strings.HasPrefix(text, "unknown method")) {
					continue
				}
				found = append(found, m)
			}
		}
		return true
	})
	slices.SortFunc(found, func(a, b protoreflect.MethodDescriptor) int { return strings.Compare(fullName(a), fullName(b)) })
	return found
}

// socket is one way in.
type socket struct {
	name string
	// knock is the connection that methods are looked for with, as the one that samples are called
	// with where they do not say.
	knock string
	// audited says that its calls have lines in the server's audit log.
	audited bool
	// caller returns who calls a method there, and how a good call by him ends.
	caller func(sample) (string, codes.Code)
}

var sockets = []socket{
	{"TCP", "anyone", true, func(s sample) (string, codes.Code) { return s.as, s.code }},
	{"the server's private socket", "local", true, func(s sample) (string, codes.Code) {
		switch s.as {
		case "agent", "big", "downstream": // who administers the server is no node of it
			return "local", codes.PermissionDenied
		}
		return "local", s.code
	}},
	{"the Workload API", "workload", false, func(s sample) (string, codes.Code) { return "workload", s.code }},
	{"the agent's private socket", "operator", false, func(s sample) (string, codes.Code) { return "operator", s.code }},
	{"the agent's socket for brokers", "broker", false, func(s sample) (string, codes.Code) { return "broker", s.code }},
}

// TestEveryFieldOfEveryMethod calls every method at every socket with every kind of bad value in every
// field, one at a time.
func TestEveryFieldOfEveryMethod(t *testing.T) {
	g := newGround(t, withEvidence(t))
	g.populate()
	g.startAgent()
	used := map[string]bool{}
	for _, at := range sockets {
		t.Run(at.name, func(t *testing.T) {
			found := services(t, g.as[at.knock])
			if len(found) < 4 {
				t.Fatalf("%d methods were found", len(found))
			}
			g.log.take()
			for _, m := range found {
				s, ok := samples[fullName(m)]
				if !ok {
					t.Errorf("%s is served and has no sample: add a good call of it to samples", fullName(m))
					continue
				}
				used[fullName(m)] = true
				t.Run(fullName(m)[1:], func(t *testing.T) { (&table{g: g, at: at, method: m, sample: s}).run(t) })
			}
			g.unharmed(t)
		})
	}
	for method := range samples {
		if !used[method] {
			t.Errorf("%s has a sample and is served nowhere", method)
		}
	}
}

// table is one method at one socket.
type table struct {
	g      *ground
	at     socket
	method protoreflect.MethodDescriptor
	sample sample
	who    string
	want   codes.Code
	audit  int64 // how far the audit log was read
}

func (c *table) run(t *testing.T) {
	if c.who, c.want = c.at.caller(c.sample); c.who == "" {
		c.who = c.at.knock
	}
	_, c.audit = c.g.auditSince(0)
	c.control(t)
	count := 0
	for at := range c.sample.messages {
		for _, way := range spoil(c.method.Input()) {
			count++
			if problem := c.try(t, at, way); problem != "" {
				t.Errorf("message %d: %s: %.300s", at+1, way.name, problem)
			}
		}
	}
	c.control(t)
	c.g.unharmed(t)
	t.Logf("%d bad requests", count)
}

// control makes a good call.
func (c *table) control(t *testing.T) {
	t.Helper()
	a := c.call(t.Context(), -1, spoiled{})
	if status.Code(a.err) != c.want || c.want == codes.OK && refused(c.method, a) {
		t.Fatalf("a good call as %s ended with %v, %v, want %s", c.who, a.err, items(c.method, a.last), c.want)
	}
	c.audited(t, "a good call", a)
}

// try spoils one message of a good call, and says what was wrong with the answer.
func (c *table) try(t *testing.T, at int, way spoiled) string {
	before := allocated()
	a := c.call(t.Context(), at, way)
	// A number in a request, as of entries on a page, is no reason to make room for so many. All of this
	// process is counted, and what the call itself takes is far less.
	if cost := allocated() - before; strings.HasSuffix(way.name, " the most") && cost > mostForANumber {
		return fmt.Sprintf("it cost %d MiB", cost>>20)
	}
	c.audited(t, way.name, a)
	if problem := bad(c.method, a); problem != "" {
		return problem
	}
	if way.must && lenient[way.field] == "" && !refused(c.method, a) {
		return "it was not refused"
	}
	return ""
}

// mostForANumber is what a request may cost whose only fault is a large number.
const mostForANumber = 128 << 20

// allocated is how many bytes this process has allocated in its life.
func allocated() uint64 {
	sample := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(sample)
	return sample[0].Value.Uint64()
}

// call makes a call whose message number at is spoiled.
func (c *table) call(ctx context.Context, at int, way spoiled) answer {
	var messages turns
	for i, m := range c.sample.messages {
		messages = append(messages, func(last []byte) ([]byte, error) {
			good := m(c.g, last)
			if i == at {
				return way.wire(good), nil
			}
			return proto.Marshal(good)
		})
	}
	if c.at.knock == "workload" || c.at.knock == "broker" {
		ctx = metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true", "broker.spiffe.io", "true")
	}
	var closing []byte
	if c.sample.closing != nil && at == len(messages)-1 {
		closing = marshal(c.sample.closing)
	}
	a := converse(ctx, c.g.as[c.who], c.method, c.sample.endless, closing, messages)
	for _, text := range c.sample.closed {
		if closing != nil && strings.Contains(status.Convert(a.err).Message(), text) {
			a.err = nil // it was the closing message that was refused
		}
	}
	return a
}

// audited checks that the audit log has what it must have of a call.
func (c *table) audited(t *testing.T, what string, a answer) {
	t.Helper()
	if !c.at.audited {
		return
	}
	text, end := c.g.auditSince(c.audit)
	c.audit = end
	if c.sample.quiet && status.Code(a.err) == codes.OK {
		return
	}
	if status.Code(a.err) == codes.ResourceExhausted && strings.HasPrefix(status.Convert(a.err).Message(), "grpc: ") {
		return // refused for its size, before anybody has asked whose it is
	}
	if !bytes.Contains(text, fmt.Appendf(nil, `"method":%q`, fullName(c.method))) {
		t.Errorf("%s: no audit line; the call ended with %v", what, a.err)
	}
}
