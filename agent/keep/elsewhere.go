package keep

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"
)

// Elsewhere is a program or device that holds the agent's own key, and signs with it. It has a place for each key that
// is told apart by its name; a key that is made in a place takes that of the one before.
type Elsewhere interface {
	// Name tells one such program from another.
	Name() string
	// Generate makes a key in a place.
	Generate(ctx context.Context, place string) (crypto.Signer, error)
	// Key is the key of a place, whose public half is known. Nobody is asked whether it is there: if it is not,
	// its Sign returns an error that wraps ErrKeyGone.
	Key(place string, public crypto.PublicKey) (crypto.Signer, error)
	// Has returns nil if the key is in the place, an error that wraps ErrKeyGone if it is not, and
	// another if that cannot be said.
	Has(ctx context.Context, place string, public crypto.PublicKey) error
}

// ErrKeyGone says that the agent's own key is not where it was. Who has it must attest anew.
var ErrKeyGone = errors.New("the agent's key is gone from its key manager")

// places are SPIRE's agent's names for them: the one is in use while there is a new key in the other.
var places = [2]string{"agent-svid-A", "agent-svid-B"}

// askTime is how long a program may take to say whether a key is there, or to make one.
const askTime = 30 * time.Second

// elsewhere is an Elsewhere that knows which place is in use.
type elsewhere struct {
	Elsewhere

	mu    sync.Mutex // guards the rest
	inUse string     // the place of the key of the SVID in use; empty: there is none yet
}

// placed is where a key is, as it is kept.
type placed struct {
	Plugin string `json:"plugin"`
	Place  string `json:"place"`
}

// placedKey is a key that lives elsewhere.
type placedKey struct {
	crypto.Signer
	placed
}

// ElsewhereKeys opens the key store in dir whose agent's own key is elsewhere; what is sealed on disk is sealed as by
// DiskKeys, since a program that can but sign can keep nothing else.
func ElsewhereKeys(dir string, e Elsewhere) (*Keys, error) {
	k, err := DiskKeys(dir)
	if err != nil {
		return nil, errors.Join(err, (&Keys{elsewhere: &elsewhere{Elsewhere: e}}).Close())
	}
	k.elsewhere = &elsewhere{Elsewhere: e}
	return k, nil
}

// Close ends what the key store runs, if anything.
func (k *Keys) Close() error {
	if k.elsewhere == nil {
		return nil
	}
	if closer, ok := k.elsewhere.Elsewhere.(io.Closer); ok {
		return closer.Close()
	}
	return nil
}

// newKey makes a key in the place that is not in use.
func (e *elsewhere) newKey() (crypto.Signer, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	place := places[0]
	if e.inUse == place {
		place = places[1]
	}
	ctx, cancel := context.WithTimeout(context.Background(), askTime)
	defer cancel()
	key, err := e.Generate(ctx, place)
	if err != nil {
		return nil, err
	}
	return &placedKey{key, placed{e.Name(), place}}, nil
}

// use notes where the key of the SVID is that is in use.
func (e *elsewhere) use(place string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.inUse = place
}

// open returns the key that was kept with an SVID. A program that does not answer may have it all the same.
func (e *elsewhere) open(p placed, public crypto.PublicKey) (crypto.Signer, error) {
	if e == nil {
		return nil, fmt.Errorf("its key is in the plugin %q, and the key manager is another", p.Plugin)
	}
	if p.Plugin != e.Name() {
		return nil, fmt.Errorf("its key is in the plugin %q, and the key manager is the plugin %q", p.Plugin, e.Name())
	}
	if p.Place != places[0] && p.Place != places[1] {
		return nil, fmt.Errorf("there is no place %q for its key", p.Place)
	}
	key, err := e.Key(p.Place, public)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), askTime)
	defer cancel()
	if err := e.Has(ctx, p.Place, public); errors.Is(err, ErrKeyGone) {
		return nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.inUse == "" { // what is used by now may be newer than what is on disk
		e.inUse = p.Place
	}
	return &placedKey{key, p}, nil
}
