package workloadapi

import (
	"encoding/json"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
)

// Auditor takes a line for everything that is handed to a workload or refused to it. It must not
// block for long: the workload waits.
//
// A line that cannot be written does not stop the answer. The certificate exists already, and the
// server wrote its own line before it signed; a full disk on a node must not take every identity on
// it away.
type Auditor interface {
	Audit(Line)
}

// Line is one line of the agent's audit log.
type Line struct {
	Time time.Time `json:"time"`
	// Event is what was asked for: x509_svid, x509_bundles, jwt_svid, jwt_bundles, jwt_validate, sds or other;
	// delegated_ before one of the first four is for somebody who acts for another. What the agent did by
	// itself, plugin_start and plugin_end, has About instead of a caller.
	Event string `json:"event"`
	About string `json:"about,omitempty"`
	// By is the SPIFFE ID of who acts for another: a broker, which is known by its certificate and not by PID, UID and
	// GID, and whose events begin with broker_, or a delegate.
	By string `json:"by,omitempty"`
	// PID, UID and GID are the caller's.
	PID int    `json:"pid"`
	UID uint32 `json:"uid"`
	GID uint32 `json:"gid"`
	// Facts stands for the caller's selectors: equal facts have equal values.
	Facts string `json:"facts,omitempty"`
	// Types are the types of the caller's selectors, Selectors those that may be logged.
	Types     []string `json:"selector_types,omitempty"`
	Selectors []string `json:"selectors,omitempty"`
	// SPIFFEIDs and EntryIDs are what was handed out.
	SPIFFEIDs []string `json:"spiffe_ids,omitempty"`
	EntryIDs  []string `json:"entry_ids,omitempty"`
	// ForPID and ForFacts, which stands for selectors as Facts does, say for whom the caller acts: a
	// process, or whoever shows the selectors that it named.
	ForPID   int    `json:"for_pid,omitempty"`
	ForFacts string `json:"for_facts,omitempty"`
	// ForObject is the object of Kubernetes that a broker named, and Remote from where somebody called whom nothing
	// else is known of.
	ForObject string `json:"for_object,omitempty"`
	Remote    string `json:"remote,omitempty"`
	// Audience is a JWT-SVID's.
	Audience []string `json:"audience,omitempty"`
	// Rev is the server's revision that the answer reflects.
	Rev uint64 `json:"rev,omitempty"`
	// Outcome is allow, deny (it may not, or asked for what cannot be) or error (the agent could not);
	// Reason says why it is not allow.
	Outcome string `json:"outcome"`
	Reason  string `json:"reason,omitempty"`
}

// OwnLine is the line of something that the agent did by itself. PID, UID and GID are its own.
func OwnLine(event, about string, err error) Line {
	l := Line{
		Time: time.Now().UTC(), Event: strings.ReplaceAll(event, ".", "_"), About: about, Outcome: "allow",
		PID: os.Getpid(), UID: uint32(os.Getuid()), GID: uint32(os.Getgid()), //nolint:gosec // IDs fit
	}
	if err != nil {
		l.Outcome, l.Reason = "error", err.Error()
	}
	return l
}

// AuditTo returns an Auditor that writes each line as JSON in one Write. Errors go to log, which may
// be nil, now and then.
func AuditTo(w io.Writer, log logrus.FieldLogger) Auditor {
	return &auditWriter{w: w, log: orDiscard(log)}
}

type auditWriter struct {
	log logrus.FieldLogger

	mu   sync.Mutex // guards the rest
	w    io.Writer
	lost int
	last time.Time
}

// Audit writes one line.
func (a *auditWriter) Audit(l Line) {
	text, err := json.Marshal(l)
	if err != nil { // strings and numbers always marshal
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if _, err = a.w.Write(append(text, '\n')); err == nil {
		return
	}
	a.lost++
	if l.Time.Sub(a.last) >= complainInterval {
		a.last = l.Time
		a.log.WithError(err).WithField("lost", a.lost).Error("audit line could not be written")
	}
}

// audit writes the line of an answer, or of the error that stands in its place.
func (s *Server) audit(event string, c *caller, facts *attested, a *answer, audience []string, err error) {
	result, reason := outcome(err)
	s.metrics.answers.WithLabelValues(event, result).Inc()
	if s.cfg.Audit == nil {
		return
	}
	p := c.peer.Process
	l := Line{
		Time: s.now().UTC(), Event: event, PID: p.PID, UID: p.UID, GID: p.GID,
		Audience: audience, Outcome: result, Reason: reason,
	}
	if facts != nil {
		l.Facts, l.Types, l.Selectors = facts.digest, facts.types, facts.shown
	}
	if a != nil {
		l.By, l.Rev, l.ForPID, l.ForFacts = a.by, a.rev, a.forPID, a.forFacts
		if err == nil {
			l.SPIFFEIDs, l.EntryIDs = a.ids, a.entries
		}
	}
	s.cfg.Audit.Audit(l)
}
