package main

import (
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/assay-id/assay/attestor/tpmchip"
	"github.com/assay-id/assay/cmd/cli"
)

// endorsementKey is what "tpm ek" says.
type endorsementKey struct {
	Hash        string       `json:"hash"`
	Kind        string       `json:"kind"`
	Certificate *certificate `json:"certificate"`
}

type certificate struct {
	Issuer   string `json:"issuer"`
	NotAfter string `json:"not_after"`
}

func tpmEK() *cobra.Command {
	var path, kind, passwordFile string
	var output cli.Output
	c := &cobra.Command{
		Use: "ek", Short: "Prints the hash of the machine's TPM, for the server's ek_hashes", Args: cli.NoArgs,
		Long: `Asks the TPM for its endorsement key and prints the key's hash, as it belongs into ek_hashes of
node_attestor "tpm" in the server's file, and who certified the key, if anybody did. Nothing is changed.`,
		Example: "  assay-agent tpm ek\n  assay-agent tpm ek -endorsementKey ecc -output json",
	}
	c.RunE = func(c *cobra.Command, _ []string) error {
		kinds := map[string]tpmchip.EndorsementKey{"rsa": tpmchip.RSAEK, "ecc": tpmchip.ECCEK}
		ek, ok := kinds[kind]
		if !ok {
			return fmt.Errorf("-endorsementKey: %q is neither rsa nor ecc", kind)
		}
		if path == "" {
			var err error
			if path, err = tpmchip.Find("/dev"); err != nil {
				return fmt.Errorf("%w; name one with -tpmPath", err)
			}
		}
		password := ""
		if passwordFile != "" {
			text, err := os.ReadFile(passwordFile)
			if err != nil {
				return fmt.Errorf("read -passwordFile: %w", err)
			}
			password = strings.TrimRight(string(text), "\r\n")
		}
		key, der, err := tpmchip.EK(c.Context(), path, password, ek)
		if err != nil {
			return err
		}
		said, err := describeEK(key, der)
		if err != nil {
			return err
		}
		return output.PrintValue(c, func(w io.Writer) error {
			_, err := fmt.Fprintf(w, "%s\n", said.Hash)
			// The hash alone goes to standard output, so that it can be piped.
			fmt.Fprintln(c.ErrOrStderr(), said.words())
			return err
		}, said)
	}
	c.Flags().StringVar(&path, "tpmPath", "", "The TPM: a device, or the Unix socket of a software TPM; by default the one in /dev")
	c.Flags().StringVar(&kind, "endorsementKey", "rsa", "Which endorsement key: rsa or ecc")
	c.Flags().StringVar(&passwordFile, "passwordFile", "", "File with the password of the endorsement hierarchy, if it has one")
	output.AddTo(c)
	return c
}

func describeEK(key any, der []byte) (*endorsementKey, error) {
	hash, err := tpmchip.KeyHash(key)
	if err != nil {
		return nil, fmt.Errorf("read endorsement key: %w", err)
	}
	said := &endorsementKey{Hash: hash}
	switch key := key.(type) {
	case *rsa.PublicKey:
		said.Kind = fmt.Sprintf("RSA %d", key.N.BitLen())
	case *ecdsa.PublicKey:
		said.Kind = "ECC " + key.Curve.Params().Name
	}
	var outer asn1.RawValue
	if rest, err := asn1.Unmarshal(der, &outer); err == nil {
		der = der[:len(der)-len(rest)] // the store of a TPM is larger than what is in it
	}
	if cert, err := x509.ParseCertificate(der); err == nil {
		said.Certificate = &certificate{Issuer: cert.Issuer.String(), NotAfter: cert.NotAfter.UTC().Format("2006-01-02")}
	}
	return said, nil
}

// words says for people what is known beside the hash.
func (e *endorsementKey) words() string {
	if e.Certificate == nil {
		return e.Kind + ", without a certificate in the TPM: put the hash into the server's ek_hashes"
	}
	return fmt.Sprintf("%s, certified until %s by %s: accepted by its hash in ek_hashes, or by this authority in ek_ca_path", e.Kind, e.Certificate.NotAfter, e.Certificate.Issuer)
}
