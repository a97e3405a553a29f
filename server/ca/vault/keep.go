package vault

import (
	"context"
	"math/rand/v2"
	"net/http"
	"time"

	"github.com/sirupsen/logrus"
)

const (
	lookEvery = 10 * time.Minute // at the own token, which may be in a file that is replaced
	lookSoon  = time.Second      // and not more often than that
	lookAgain = 30 * time.Second // after a failure
)

// tokenLife is what Vault says of one, in seconds.
type tokenLife struct {
	Left      int64 `json:"ttl"` // 0: it does not end
	Created   int64 `json:"creation_ttl"`
	Period    int64 `json:"period"`
	Renewable bool  `json:"renewable"`
}

// Keep renews a token of the configuration as long as Vault lets it, until ctx ends: a periodic token, which is the
// kind that is given to servers, is of no use soon after nobody has. What logs in needs nothing of it.
func (c *Client) Keep(ctx context.Context, log logrus.FieldLogger) {
	if c.cfg.Token == nil {
		return
	}
	k := &keeper{c: c, log: log}
	for wait := time.Duration(0); ; wait = k.look(ctx) {
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}

// keeper remembers what it said, so that it says it once.
type keeper struct {
	c    *Client
	log  logrus.FieldLogger
	said string
}

// say logs what is not what it said last.
func (k *keeper) say(what string, log logrus.FieldLogger) {
	if k.said != what {
		log.Warn(what)
	}
	k.said = what
}

// look renews the token if a third of its life is gone, and returns when to look again.
func (k *keeper) look(ctx context.Context) time.Duration {
	var is tokenLife
	if err := k.c.Do(ctx, http.MethodGet, "auth/token/lookup-self", nil, &is); err != nil {
		if ctx.Err() == nil {
			k.say("Vault does not say how long the token of token_auth lives, so that it is not renewed", k.log.WithError(err))
		}
		return lookAgain
	}
	if is.Left <= 0 { // a root token
		k.said = ""
		return lookEvery
	}
	ends := func(seconds int64) logrus.FieldLogger {
		return k.log.WithField("expires_at", time.Now().Add(life(seconds)).UTC().Format(time.RFC3339))
	}
	switch whole := max(is.Created, is.Period); {
	case !is.Renewable:
		k.say("The token of token_auth cannot be renewed: give another before it ends, in the file of token_path while the server runs", ends(is.Left))
	case is.Left <= whole*2/3:
		var answer envelope
		token, _, err := k.c.login(ctx)
		if err == nil {
			err = k.c.ask(ctx, http.MethodPost, "auth/token/renew-self", token, map[string]any{}, &answer)
		}
		switch {
		case ctx.Err() != nil:
			return lookAgain
		case err != nil:
			k.say("Vault does not renew the token of token_auth", ends(is.Left).WithError(err))
			return min(lookAgain, soon(is.Left))
		case answer.Auth != nil && answer.Auth.Duration > is.Left:
			is.Left = answer.Auth.Duration
			ends(is.Left).Debug("Vault has renewed the token of token_auth")
			k.said = ""
		default: // it comes near its max TTL
			k.say("Vault lengthens the life of the token of token_auth no more: give another before it ends, in the file of token_path while the server runs", ends(is.Left))
		}
	default:
		k.said = ""
	}
	return soon(is.Left)
}

// soon is when to look again at what lives so many seconds: three times in them at least.
func soon(seconds int64) time.Duration {
	wait := min(max(life(seconds)/3, lookSoon), lookEvery)
	return wait - time.Duration(rand.Int64N(int64(wait)/10)) //nolint:gosec // servers that started together shall not ask together
}

func life(seconds int64) time.Duration { return time.Duration(min(seconds, 1<<30)) * time.Second }
