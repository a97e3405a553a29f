package spireplugin

import (
	"context"

	agentkeymanagerv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/keymanager/v1"
	keymanagerv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/keymanager/v1"
)

// agentKeys is keys for an agent: the same in messages of another name.
type agentKeys struct {
	agentkeymanagerv1.UnimplementedKeyManagerServer
	of *keys
}

func agentKey(k *keymanagerv1.PublicKey) *agentkeymanagerv1.PublicKey {
	return &agentkeymanagerv1.PublicKey{Id: k.GetId(), Type: agentkeymanagerv1.KeyType(k.GetType()), PkixData: k.GetPkixData(), Fingerprint: k.GetFingerprint()}
}

// GenerateKey implements the plugin.
func (k *agentKeys) GenerateKey(ctx context.Context, in *agentkeymanagerv1.GenerateKeyRequest) (*agentkeymanagerv1.GenerateKeyResponse, error) {
	out, err := k.of.GenerateKey(ctx, &keymanagerv1.GenerateKeyRequest{KeyId: in.GetKeyId(), KeyType: keymanagerv1.KeyType(in.GetKeyType())})
	return &agentkeymanagerv1.GenerateKeyResponse{PublicKey: agentKey(out.GetPublicKey())}, err
}

// GetPublicKey implements the plugin.
func (k *agentKeys) GetPublicKey(ctx context.Context, in *agentkeymanagerv1.GetPublicKeyRequest) (*agentkeymanagerv1.GetPublicKeyResponse, error) {
	out, err := k.of.GetPublicKey(ctx, &keymanagerv1.GetPublicKeyRequest{KeyId: in.GetKeyId()})
	return &agentkeymanagerv1.GetPublicKeyResponse{PublicKey: agentKey(out.GetPublicKey())}, err
}

// GetPublicKeys implements the plugin.
func (k *agentKeys) GetPublicKeys(ctx context.Context, _ *agentkeymanagerv1.GetPublicKeysRequest) (*agentkeymanagerv1.GetPublicKeysResponse, error) {
	all, err := k.of.GetPublicKeys(ctx, &keymanagerv1.GetPublicKeysRequest{})
	out := &agentkeymanagerv1.GetPublicKeysResponse{}
	for _, one := range all.GetPublicKeys() {
		out.PublicKeys = append(out.PublicKeys, agentKey(one))
	}
	return out, err
}

// SignData implements the plugin.
func (k *agentKeys) SignData(ctx context.Context, in *agentkeymanagerv1.SignDataRequest) (*agentkeymanagerv1.SignDataResponse, error) {
	out, err := k.of.SignData(ctx, &keymanagerv1.SignDataRequest{
		KeyId: in.GetKeyId(), Data: in.GetData(), SignerOpts: &keymanagerv1.SignDataRequest_HashAlgorithm{HashAlgorithm: keymanagerv1.HashAlgorithm(in.GetHashAlgorithm())},
	})
	return &agentkeymanagerv1.SignDataResponse{Signature: out.GetSignature(), KeyFingerprint: out.GetKeyFingerprint()}, err
}
