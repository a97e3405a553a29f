//go:build cgo

package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"strings"
	"sync"

	"github.com/miekg/pkcs11"

	"github.com/assay-id/assay/server/ca/keys"
	wire "github.com/assay-id/assay/server/ca/keys/pkcs11"
)

// sessions is how many questions the module works on at a time.
const sessions = 4

// token is one of a module's, logged in to.
type token struct {
	module *pkcs11.Ctx
	prefix string
	free   chan pkcs11.SessionHandle
	// changing is held for writing while a key is made or deleted, and for reading by all else: the module has
	// no notion of a name that is taken, and some (SoftHSM) fail when the token changes below them. Keys
	// change a few times a day.
	changing sync.RWMutex
}

// openToken loads the module and logs in.
func openToken(q wire.Question) (wire.Token, error) {
	module := pkcs11.New(q.Module)
	if module == nil {
		return nil, fmt.Errorf("load the PKCS #11 module %s: it is not there, or no such module", q.Module)
	}
	if err := module.Initialize(); err != nil {
		return nil, fmt.Errorf("initialize the PKCS #11 module %s: %w", q.Module, err)
	}
	slot, err := slotOf(module, q.Token)
	if err != nil {
		return nil, err
	}
	t := &token{module: module, prefix: q.Prefix, free: make(chan pkcs11.SessionHandle, sessions)}
	for n := range sessions {
		s, err := module.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
		if err != nil {
			return nil, fmt.Errorf("open a session with the token %q: %w", q.Token, err)
		}
		if n == 0 { // a login is for all sessions
			if err := module.Login(s, pkcs11.CKU_USER, q.PIN); err != nil {
				return nil, fmt.Errorf("log in to the token %q: %w", q.Token, err)
			}
		}
		t.free <- s
	}
	return t, nil
}

func slotOf(module *pkcs11.Ctx, label string) (uint, error) {
	slots, err := module.GetSlotList(true)
	if err != nil {
		return 0, fmt.Errorf("list tokens: %w", err)
	}
	var there []string
	for _, slot := range slots {
		info, err := module.GetTokenInfo(slot)
		if err != nil {
			continue
		}
		name := strings.TrimRight(info.Label, " \x00")
		if name == label {
			return slot, nil
		}
		there = append(there, fmt.Sprintf("%q", name))
	}
	return 0, fmt.Errorf("there is no token %q; there are %s", label, strings.Join(there, ", "))
}

// with lends a session to do.
func (t *token) with(do func(s pkcs11.SessionHandle) error) error {
	s := <-t.free
	defer func() { t.free <- s }()
	return do(s)
}

// find returns the object of the class with the name.
func (t *token) find(s pkcs11.SessionHandle, class uint, name string) (pkcs11.ObjectHandle, error) {
	found, err := t.search(s, 2, pkcs11.NewAttribute(pkcs11.CKA_CLASS, class), pkcs11.NewAttribute(pkcs11.CKA_LABEL, t.prefix+name))
	switch {
	case err != nil:
		return 0, err
	case len(found) == 0:
		return 0, keys.ErrNotFound
	case len(found) > 1:
		return 0, fmt.Errorf("there are several objects %q in the token", t.prefix+name)
	}
	return found[0], nil
}

func (t *token) search(s pkcs11.SessionHandle, most int, template ...*pkcs11.Attribute) ([]pkcs11.ObjectHandle, error) {
	if err := t.module.FindObjectsInit(s, template); err != nil {
		return nil, fmt.Errorf("look for objects: %w", err)
	}
	found, _, err := t.module.FindObjects(s, most)
	if err = errors.Join(err, t.module.FindObjectsFinal(s)); err != nil {
		return nil, fmt.Errorf("look for objects: %w", err)
	}
	return found, nil
}

var curves = map[keys.Kind]asn1.ObjectIdentifier{
	keys.EC256: {1, 2, 840, 10045, 3, 1, 7},
	keys.EC384: {1, 3, 132, 0, 34},
}

// Generate implements wire.Token.
func (t *token) Generate(name string, kind keys.Kind) (public []byte, err error) {
	t.changing.Lock()
	defer t.changing.Unlock()
	err = t.with(func(s pkcs11.SessionHandle) error {
		if _, err := t.find(s, pkcs11.CKO_PRIVATE_KEY, name); !errors.Is(err, keys.ErrNotFound) {
			if err == nil {
				err = keys.ErrExists
			}
			return err
		}
		mechanism, more, err := recipe(kind)
		if err != nil {
			return err
		}
		label := pkcs11.NewAttribute(pkcs11.CKA_LABEL, t.prefix+name)
		id := pkcs11.NewAttribute(pkcs11.CKA_ID, t.prefix+name)
		half := append(more, label, id, pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_VERIFY, true))
		secret := []*pkcs11.Attribute{
			label, id, pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
			pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true), pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, false), pkcs11.NewAttribute(pkcs11.CKA_SIGN, true),
		}
		if _, _, err := t.module.GenerateKeyPair(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(mechanism, nil)}, half, secret); err != nil {
			return fmt.Errorf("generate a key in the token: %w", err)
		}
		public, err = t.public(s, name)
		return err
	})
	return public, err
}

// recipe returns how a key of the kind is made.
func recipe(kind keys.Kind) (mechanism uint, attributes []*pkcs11.Attribute, err error) {
	if oid, ok := curves[kind]; ok {
		params, err := asn1.Marshal(oid)
		return pkcs11.CKM_EC_KEY_PAIR_GEN, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, params)}, err
	}
	bits := map[keys.Kind]int{keys.RSA2048: 2048, keys.RSA4096: 4096}[kind]
	if bits == 0 {
		return 0, nil, fmt.Errorf("keys of kind %q are not made here", kind)
	}
	return pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_MODULUS_BITS, bits), pkcs11.NewAttribute(pkcs11.CKA_PUBLIC_EXPONENT, []byte{1, 0, 1}),
	}, nil
}

// Public implements wire.Token.
func (t *token) Public(name string) (public []byte, err error) {
	t.changing.RLock()
	defer t.changing.RUnlock()
	err = t.with(func(s pkcs11.SessionHandle) error {
		// A public half without its private one is no key.
		if _, err := t.find(s, pkcs11.CKO_PRIVATE_KEY, name); err != nil {
			return err
		}
		public, err = t.public(s, name)
		return err
	})
	return public, err
}

func (t *token) public(s pkcs11.SessionHandle, name string) ([]byte, error) {
	object, err := t.find(s, pkcs11.CKO_PUBLIC_KEY, name)
	if err != nil {
		return nil, err
	}
	kind, err := t.module.GetAttributeValue(s, object, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, nil)})
	if err != nil {
		return nil, fmt.Errorf("read public key: %w", err)
	}
	rsaType := pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_RSA).Value
	if string(kind[0].Value) == string(rsaType) {
		got, err := t.module.GetAttributeValue(s, object, []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_MODULUS, nil), pkcs11.NewAttribute(pkcs11.CKA_PUBLIC_EXPONENT, nil),
		})
		if err != nil {
			return nil, fmt.Errorf("read public key: %w", err)
		}
		e := new(big.Int).SetBytes(got[1].Value)
		if !e.IsInt64() || e.Int64() > 1<<31-1 {
			return nil, errors.New("read public key: its exponent is out of range")
		}
		return x509.MarshalPKIXPublicKey(&rsa.PublicKey{N: new(big.Int).SetBytes(got[0].Value), E: int(e.Int64())})
	}
	got, err := t.module.GetAttributeValue(s, object, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, nil), pkcs11.NewAttribute(pkcs11.CKA_EC_POINT, nil),
	})
	if err != nil {
		return nil, fmt.Errorf("read public key: %w", err)
	}
	return ecPublic(got[0].Value, got[1].Value)
}

// ecPublic reads the parameters and the point of a key (PKCS #11 v2.40, 2.3.3): an OID, and a point in an
// OCTET STRING, which some modules leave out.
func ecPublic(params, point []byte) ([]byte, error) {
	var oid asn1.ObjectIdentifier
	if rest, err := asn1.Unmarshal(params, &oid); err != nil || len(rest) > 0 {
		return nil, errors.New("read public key: its curve is not named")
	}
	var curve elliptic.Curve
	switch {
	case oid.Equal(curves[keys.EC256]):
		curve = elliptic.P256()
	case oid.Equal(curves[keys.EC384]):
		curve = elliptic.P384()
	default:
		return nil, fmt.Errorf("read public key: curve %s is not used here", oid)
	}
	var inner []byte
	if rest, err := asn1.Unmarshal(point, &inner); err == nil && len(rest) == 0 {
		point = inner
	}
	key, err := ecdsa.ParseUncompressedPublicKey(curve, point)
	if err != nil {
		return nil, fmt.Errorf("read public key: %w", err)
	}
	return x509.MarshalPKIXPublicKey(key)
}

// digestInfo are what comes before a digest in a PKCS #1 v1.5 signature (RFC 8017 9.2).
var digestInfo = map[crypto.Hash][]byte{
	crypto.SHA256: {0x30, 0x31, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01, 0x05, 0x00, 0x04, 0x20},
	crypto.SHA384: {0x30, 0x41, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x02, 0x05, 0x00, 0x04, 0x30},
}

// Sign implements wire.Token.
func (t *token) Sign(name string, digest []byte, hash crypto.Hash) (signature []byte, err error) {
	t.changing.RLock()
	defer t.changing.RUnlock()
	err = t.with(func(s pkcs11.SessionHandle) error {
		object, err := t.find(s, pkcs11.CKO_PRIVATE_KEY, name)
		if err != nil {
			return err
		}
		kind, err := t.module.GetAttributeValue(s, object, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, nil)})
		if err != nil {
			return fmt.Errorf("look at the key: %w", err)
		}
		isRSA := string(kind[0].Value) == string(pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_RSA).Value)
		mechanism, input := uint(pkcs11.CKM_ECDSA), digest
		if isRSA {
			mechanism, input = pkcs11.CKM_RSA_PKCS, append(append([]byte{}, digestInfo[hash]...), digest...)
		}
		if err := t.module.SignInit(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(mechanism, nil)}, object); err != nil {
			return fmt.Errorf("sign: %w", err)
		}
		raw, err := t.module.Sign(s, input)
		if err != nil {
			return fmt.Errorf("sign: %w", err)
		}
		if isRSA {
			signature = raw
			return nil
		}
		if len(raw) == 0 || len(raw)%2 != 0 {
			return fmt.Errorf("sign: a signature of %d bytes", len(raw))
		}
		half := len(raw) / 2
		signature, err = asn1.Marshal(struct{ R, S *big.Int }{new(big.Int).SetBytes(raw[:half]), new(big.Int).SetBytes(raw[half:])})
		return err
	})
	return signature, err
}

// Delete implements wire.Token.
func (t *token) Delete(name string) error {
	t.changing.Lock()
	defer t.changing.Unlock()
	return t.with(func(s pkcs11.SessionHandle) error {
		gone := 0
		for _, class := range []uint{pkcs11.CKO_PRIVATE_KEY, pkcs11.CKO_PUBLIC_KEY} {
			object, err := t.find(s, class, name)
			if errors.Is(err, keys.ErrNotFound) {
				gone++
				continue
			}
			if err == nil {
				err = t.module.DestroyObject(s, object)
			}
			if err != nil {
				return fmt.Errorf("delete from the token: %w", err)
			}
		}
		if gone == 2 {
			return keys.ErrNotFound
		}
		return nil
	})
}

// maxKeys is how many keys of a token are listed.
const maxKeys = 10_000

// List implements wire.Token.
func (t *token) List() (names []string, err error) {
	t.changing.RLock()
	defer t.changing.RUnlock()
	err = t.with(func(s pkcs11.SessionHandle) error {
		found, err := t.search(s, maxKeys, pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY))
		if err != nil {
			return err
		}
		for _, object := range found {
			got, err := t.module.GetAttributeValue(s, object, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_LABEL, nil)})
			if err != nil {
				continue // deleted meanwhile, or somebody else's
			}
			if name, ours := strings.CutPrefix(string(got[0].Value), t.prefix); ours {
				names = append(names, name)
			}
		}
		return nil
	})
	return names, err
}
