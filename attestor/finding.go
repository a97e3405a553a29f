package attestor

import "time"

// Finding is what one attestor said about one process.
type Finding struct {
	// Attestor is the attestor's type as configured, for example "docker".
	Attestor string
	// Selectors are what it proved; empty when it had nothing to say or failed.
	Selectors Set
	// Err says why selectors that may exist could not be found.
	Err error
	// Took is how long it thought.
	Took time.Duration
}
