package main

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/assay-id/assay/test/lab/site"
)

// firstWorkload is the user ID of the first of many workloads.
const firstWorkload = 62001

// tainted measures how soon the workloads of a node have other certificates when the authority of theirs is
// tainted. Each has an identity of its own: that is a key, a certificate and a stream for each.
func tainted(ctx context.Context, b *bench) error {
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "bench:   left out: only root can connect as another user for each workload")
		return nil
	}
	if err := b.startAgent(ctx, ""); err != nil {
		return err
	}
	count := b.n(1000)
	list := make([]*types.Entry, count)
	for i := range list {
		list[i] = entryFor(b.node, fmt.Sprintf("/workload/%d", i), fmt.Sprintf("uid:%d", firstWorkload+i))
	}
	if _, err := b.create(ctx, list); err != nil {
		return err
	}
	streams := make([]*stream, count)
	defer func() { closeAll(streams) }()
	err := parallel(16, count, func(i int) (err error) {
		streams[i], err = b.openAs(ctx, firstWorkload+i, list[i].GetSpiffeId().GetPath())
		return err
	})
	if err != nil {
		return fmt.Errorf("open the streams of %d users: %w", count, err)
	}

	authorities := localauthorityv1.NewLocalAuthorityClient(b.conn)
	prepared, err := authorities.PrepareX509Authority(ctx, &localauthorityv1.PrepareX509AuthorityRequest{})
	if err != nil {
		return err
	}
	if _, err := b.all(streams, func(r *workload.X509SVIDResponse) (bool, error) { return authoritiesIn(r) == 2, nil }); err != nil {
		return fmt.Errorf("wait for the bundle with the new authority: %w", err)
	}
	fresh := prepared.GetPreparedAuthority().GetAuthorityId()
	activated, err := authorities.ActivateX509Authority(ctx, &localauthorityv1.ActivateX509AuthorityRequest{AuthorityId: fresh})
	if err != nil {
		return err
	}
	old, err := authorities.GetX509AuthorityState(ctx, &localauthorityv1.GetX509AuthorityStateRequest{})
	if err != nil || activated.GetActivatedAuthority().GetAuthorityId() != fresh {
		return errors.Join(err, fmt.Errorf("activated %v", activated))
	}
	if !sleep(ctx, settling) {
		return ctx.Err()
	}

	var took times
	used, err := cpuOf(func() error {
		begun := time.Now()
		if _, err := authorities.TaintX509Authority(ctx, &localauthorityv1.TaintX509AuthorityRequest{AuthorityId: old.GetOld().GetAuthorityId()}); err != nil {
			return err
		}
		at, err := b.all(streams, func(r *workload.X509SVIDResponse) (bool, error) { return signedBy(r, fresh) })
		for _, one := range at {
			took = append(took, one.Sub(begun))
		}
		return err
	}, b.Server().PID(), b.agent.PID())
	if err != nil {
		return fmt.Errorf("wait for certificates of the new authority: %w", err)
	}
	b.report(figure{"authority tainted → 1,000 workloads of a node told: p50", "25,000 ms, by design: 100 in 5 s", 2000, "ms"}, took.at(50), "")
	b.report(figure{"authority tainted → 1,000 workloads of a node told: last", "50,000 ms, by design: 100 in 5 s", 3000, "ms"}, took.at(100),
		fmt.Sprintf("(%d workloads, each its own identity; none failed)", count))
	b.report(figure{"authority tainted: CPU of server + agent, each workload", "", 1500, "µs"}, micros(used, count), "")

	// And without the old one all of them are still good.
	if _, err := authorities.RevokeX509Authority(ctx, &localauthorityv1.RevokeX509AuthorityRequest{AuthorityId: old.GetOld().GetAuthorityId()}); err != nil {
		return err
	}
	_, err = b.all(streams, func(r *workload.X509SVIDResponse) (bool, error) {
		if authoritiesIn(r) != 1 {
			return false, nil
		}
		good, err := signedBy(r, fresh)
		if err == nil && !good {
			err = errors.New("a certificate of the authority that was revoked is served")
		}
		return good, err
	})
	if err != nil {
		return fmt.Errorf("wait for the bundle without the old authority: %w", err)
	}
	return nil
}

// all reads from all streams until good says yes to each, and returns when each had what was good.
func (b *bench) all(streams []*stream, good func(*workload.X509SVIDResponse) (bool, error)) ([]time.Time, error) {
	at := make([]time.Time, len(streams))
	err := parallel(len(streams), len(streams), func(i int) error {
		var bad error
		err := streams[i].until(func(r *workload.X509SVIDResponse) bool {
			var ok bool
			ok, bad = good(r)
			at[i] = time.Now()
			return ok || bad != nil
		})
		return errors.Join(err, bad)
	})
	return at, err
}

// openAs opens the stream of another user, who has one identity with the path.
func (b *bench) openAs(ctx context.Context, uid int, path string) (*stream, error) {
	conn, err := grpc.NewClient("unix://"+b.agent.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithReadBufferSize(4<<10), grpc.WithWriteBufferSize(4<<10),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return dialAs(ctx, uid, b.agent.Socket) }))
	if err != nil {
		return nil, err
	}
	s, first, err := openOn(ctx, conn)
	if err != nil {
		return nil, err
	}
	if n := len(first.GetSvids()); n != 1 || first.GetSvids()[0].GetSpiffeId() != "spiffe://"+site.TrustDomain+path {
		s.close()
		return nil, fmt.Errorf("user %d has %d identities, the first is %s", uid, n, first.GetSvids()[0].GetSpiffeId())
	}
	return s, nil
}

// dialAs connects as another user. An agent goes by what the kernel says of who connected, and the kernel by
// the thread that did; SPIRE's goes by the process, which stays the same. That thread is itself again afterwards, and must not end: the programs that it started
// would end with it.
func dialAs(ctx context.Context, uid int, socket string) (net.Conn, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := actAs(uid); err != nil {
		return nil, err
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
	return conn, errors.Join(err, actAs(os.Getuid()))
}

// actAs changes the effective user of the thread.
func actAs(uid int) error {
	const keep = ^uintptr(0)
	if _, _, errno := syscall.RawSyscall(syscall.SYS_SETRESUID, keep, uintptr(uid), keep); errno != 0 {
		return os.NewSyscallError("setresuid", errno)
	}
	return nil
}

// authoritiesIn is how many authorities the own bundle has.
func authoritiesIn(r *workload.X509SVIDResponse) int {
	certs, err := x509.ParseCertificates(r.GetSvids()[0].GetBundle())
	if err != nil {
		return 0
	}
	return len(certs)
}

// signedBy says whether the certificate is of the authority; an error, that its own bundle does not verify it.
func signedBy(r *workload.X509SVIDResponse, authority string) (bool, error) {
	svid := r.GetSvids()[0]
	chain, err := x509.ParseCertificates(svid.GetX509Svid())
	if err != nil {
		return false, err
	}
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	bundle, err := x509.ParseCertificates(svid.GetBundle())
	if err != nil {
		return false, err
	}
	for _, c := range bundle {
		roots.AddCert(c)
	}
	for _, c := range chain[1:] {
		between.AddCert(c)
	}
	if _, err := chain[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		return false, fmt.Errorf("verify %s: %w", svid.GetSpiffeId(), err)
	}
	key, err := hex.DecodeString(authority)
	return bytes.Equal(chain[0].AuthorityKeyId, key), err
}
