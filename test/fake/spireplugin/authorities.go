package spireplugin

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"time"

	keymanagerv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/keymanager/v1"
	upstreamauthorityv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/upstreamauthority/v1"
	"github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// keys keeps keys in memory, or in files of its directory.
type keys struct {
	keymanagerv1.UnimplementedKeyManagerServer
	*Plugin

	lock sync.Mutex // guards held
	held map[string]*heldKey
}

type heldKey struct {
	key         crypto.Signer
	kind        keymanagerv1.KeyType
	fingerprint string
}

func (h *heldKey) public(id string) *keymanagerv1.PublicKey {
	pkix, _ := x509.MarshalPKIXPublicKey(h.key.Public())
	return &keymanagerv1.PublicKey{Id: id, Type: h.kind, PkixData: pkix, Fingerprint: h.fingerprint}
}

func (k *keys) get(config *Config, id string) *heldKey {
	if config.Mode == "lost" {
		return nil
	}
	if h := k.held[id]; h != nil || config.Directory == "" {
		return h
	}
	text, err := os.ReadFile(filepath.Join(config.Directory, "key-"+id))
	if err != nil {
		return nil
	}
	block, _ := pem.Decode(text)
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		panic(err)
	}
	h := &heldKey{key: key.(crypto.Signer), kind: keymanagerv1.KeyType(keymanagerv1.KeyType_value[block.Type]), fingerprint: "f-" + id}
	k.held[id] = h
	return h
}

// GenerateKey implements the plugin.
func (k *keys) GenerateKey(ctx context.Context, in *keymanagerv1.GenerateKeyRequest) (*keymanagerv1.GenerateKeyResponse, error) {
	config, err := k.mode(ctx)
	if err != nil {
		return nil, err
	}
	kind := in.GetKeyType()
	if config.Mode == "other-kind" {
		kind = keymanagerv1.KeyType_EC_P384
	}
	var key crypto.Signer
	switch kind {
	case keymanagerv1.KeyType_EC_P256:
		key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case keymanagerv1.KeyType_EC_P384:
		key, err = ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case keymanagerv1.KeyType_RSA_2048:
		key, err = rsa.GenerateKey(rand.Reader, 2048)
	default:
		err = status.Error(codes.InvalidArgument, "unknown key type")
	}
	if err != nil {
		return nil, err
	}
	k.lock.Lock()
	defer k.lock.Unlock()
	h := &heldKey{key: key, kind: in.GetKeyType(), fingerprint: rand.Text()}
	k.held[in.GetKeyId()] = h
	if config.Directory != "" {
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return nil, err
		}
		text := pem.EncodeToMemory(&pem.Block{Type: h.kind.String(), Bytes: der})
		if err := os.WriteFile(filepath.Join(config.Directory, "key-"+in.GetKeyId()), text, 0o600); err != nil {
			return nil, err
		}
	}
	if config.Mode == "no-key" {
		return &keymanagerv1.GenerateKeyResponse{PublicKey: &keymanagerv1.PublicKey{Id: in.GetKeyId(), PkixData: []byte("none")}}, nil
	}
	return &keymanagerv1.GenerateKeyResponse{PublicKey: h.public(in.GetKeyId())}, nil
}

// GetPublicKey implements the plugin.
func (k *keys) GetPublicKey(ctx context.Context, in *keymanagerv1.GetPublicKeyRequest) (*keymanagerv1.GetPublicKeyResponse, error) {
	config, err := k.mode(ctx)
	if err != nil {
		return nil, err
	}
	k.lock.Lock()
	defer k.lock.Unlock()
	h := k.get(config, in.GetKeyId())
	if h == nil {
		return nil, status.Error(codes.NotFound, "no such key")
	}
	return &keymanagerv1.GetPublicKeyResponse{PublicKey: h.public(in.GetKeyId())}, nil
}

// GetPublicKeys implements the plugin.
func (k *keys) GetPublicKeys(ctx context.Context, _ *keymanagerv1.GetPublicKeysRequest) (*keymanagerv1.GetPublicKeysResponse, error) {
	if _, err := k.mode(ctx); err != nil {
		return nil, err
	}
	k.lock.Lock()
	defer k.lock.Unlock()
	out := &keymanagerv1.GetPublicKeysResponse{}
	for id, h := range k.held {
		out.PublicKeys = append(out.PublicKeys, h.public(id))
	}
	return out, nil
}

// SignData implements the plugin.
func (k *keys) SignData(ctx context.Context, in *keymanagerv1.SignDataRequest) (*keymanagerv1.SignDataResponse, error) {
	config, err := k.mode(ctx)
	if err != nil {
		return nil, err
	}
	k.lock.Lock()
	defer k.lock.Unlock()
	h := k.get(config, in.GetKeyId())
	if h == nil {
		return nil, status.Error(codes.NotFound, "no such key")
	}
	digest := in.GetData()
	if config.Mode == "sign-other" {
		digest = make([]byte, len(digest))
	}
	signature, err := h.key.Sign(rand.Reader, digest, crypto.Hash(in.GetHashAlgorithm()))
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	fingerprint := h.fingerprint
	if config.Mode == "other-fingerprint" {
		fingerprint = "another"
	}
	return &keymanagerv1.SignDataResponse{Signature: signature, KeyFingerprint: fingerprint}, nil
}

// authority signs with a root of its own, which is in its directory.
type authority struct {
	upstreamauthorityv1.UnimplementedUpstreamAuthorityServer
	*Plugin
}

func (a *authority) root(config *Config) (*x509.Certificate, crypto.Signer, error) {
	path := filepath.Join(config.Directory, "root")
	if text, err := os.ReadFile(path); err == nil {
		block, rest := pem.Decode(text)
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, nil, err
		}
		block, _ = pem.Decode(rest)
		key, err := x509.ParseECPrivateKey(block.Bytes)
		return cert, key, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root of a plugin"}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(30 * 24 * time.Hour),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, BasicConstraintsValid: true, IsCA: true,
	}, &x509.Certificate{Subject: pkix.Name{CommonName: "root of a plugin"}}, key.Public(), key)
	if err != nil {
		return nil, nil, err
	}
	secret, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return nil, nil, err
	}
	text := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: secret})...)
	if err := os.WriteFile(path, text, 0o600); err != nil {
		return nil, nil, err
	}
	cert, err := x509.ParseCertificate(der)
	return cert, key, err
}

// MintX509CAAndSubscribe implements the plugin.
func (a *authority) MintX509CAAndSubscribe(in *upstreamauthorityv1.MintX509CARequest, stream upstreamauthorityv1.UpstreamAuthority_MintX509CAAndSubscribeServer) error {
	config, err := a.mode(stream.Context())
	if err != nil {
		return err
	}
	root, key, err := a.root(config)
	if err != nil {
		return status.Error(codes.Internal, err.Error())
	}
	csr, err := x509.ParseCertificateRequest(in.GetCsr())
	if err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	if err := csr.CheckSignature(); err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	signed := csr.PublicKey
	uris := csr.URIs
	switch config.Mode {
	case "other-key":
		other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return err
		}
		signed = other.Public()
	case "other-domain":
		uris = []*url.URL{{Scheme: "spiffe", Host: "elsewhere.test"}}
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), RawSubject: csr.RawSubject, URIs: uris,
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Duration(max(in.GetPreferredTtl(), 3600)) * time.Second),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, BasicConstraintsValid: true, IsCA: true,
	}
	switch config.Mode {
	case "no-ca":
		template.IsCA, template.SubjectKeyId = false, []byte("key")
	case "expired":
		template.NotAfter = time.Now().Add(-time.Second)
	case "constrained":
		template.PermittedURIDomains, template.PermittedDNSDomainsCritical = []string{"elsewhere.test"}, true
	}
	der, err := x509.CreateCertificate(rand.Reader, template, root, signed, key)
	if err != nil {
		return status.Error(codes.Internal, err.Error())
	}
	answer := &upstreamauthorityv1.MintX509CAResponse{
		X509CaChain: []*types.X509Certificate{{Asn1: der}}, UpstreamX509Roots: []*types.X509Certificate{{Asn1: root.Raw}},
	}
	switch config.Mode {
	case "no-chain":
		answer.X509CaChain = nil
	case "no-roots":
		answer.UpstreamX509Roots = nil
	case "other-root":
		again := *config
		again.Directory += "/other"
		_ = os.MkdirAll(again.Directory, 0o700)
		other, _, err := a.root(&again)
		if err != nil {
			return err
		}
		answer.UpstreamX509Roots = []*types.X509Certificate{{Asn1: other.Raw}}
	case "huge":
		answer.X509CaChain[0].Asn1 = make([]byte, 4<<20)
	case "garbage":
		answer.X509CaChain[0].Asn1 = []byte("garbage")
	case "many":
		for range 300 {
			answer.UpstreamX509Roots = append(answer.UpstreamX509Roots, answer.UpstreamX509Roots[0])
		}
	case "silent":
		return nil
	}
	if err := stream.Send(answer); err != nil || config.Mode != "subscribe" {
		return err
	}
	// Another root is known from now on.
	again := *config
	again.Directory += "/other"
	_ = os.MkdirAll(again.Directory, 0o700)
	other, _, err := a.root(&again)
	if err != nil {
		return err
	}
	answer = &upstreamauthorityv1.MintX509CAResponse{UpstreamX509Roots: []*types.X509Certificate{{Asn1: other.Raw}}}
	if err := stream.Send(answer); err != nil {
		return err
	}
	<-stream.Context().Done()
	return nil
}

// SubscribeToLocalBundle implements the plugin.
func (a *authority) SubscribeToLocalBundle(_ *upstreamauthorityv1.SubscribeToLocalBundleRequest, stream upstreamauthorityv1.UpstreamAuthority_SubscribeToLocalBundleServer) error {
	config, err := a.mode(stream.Context())
	if err != nil {
		return err
	}
	if config.Mode != "bundle" {
		return status.Error(codes.Unimplemented, "not implemented")
	}
	root, _, err := a.root(config)
	if err != nil {
		return err
	}
	err = stream.Send(&upstreamauthorityv1.SubscribeToLocalBundleResponse{UpstreamX509Roots: []*types.X509Certificate{{Asn1: root.Raw}}})
	if err != nil {
		return err
	}
	<-stream.Context().Done()
	return nil
}

// PublishJWTKeyAndSubscribe implements the plugin.
func (a *authority) PublishJWTKeyAndSubscribe(in *upstreamauthorityv1.PublishJWTKeyRequest, stream upstreamauthorityv1.UpstreamAuthority_PublishJWTKeyAndSubscribeServer) error {
	config, err := a.mode(stream.Context())
	if err != nil {
		return err
	}
	if config.Mode != "subscribe" {
		return status.Error(codes.Unimplemented, "not implemented")
	}
	if err := stream.Send(&upstreamauthorityv1.PublishJWTKeyResponse{UpstreamJwtKeys: []*types.JWTKey{in.GetJwtKey()}}); err != nil {
		return err
	}
	<-stream.Context().Done()
	return nil
}
