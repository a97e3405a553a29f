package main

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"sync"

	keymanagerv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/keymanager/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// keys is a key manager of an agent that keeps keys for as long as it runs, as the SDK's template has it.
type keys struct {
	keymanagerv1.UnimplementedKeyManagerServer

	mu   sync.RWMutex
	keys map[string]*ecdsa.PrivateKey
}

func describe(id string, key *ecdsa.PrivateKey) (*keymanagerv1.PublicKey, error) {
	pkix, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, status.Errorf(codes.Internal, "marshal: %v", err)
	}
	return &keymanagerv1.PublicKey{Id: id, Type: keymanagerv1.KeyType_EC_P256, PkixData: pkix, Fingerprint: fmt.Sprintf("%x", sha256.Sum256(pkix))}, nil
}

func (k *keys) GenerateKey(_ context.Context, req *keymanagerv1.GenerateKeyRequest) (*keymanagerv1.GenerateKeyResponse, error) {
	if req.KeyType != keymanagerv1.KeyType_EC_P256 {
		return nil, status.Errorf(codes.InvalidArgument, "no keys of type %s here", req.KeyType)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, status.Errorf(codes.Internal, "generate: %v", err)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.keys[req.KeyId] = key
	public, err := describe(req.KeyId, key)
	return &keymanagerv1.GenerateKeyResponse{PublicKey: public}, err
}

func (k *keys) GetPublicKey(_ context.Context, req *keymanagerv1.GetPublicKeyRequest) (*keymanagerv1.GetPublicKeyResponse, error) {
	k.mu.RLock()
	defer k.mu.RUnlock()
	key := k.keys[req.KeyId]
	if key == nil {
		return nil, status.Errorf(codes.NotFound, "no key %q", req.KeyId)
	}
	public, err := describe(req.KeyId, key)
	return &keymanagerv1.GetPublicKeyResponse{PublicKey: public}, err
}

func (k *keys) SignData(_ context.Context, req *keymanagerv1.SignDataRequest) (*keymanagerv1.SignDataResponse, error) {
	k.mu.RLock()
	defer k.mu.RUnlock()
	key := k.keys[req.KeyId]
	if key == nil {
		return nil, status.Errorf(codes.NotFound, "no key %q", req.KeyId)
	}
	signature, err := key.Sign(rand.Reader, req.Data, crypto.Hash(req.GetHashAlgorithm()))
	if err != nil {
		return nil, status.Errorf(codes.Internal, "sign: %v", err)
	}
	public, err := describe(req.KeyId, key)
	return &keymanagerv1.SignDataResponse{Signature: signature, KeyFingerprint: public.GetFingerprint()}, err
}
