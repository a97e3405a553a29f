package world_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"math/big"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/assay-id/assay/test/world"
	"github.com/assay-id/assay/workloadapi/identity"
)

// TestListsOfRevokedCertificatesTravel follows a list from the server's store to workloads and Envoys, and
// with it the word that servers below sign too, after which Envoys must not be given it any more.
func TestListsOfRevokedCertificatesTravel(t *testing.T) {
	w := world.New(t)
	a := w.Agent("one").Start()
	w.Entry(a.ID, "/shop")
	s := follow(t, a)
	s.until("/shop")
	list := listFor(t, w)
	change := func(how func(*identity.Bundle)) {
		t.Helper()
		_, _, err := w.Records.UpdateBundle(w.Context(), world.TrustDomain, func(b *identity.Bundle) error { how(b); return nil })
		if err != nil {
			t.Fatal(err)
		}
	}
	// both says whether the bundles have the list, as an Envoy has them and as plain ones.
	both := func() (validator, plain bool) {
		t.Helper()
		return bytes.Contains(secretOf(t, a, true), []byte("X509 CRL")), bytes.Contains(secretOf(t, a, false), []byte("X509 CRL"))
	}
	if validator, plain := both(); validator || plain {
		t.Fatal("there is a list before there is one")
	}
	change(func(b *identity.Bundle) { b.CRLs = [][]byte{list} })
	s.has(list)
	if validator, plain := both(); !validator || !plain {
		t.Errorf("the list is there for the validator: %v, plain: %v", validator, plain)
	}
	change(func(b *identity.Bundle) { b.Nested = true })
	eventually(t, "no list for Envoys any more", func() bool { validator, plain := both(); return !validator && !plain })
	s = follow(t, a)
	s.has(list)

	t.Run("an agent that starts while the server is away knows both", func(t *testing.T) {
		w.Stop()
		a.Stop()
		a.Start()
		follow(t, a).has(list)
		if validator, plain := both(); validator || plain {
			t.Errorf("the list is there for the validator: %v, plain: %v", validator, plain)
		}
	})
}

// has reads on until there is the list.
func (s *stream) has(list []byte) {
	s.t.Helper()
	for {
		resp, err := s.Recv()
		if err != nil {
			s.t.Fatalf("waiting for a list: %v", err)
		}
		if crls := resp.GetCrl(); len(crls) == 1 && bytes.Equal(crls[0], list) {
			return
		}
	}
}

// listFor makes a list of the server's authority. Nobody checks its signature on the way.
func listFor(t *testing.T, w *world.World) []byte {
	t.Helper()
	issuer, err := x509.ParseCertificate(w.Bundle()[0])
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	list, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{
		Number: big.NewInt(1), ThisUpdate: time.Now(), NextUpdate: time.Now().Add(time.Hour),
		RevokedCertificateEntries: []x509.RevocationListEntry{{SerialNumber: big.NewInt(7), RevocationTime: time.Now()}},
	}, issuer, key)
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// secretOf is what an agent gives an Envoy that asks for ROOTCA, as text: the file of its SPIFFE validator, or
// the lists of plain authorities.
func secretOf(t *testing.T, a *world.Agent, validator bool) []byte {
	t.Helper()
	ctx, _ := a.Workload()
	conn, err := grpc.NewClient("unix:"+a.Socket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	resp, err := secretv3.NewSecretDiscoveryServiceClient(conn).FetchSecrets(ctx, &discoveryv3.DiscoveryRequest{Node: node(validator), ResourceNames: []string{"ROOTCA"}})
	if err != nil {
		t.Fatal(err)
	}
	var secret tlsv3.Secret
	if err := resp.GetResources()[0].UnmarshalTo(&secret); err != nil {
		t.Fatal(err)
	}
	how := secret.GetValidationContext()
	if !validator {
		return how.GetCrl().GetInlineBytes()
	}
	var config tlsv3.SPIFFECertValidatorConfig
	if err := how.GetCustomValidatorConfig().GetTypedConfig().UnmarshalTo(&config); err != nil {
		t.Fatal(err)
	}
	return config.GetTrustDomains()[0].GetTrustBundle().GetInlineBytes()
}

// node is an Envoy that says its version: one that has the validator, or one from before.
func node(validator bool) *corev3.Node {
	minor := uint32(40)
	if !validator {
		minor = 17
	}
	return &corev3.Node{UserAgentVersionType: &corev3.Node_UserAgentBuildVersion{
		UserAgentBuildVersion: &corev3.BuildVersion{Version: &typev3.SemanticVersion{MajorNumber: 1, MinorNumber: minor}},
	}}
}
