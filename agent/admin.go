package agent

import (
	"crypto/x509"
	"errors"
	"slices"

	"github.com/sirupsen/logrus"

	"github.com/assay-id/assay/agent/admin"
	"github.com/assay-id/assay/agent/delegate"
	"github.com/assay-id/assay/agent/uplink"
	"github.com/assay-id/assay/workloadapi/identity"
)

// openAdmin makes the private socket, if there is to be one.
func (a *agent) openAdmin() {
	if a.cfg.AdminSocketPath == "" {
		return
	}
	a.admin = admin.New(a.view, a.attest, admin.Config{
		SocketPath: a.cfg.AdminSocketPath,
		Status:     a.status,
		SVID:       a.issue.State,
		Level:      leveler(a.cfg.Log),
		Log:        a.cfg.Log.WithField("component", "admin"),
		Now:        a.cfg.Now,
	})
	delegate.Register(a.admin, delegate.Config{
		Authorized: a.cfg.AuthorizedDelegates,
		Attest:     a.serve,
		Source:     a.issue.Delegated(),
		Entitled:   a.issue.Entitled,
		Bundles: func() ([]*identity.Bundle, <-chan struct{}) {
			picture, changed := a.view.Follow()
			return picture.BundleList(), changed
		},
		Pin: a.admin.Pin,
	})
}

// leveler returns whose level can be changed, or nil.
func leveler(log logrus.FieldLogger) admin.Leveler {
	switch l := log.(type) {
	case *logrus.Logger:
		return l
	case *logrus.Entry:
		return l.Logger
	}
	return nil
}

var errNoSVID = errors.New("the agent has no SVID of its own yet")

// status is how the agent is, for explain and debug.
func (a *agent) status() admin.Status {
	up := a.uplink.Status()
	s := admin.Status{
		Version:   a.cfg.Version,
		Server:    a.cfg.serverTarget(),
		StartedAt: a.started,
		Heard:     up.Synced,
		PictureAt: up.MadeAt,
		ServerRev: up.Rev,
		Banned:    a.join.Banned(),
	}
	switch up.State {
	case uplink.StateFeed:
		s.Uplink, s.Connected = "feed", true
	case uplink.StatePolling:
		s.Uplink, s.Connected = "sync", true
	case uplink.StateConnecting:
		s.Uplink, s.Err, s.ErrAt = "connecting", up.Err, up.Since
		if up.Err != nil {
			s.Uplink = "disconnected"
		}
		if err := a.join.Err(); err != nil { // why the server does not take the SVID that it was shown
			s.Err = err
		}
	default:
		s.Uplink, s.Err, s.ErrAt = "disconnected", a.join.Err(), up.Since
		if s.Err == nil {
			s.Err = errNoSVID
		}
	}
	if own, _ := a.join.Own(); own != nil {
		s.Chain = a.toRoot(own.Chain)
	}
	s.AgentID = a.join.ID()
	s.X509Held, s.JWTHeld = a.issue.Counts()
	return s
}

// toRoot returns the chain with the root that it hangs on, if the picture has it.
func (a *agent) toRoot(chain []*x509.Certificate) []*x509.Certificate {
	if len(chain) == 0 {
		return chain
	}
	last := chain[len(chain)-1]
	for _, b := range a.view.Picture().BundleList() {
		if b.TrustDomain != a.cfg.TrustDomain {
			continue
		}
		for _, root := range b.X509 {
			if last.CheckSignatureFrom(root.Certificate) == nil {
				return append(slices.Clone(chain), root.Certificate)
			}
		}
	}
	return chain
}
