//go:build !cgo

package main

import (
	"errors"

	"github.com/assay-id/assay/server/ca/keys/pkcs11"
)

// openToken of a program that cannot load a C library.
func openToken(pkcs11.Question) (pkcs11.Token, error) {
	return nil, errors.New("this assay-pkcs11 was built without cgo and can load no PKCS #11 module: build it with \"make pkcs11\"")
}
