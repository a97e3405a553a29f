package server

import (
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"

	"github.com/assay-id/assay/server/api/caller"
	"github.com/assay-id/assay/server/audit"
)

// refusals are connections that never come to a call, and so are seen by none of the interceptors:
// counted always, and told of as often as strangers may fill a disk.
type refusals struct {
	audit interface{ Write(line audit.Line) error }
	log   logrus.FieldLogger
	count *prometheus.CounterVec

	mu     sync.Mutex // guards the three below
	limits budgetOfLines
	certs  budgetOfLines
	starve budgetOfLines
}

// What a connection was refused for.
const (
	refusedLimit       = "limit"       // there are too many
	refusedCertificate = "certificate" // its certificate does not verify
	refusedHandshake   = "handshake"   // it speaks no TLS, or none that we do
	refusedDescriptors = "descriptors" // this process has no file descriptor for it; it waits
)

func newRefusals(log *audit.Log, logger logrus.FieldLogger, reg prometheus.Registerer) (*refusals, error) {
	r := &refusals{
		audit: log, log: logger,
		count: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "assay_server_connections_refused_total",
			Help: "TCP connections that were closed before their first call, by reason: limit, certificate or handshake; and descriptors, for want of which one waited.",
		}, []string{"reason"}),
		limits: budgetOfLines{every: 10 * time.Second, most: 1},
		certs:  budgetOfLines{every: time.Second, most: 30},
		starve: budgetOfLines{every: time.Minute, most: 1},
	}
	for _, reason := range []string{refusedLimit, refusedCertificate, refusedHandshake, refusedDescriptors} {
		r.count.WithLabelValues(reason)
	}
	if err := reg.Register(r.count); err != nil {
		return nil, fmt.Errorf("register metrics of connections: %w", err)
	}
	return r, nil
}

// limit tells of a connection over a limit.
func (r *refusals) limit(source, limit string) {
	r.count.WithLabelValues(refusedLimit).Inc()
	r.mu.Lock()
	unsaid, may := r.limits.take(time.Now())
	r.mu.Unlock()
	if may {
		r.log.WithFields(logrus.Fields{"addr": source, "limit": limit, "unsaid": unsaid}).Warn("connection closed: over a limit")
	}
}

// starved tells of one that could not be taken because this process, or the machine, has as many files open
// as it may. gRPC tries again without a word, and the caller sees a server that does not answer.
func (r *refusals) starved(err error) {
	r.count.WithLabelValues(refusedDescriptors).Inc()
	r.mu.Lock()
	unsaid, may := r.starve.take(time.Now())
	r.mu.Unlock()
	if may {
		r.log.WithError(err).WithField("unsaid", unsaid).Error("callers wait: there is no file descriptor for another connection; " +
			"raise LimitNOFILE of the server's unit (ulimit -n), or see who holds so many connections")
	}
}

// handshake tells of one that failed. A certificate that does not verify is a decision and has its
// audit line; its holder learns no more than that it is a bad one (RFC 8446, section 6.2).
func (r *refusals) handshake(addr net.Addr, err error) {
	refused, ok := errors.AsType[*caller.RefusedCertificate](err)
	if !ok {
		r.count.WithLabelValues(refusedHandshake).Inc()
		r.log.WithError(err).WithField("addr", addr.String()).Debug("handshake failed")
		return
	}
	r.count.WithLabelValues(refusedCertificate).Inc()
	r.mu.Lock()
	unsaid, may := r.certs.take(time.Now())
	r.mu.Unlock()
	if !may {
		return
	}
	reason := fmt.Sprintf("the certificate that names %q: %s", refused.Shown, refused)
	if unsaid > 0 {
		reason += fmt.Sprintf("; %d like it had no line", unsaid)
	}
	r.log.WithError(refused).WithFields(logrus.Fields{"addr": addr.String(), "shown": refused.Shown, "unsaid": unsaid}).Info("client certificate refused")
	// Nothing was done that could be undone, so a line that cannot be written changes nothing; the log
	// counts it.
	_ = r.audit.Write(audit.Line{Event: "connection.refuse", Caller: "anyone", Peer: addr.String(), Outcome: audit.Deny, Reason: reason})
}

// budgetOfLines is how many lines strangers may cause: most at once, and one more after each every.
type budgetOfLines struct {
	every time.Duration
	most  int

	spent  int
	unsaid int
	since  time.Time // when spent was last lowered
}

// take reports whether there may be a line, and of how many there was none since the last.
func (b *budgetOfLines) take(now time.Time) (unsaid int, may bool) {
	if back := int(now.Sub(b.since) / b.every); back > 0 {
		b.spent = max(0, b.spent-back)
		b.since = now
	}
	if b.spent >= b.most {
		b.unsaid++
		return 0, false
	}
	b.spent++
	unsaid, b.unsaid = b.unsaid, 0
	return unsaid, true
}
