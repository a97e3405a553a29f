// Command assay-pkcs11 loads a PKCS #11 module for assay-server, which starts it and speaks to it over its
// standard input and output; see server/ca/keys/pkcs11 for why it is a process of its own. It is the one
// program of Assay that is built with cgo.
package main

import (
	"fmt"
	"os"

	"github.com/assay-id/assay/server/ca/keys/pkcs11"
)

func main() {
	if len(os.Args) > 1 {
		fmt.Fprintln(os.Stderr, "assay-pkcs11 is started by assay-server, with key_manager \"pkcs11\" in its configuration.")
		os.Exit(2)
	}
	if err := pkcs11.Serve(os.Stdin, os.Stdout, openToken); err != nil {
		fmt.Fprintln(os.Stderr, "assay-pkcs11:", err)
		os.Exit(1)
	}
}
