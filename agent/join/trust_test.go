package join

import (
	"crypto/x509"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/workloadapi/identity"
)

func TestWhenTheBootstrapSourceIsReadAgain(t *testing.T) {
	now := time.Now()
	for name, c := range map[string]struct {
		again   time.Duration
		unknown time.Duration // how long the server has been unknown to the bundle
		expired bool          // the bundle is
		want    bool
	}{
		"not while the server is known":                    {0, 0, false, false},
		"not soon after it has become unknown":             {0, 9 * time.Minute, false, false},
		"after ten minutes, if nobody says otherwise":      {0, 10 * time.Minute, false, true},
		"after what the operator says":                     {time.Minute, time.Minute, false, true},
		"at once, if he says so":                           {time.Nanosecond, time.Millisecond, false, true},
		"never, if he says so":                             {-1, 24 * time.Hour, false, false},
		"at any time with a bundle that has expired":       {0, 0, true, true},
		"but not even then, if the operator says never":    {-1, 24 * time.Hour, true, false},
		"not before the operator's delay, as long as that": {time.Hour, 59 * time.Minute, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			trust, err := newTrust(spiffeid.RequireTrustDomainFromString("example.org"), c.again, func() time.Time { return now }, logrus.New())
			if err != nil {
				t.Fatal(err)
			}
			until := now.Add(time.Hour)
			if c.expired {
				until = now.Add(-time.Hour)
			}
			trust.held = &identity.Bundle{X509: []identity.X509Authority{{Certificate: &x509.Certificate{NotAfter: until}}}}
			if c.unknown > 0 {
				trust.unknownSince = now.Add(-c.unknown)
			}
			if need, _ := trust.need(); need != c.want {
				t.Errorf("it is read: %v", need)
			}
		})
	}
	t.Run("the first time, even if the operator says never", func(t *testing.T) {
		trust, err := newTrust(spiffeid.RequireTrustDomainFromString("example.org"), -1, time.Now, logrus.New())
		if err != nil {
			t.Fatal(err)
		}
		if need, certain := trust.need(); !need || !certain {
			t.Error("it is not read")
		}
	})
}
