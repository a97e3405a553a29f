// Package jointoken is node attestation by a secret that works once: an operator makes a token on
// the server, gives it to one agent, and the first agent that presents it becomes that node. It
// proves nothing about the machine but that somebody handed it the token.
//
// The token is part of the agent's SPIFFE ID (join_token/<token>), as in SPIRE, so it is a bearer
// secret only until it is used; afterwards it opens nothing.
package jointoken

import "errors"

// Type is the attestor's name in configuration, in evidence and in the agent's SPIFFE ID.
const Type = "join_token"

// MaxLength is how many bytes a token may have. With the longest trust domain the agent's SPIFFE ID
// stays far below the 2048 bytes that the SPIFFE-ID standard, section 2.3, allows.
const MaxLength = 255

// AgentConfig is the agent's configuration block. It is empty: the token comes from the agent's
// join_token or join_token_file, or from the command line.
type AgentConfig struct{}

// ServerConfig is the server's configuration block. It is empty: tokens are made with
// `assay-server token generate`.
type ServerConfig struct{}

// Check says what is wrong with a token as one path segment of a SPIFFE ID (SPIFFE-ID standard,
// section 2.2), or nil. Its errors do not repeat the token, which is a secret.
func Check(token string) error {
	switch {
	case token == "":
		return errors.New("join token is empty")
	case len(token) > MaxLength:
		return errors.New("join token is too long")
	case token == "." || token == "..":
		return errors.New("join token is a dot segment")
	}
	for i := range len(token) {
		if !allowed(token[i]) {
			return errors.New("join token has a character other than letters, digits, dot, dash and underscore")
		}
	}
	return nil
}

func allowed(c byte) bool {
	switch {
	case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		return true
	}
	return c == '.' || c == '-' || c == '_'
}
