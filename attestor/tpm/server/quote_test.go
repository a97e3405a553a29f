package server

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/tpm"
	"github.com/assay-id/assay/attestor/tpmchip"
)

// TestQuote has a key that signs whatever it is given, which no TPM would do, so that each check is alone.
func TestQuote(t *testing.T) {
	ak, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	j := &judge{pcrs: []int{0, 7}, trustDomain: "example.org"}
	nonce, own := make([]byte, tpm.NonceSize), attestor.KeyHash{1}
	digestOf := func(values ...[]byte) []byte {
		all := sha256.New()
		for _, v := range values {
			all.Write(v)
		}
		return all.Sum(nil)
	}
	quoteOf := func(pcrs tpm2.TPMLPCRSelection, digest []byte) tpm2.TPMUAttest {
		return tpm2.NewTPMUAttest(tpm2.TPMSTAttestQuote, &tpm2.TPMSQuoteInfo{PCRSelect: pcrs, PCRDigest: tpm2.TPM2BDigest{Buffer: digest}})
	}
	for name, c := range map[string]struct {
		says   string // empty: it is believed
		change func(a *tpm2.TPMSAttest, r *tpm.Response)
		raw    func([]byte) []byte // a last touch before it is signed
		late   func([]byte) []byte // and one after
	}{
		"it is good":                         {},
		"it was changed after it was signed": {says: "signature is wrong", late: func(b []byte) []byte { b[len(b)-1] ^= 1; return b }},
		"no TPM made it":                     {says: "no quote", raw: func(b []byte) []byte { b[0] ^= 1; return b }},
		"it certifies a key": {says: "no quote", change: func(a *tpm2.TPMSAttest, _ *tpm.Response) {
			a.Type, a.Attested = tpm2.TPMSTAttestCertify, tpm2.NewTPMUAttest(tpm2.TPMSTAttestCertify, &tpm2.TPMSCertifyInfo{})
		}},
		"it answers another nonce": {says: "another question", change: func(a *tpm2.TPMSAttest, _ *tpm.Response) {
			a.ExtraData.Buffer = tpm.QualifyingData(append([]byte{1}, nonce[1:]...), j.trustDomain, own)
		}},
		"it answers another trust domain": {says: "another question", change: func(a *tpm2.TPMSAttest, _ *tpm.Response) {
			a.ExtraData.Buffer = tpm.QualifyingData(nonce, "example.com", own)
		}},
		"it is for another key of an agent's": {says: "another question", change: func(a *tpm2.TPMSAttest, _ *tpm.Response) {
			a.ExtraData.Buffer = tpm.QualifyingData(nonce, j.trustDomain, attestor.KeyHash{2})
		}},
		"it is of other registers": {says: "not of the registers", change: func(a *tpm2.TPMSAttest, r *tpm.Response) {
			a.Attested = quoteOf(tpmchip.Selection([]int{1, 8}), digestOf(r.Values...))
		}},
		"it is of another bank": {says: "not of the registers", change: func(a *tpm2.TPMSAttest, r *tpm.Response) {
			pcrs := tpmchip.Selection(j.pcrs)
			pcrs.PCRSelections[0].Hash = tpm2.TPMAlgSHA1
			a.Attested = quoteOf(pcrs, digestOf(r.Values...))
		}},
		"a register more is told": {says: "not of the registers", change: func(a *tpm2.TPMSAttest, r *tpm.Response) {
			r.Values = append(r.Values, make([]byte, tpm.DigestSize))
			a.Attested = quoteOf(tpmchip.Selection(j.pcrs), digestOf(r.Values...))
		}},
		"its registers are of another size": {says: "SHA-256 bank", change: func(a *tpm2.TPMSAttest, r *tpm.Response) {
			r.Values = [][]byte{make([]byte, tpm.DigestSize-1), make([]byte, tpm.DigestSize+1)}
			a.Attested = quoteOf(tpmchip.Selection(j.pcrs), digestOf(r.Values...))
		}},
		"other registers are told": {says: "not those that were quoted", change: func(_ *tpm2.TPMSAttest, r *tpm.Response) { r.Values[1][0] ^= 1 }},
		"it is too large":          {says: "not of the registers", raw: func(b []byte) []byte { return append(b, make([]byte, tpmchip.MaxPublic)...) }},
	} {
		t.Run(name, func(t *testing.T) {
			r := tpm.Response{Values: [][]byte{make([]byte, tpm.DigestSize), make([]byte, tpm.DigestSize)}}
			a := tpm2.TPMSAttest{
				Magic: tpm2.TPMGeneratedValue, Type: tpm2.TPMSTAttestQuote,
				ExtraData: tpm2.TPM2BData{Buffer: tpm.QualifyingData(nonce, j.trustDomain, own)},
				Attested:  quoteOf(tpmchip.Selection(j.pcrs), digestOf(r.Values...)),
			}
			if c.change != nil {
				c.change(&a, &r)
			}
			r.Quote = tpm2.Marshal(a)
			if c.raw != nil {
				r.Quote = c.raw(r.Quote)
			}
			digest := sha256.Sum256(r.Quote)
			x, y, err := ecdsa.Sign(rand.Reader, ak, digest[:])
			if err != nil {
				t.Fatal(err)
			}
			r.Signature = tpm2.Marshal(tpm2.TPMTSignature{SigAlg: tpm2.TPMAlgECDSA, Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgECDSA, &tpm2.TPMSSignatureECC{
				Hash: tpm2.TPMAlgSHA256, SignatureR: tpm2.TPM2BECCParameter{Buffer: x.Bytes()}, SignatureS: tpm2.TPM2BECCParameter{Buffer: y.Bytes()},
			})})
			if c.late != nil {
				r.Quote = c.late(r.Quote)
			}
			err = j.checkQuote(r, nonce, ak.Public(), own)
			if (err == nil) != (c.says == "") || err != nil && !strings.Contains(err.Error(), c.says) {
				t.Errorf("error is %v, want %q", err, c.says)
			}
		})
	}
}

func TestConfigurationIsRefused(t *testing.T) {
	hash := strings.Repeat("0a", 32)
	for says, c := range map[string]tpm.ServerConfig{
		"":                                   {EKHashes: []string{strings.ToUpper(hash)}, PCRs: []int{0, 23}},
		"ek_hashes or ek_ca_path":            {},
		`ek_hashes: "` + hash[2:] + `"`:      {EKHashes: []string{hash, hash[2:]}},
		`ek_hashes: "` + hash[2:] + `0g" is`: {EKHashes: []string{hash[2:] + "0g"}},
		"pcrs: register 24":                  {EKHashes: []string{hash}, PCRs: []int{24}},
		"pcrs: register 0: registers":        {EKHashes: []string{hash}, PCRs: []int{1, 0}},
		"ek_ca_path":                         {EKCAPath: "/nowhere"},
	} {
		if _, err := Kind().Open(&c, attestor.Needs{}); (err == nil) != (says == "") || err != nil && !strings.HasPrefix(err.Error(), says) {
			t.Errorf("error is %v, want %q", err, says)
		}
	}
}
