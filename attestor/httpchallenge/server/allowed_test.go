package server

import (
	"context"
	"net/netip"
	"strings"
	"testing"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/httpchallenge"
)

func TestNoMoreAreFetchedThanMayBe(t *testing.T) {
	opened, err := open(&httpchallenge.ServerConfig{AllowedDNSPatterns: []string{".*"}}, attestor.Needs{})
	if err != nil {
		t.Fatal(err)
	}
	j := opened.(*judge) // it is this package's
	for range fetches {
		j.slots <- struct{}{}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for range 20 { // of two ways that are open, select takes either
		err := j.fetch(ctx, "web1.example.org", httpchallenge.Evidence{AgentName: "a", Port: 80}, "nonce")
		if err == nil || !strings.Contains(err.Error(), "too many") {
			t.Fatalf("one too many: %v", err)
		}
	}
}

func TestAllowed(t *testing.T) {
	for _, c := range []struct {
		network string // empty: none is configured
		address string
		want    bool
	}{
		{"", "192.0.2.1", true},
		{"", "10.1.2.3", true},
		{"", "2001:db8::1", true},
		{"", "::ffff:10.1.2.3", true},
		{"", "127.0.0.1", false},
		{"", "::1", false},
		{"", "::ffff:127.0.0.1", false},
		{"", "0.0.0.0", false},
		{"", "::", false},
		{"", "224.0.0.1", false},
		{"", "255.255.255.255", false},
		{"", "fe80::1", false},
		{"", "fe80::1%eth0", false},
		{"", "169.254.169.254", false},
		{"", "::ffff:169.254.169.254", false},
		{"", "64:ff9b::a9fe:a9fe", false},
		{"", "64:ff9b::7f00:1", false},
		{"", "64:ff9b::a01:203", true},
		{"", "168.63.129.16", false},
		{"", "64:ff9b::a83f:8110", false},
		{"", "100.100.100.200", false},
		{"", "fd00:ec2::254", false},
		{"", "fd00:ec2::254%eth0", false},
		{"", "fd00:ec2::255", true},
		{"10.0.0.0/8", "10.1.2.3", true},
		{"10.0.0.0/8", "::ffff:10.1.2.3", true},
		{"10.0.0.0/8", "11.1.2.3", false},
		{"10.0.0.0/8", "2001:db8::1", false},
		{"10.0.0.0/8", "64:ff9b::a01:203", false},
		{"fe80::/10", "fe80::1%eth0", true},
		{"127.0.0.0/8", "127.0.0.1", true},
	} {
		j := &judge{}
		if c.network != "" {
			j.networks = []netip.Prefix{netip.MustParsePrefix(c.network)}
		}
		if got := j.allowed(netip.MustParseAddr(c.address)); got != c.want {
			t.Errorf("where the networks are %q, %s may be asked: %t", c.network, c.address, got)
		}
	}
}
