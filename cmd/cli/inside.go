package cli

import (
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"time"

	"github.com/spf13/cobra"
)

// Version is what the commands and the agent say they are. The build sets it with
// -ldflags "-X github.com/assay-id/assay/cmd/cli.Version=…"; else it is what Go knows of the module.
var Version = ""

// VersionText returns Version, or the module's version, or "devel".
func VersionText() string {
	if Version != "" {
		return Version
	}
	if b, ok := debug.ReadBuildInfo(); ok && b.Main.Version != "" && b.Main.Version != "(devel)" {
		return b.Main.Version
	}
	return "devel"
}

// VersionCommand prints what this program is.
func VersionCommand() *cobra.Command {
	var output Output
	c := &cobra.Command{
		Use: "version", Short: "Prints the version of this program", Args: NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return output.PrintValue(c, func(w io.Writer) error {
				_, err := fmt.Fprintf(w, "%s %s %s/%s\n", VersionText(), runtime.Version(), runtime.GOOS, runtime.GOARCH)
				return err
			}, map[string]string{"version": VersionText(), "go": runtime.Version(), "platform": runtime.GOOS + "/" + runtime.GOARCH})
		},
	}
	output.AddTo(c)
	return c
}

// PrintDebugCertificate shows certificate number i of a daemon's own SVID.
func PrintDebugCertificate(w io.Writer, i int, id, subject string, expires int64) {
	fmt.Fprintf(w, "    [%d] SPIFFE ID:  %s\n", i, id)
	fmt.Fprintf(w, "        Subject:    %s\n", subject)
	fmt.Fprintf(w, "        Expires At: %s\n", time.Unix(expires, 0).UTC().Format(time.RFC3339))
}

// CertificatesPEM returns certificates in DER as PEM, one after the other.
func CertificatesPEM(ders ...[]byte) []byte {
	var out []byte
	for _, der := range ders {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	return out
}

// KeyPEM returns a private key in PKCS #8 as PEM.
func KeyPEM(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

// WriteFile puts a whole new file in the place of an old one, for its owner only if it is secret. The
// content is never there with wider permissions, and never half.
func WriteFile(path string, content []byte, secret bool) error {
	mode := os.FileMode(0o644)
	if secret {
		mode = 0o600
	}
	temp, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, reason(err))
	}
	defer func() { _ = os.Remove(temp.Name()) }() // fails once it is renamed
	_, err = temp.Write(content)
	if err == nil {
		err = temp.Chmod(mode)
	}
	if closed := temp.Close(); err == nil {
		err = closed
	}
	if err == nil {
		err = os.Rename(temp.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", path, reason(err))
	}
	return nil
}

// reason returns a file error without the name of a file that the operator does not know.
func reason(err error) error {
	if path, ok := errors.AsType[*os.PathError](err); ok {
		return path.Err
	}
	return err
}
