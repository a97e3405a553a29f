package join_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"testing"
	"time"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/test/fake/fakeserver"
)

// deniedAs returns what the server answers agents that it has banned, or else does not know.
func deniedAs(t *testing.T, server *fakeserver.Server) error {
	t.Helper()
	reason := types.PermissionDeniedDetails_AGENT_NOT_ATTESTED
	if server.Banned() {
		reason = types.PermissionDeniedDetails_AGENT_BANNED
	}
	st, err := status.New(codes.PermissionDenied, "authorization denied").WithDetails(&types.PermissionDeniedDetails{Reason: reason})
	if err != nil {
		t.Fatal(err)
	}
	return st.Err()
}

// leaf returns a certificate, as PEM, that is no CA's.
func leaf(t *testing.T) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}
