package files

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// jwtBundles brings the files with keys up to date; nil: there is no identity, and nothing to do, for
// keys that verify others are no secret.
func (k *Keeper) jwtBundles(resp *workload.JWTBundlesResponse) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if resp == nil {
		return nil
	}
	k.poke() // a token's key may be one that is not to be used any more
	if !k.writesJWTBundles() {
		return nil // and nobody has to know which trust domain is the own one
	}
	list, err := k.jwtBundleFiles(resp.GetBundles())
	if err != nil {
		return fmt.Errorf("read answer of the API: %w", err)
	}
	changed, err := k.put(list)
	k.wrote(groupJWTBundles, err)
	if err != nil {
		return err
	}
	if changed {
		k.log.Info("keys that verify JWT-SVIDs written")
	}
	k.tell.renewed(changed, k.complete())
	return nil
}

// jwtBundleFiles are both files with keys. The own trust domain is the one that the X509-SVID is of; until
// there is one, a single bundle is it.
func (k *Keeper) jwtBundleFiles(bundles map[string][]byte) ([]file, error) {
	own, err := k.ownDomain(bundles)
	if err != nil {
		return nil, err
	}
	var list []file
	if k.cfg.JWTBundle != "" {
		out := map[string]string{}
		for id, set := range bundles {
			if !k.cfg.Federated && id != own {
				continue
			}
			td, err := spiffeid.TrustDomainFromString(id)
			if err != nil {
				return nil, fmt.Errorf("trust domain %q: %w", id, err)
			}
			out[td.Name()] = base64.StdEncoding.EncodeToString(set)
		}
		text, err := json.Marshal(out)
		if err != nil {
			return nil, err
		}
		list = append(list, file{k.cfg.JWTBundle, text, k.cfg.JWTBundleMode})
	}
	if k.cfg.JWKS != "" {
		set := bundles[own]
		if !json.Valid(set) {
			return nil, fmt.Errorf("the JWK set of %s is no JSON", own)
		}
		list = append(list, file{k.cfg.JWKS, set, k.cfg.JWTBundleMode})
	}
	return list, nil
}

func (k *Keeper) ownDomain(bundles map[string][]byte) (string, error) {
	if k.domain != "" {
		if _, ok := bundles[k.domain]; ok {
			return k.domain, nil
		}
	}
	if len(bundles) == 1 {
		for id := range bundles {
			return id, nil
		}
	}
	if k.domain == "" {
		return "", errors.New("which of several trust domains is the own one is not known before there is an X509-SVID")
	}
	return "", fmt.Errorf("there is no bundle of %s", k.domain)
}

// poke has all tokens fetched anew. mu is held.
func (k *Keeper) poke() {
	for _, p := range k.pokes {
		select {
		case p <- struct{}{}:
		default:
		}
	}
}

// keepJWT keeps one token file fresh: it is fetched anew at half of its life.
func (k *Keeper) keepJWT(ctx context.Context, n int) {
	for tries := 0; ctx.Err() == nil; tries++ {
		next, err := k.jwt(ctx, n)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			if !errors.Is(err, ErrNoIdentity) {
				k.failed(jwtGroup(k.cfg.JWTs[n]), err)
			}
			d := min(firstPause<<min(tries, 10), lastPause)
			if !sleep(ctx, d, k.pokes[n]) {
				return
			}
			continue
		}
		tries = 0
		if !sleep(ctx, max(next, firstPause), k.pokes[n]) {
			return
		}
	}
}

// jwt fetches and writes one token, and returns when it is to be fetched again.
func (k *Keeper) jwt(ctx context.Context, n int) (time.Duration, error) {
	j := k.cfg.JWTs[n]
	resp, err := k.src.JWT(ctx, j.Audience)
	k.mu.Lock()
	defer k.mu.Unlock()
	var chosen *workload.JWTSVID
	if err == nil {
		if chosen = k.chooseJWT(resp.GetSvids()); chosen == nil {
			err = fmt.Errorf("none of %d tokens is of the identity that spiffe_id and hint name: %w", len(resp.GetSvids()), ErrNoIdentity)
		}
	}
	if errors.Is(err, ErrNoIdentity) && k.cfg.Withdrawn != Keep {
		if gone, failed := k.remove(j.File); failed != nil {
			return 0, failed
		} else if gone {
			k.log.WithField("file", j.File).Warn("the identity is withdrawn, and with it its token")
		}
	}
	if err != nil {
		return 0, err
	}
	issued, expires, err := times(chosen.GetSvid())
	if err != nil {
		return 0, fmt.Errorf("read answer of the API: %w", err)
	}
	_, err = k.put([]file{{j.File, []byte(chosen.GetSvid()), k.cfg.JWTMode}})
	k.wrote(jwtGroup(j), err)
	if err != nil {
		return 0, err
	}
	k.tell.renewed(false, k.complete()) // its readers read it for each use
	return issued.Add(expires.Sub(issued) / 2).Sub(k.now()), nil
}

func (k *Keeper) chooseJWT(svids []*workload.JWTSVID) *workload.JWTSVID {
	for _, s := range svids {
		if (k.cfg.SPIFFEID == "" || s.GetSpiffeId() == k.cfg.SPIFFEID) && (k.cfg.Hint == "" || s.GetHint() == k.cfg.Hint) {
			return s
		}
	}
	return nil
}

// times reads when a token was issued and expires. It is the API's own, and nobody is asked to trust it.
func times(token string) (issued, expires time.Time, err error) {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return issued, expires, errors.New("token is none")
	}
	text, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return issued, expires, errors.New("token is none")
	}
	var claims struct {
		Issued  float64 `json:"iat"`
		Expires float64 `json:"exp"`
	}
	if err := json.Unmarshal(text, &claims); err != nil || claims.Expires <= 0 {
		return issued, expires, errors.New("token does not say when it expires")
	}
	expires = time.Unix(int64(claims.Expires), 0)
	if claims.Issued <= 0 || claims.Issued > claims.Expires {
		return expires, expires, nil
	}
	return time.Unix(int64(claims.Issued), 0), expires, nil
}
