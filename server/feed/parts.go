package feed

import (
	"fmt"

	"google.golang.org/protobuf/proto"

	"github.com/assay-id/assay/server/wire/feedv1"
)

// overhead bounds what a repeated field adds to each of its elements: the tag and the length.
const overhead = 8

// parts makes the messages of an update, one at a time, and hands each to send with its size. A
// message is closed before it would be over limit bytes, so it is larger only if a single thing is.
func (u *update) parts(limit int, send func(part *feedv1.FollowResponse, size int) error) error {
	fresh := func() *feedv1.FollowResponse {
		return &feedv1.FollowResponse{StoreId: u.picture.StoreID, Revision: uint64(u.rev), Full: u.full, MadeAt: u.madeAt.UnixNano()}
	}
	part := fresh()
	part.Capabilities = u.capabilities // a few bytes on the first part only
	base := proto.Size(part)
	size, filled := base, false
	// room closes the part if it has none for another n bytes.
	room := func(n int) error {
		n += overhead
		if filled && size+n > limit {
			part.More = true
			if err := send(part, size); err != nil {
				return err
			}
			part, size = fresh(), base
		}
		size += n
		filled = true
		return nil
	}
	// Removals first: an agent that applies part by part never holds more than both pictures need.
	for _, id := range u.removedEntries {
		if err := room(len(id)); err != nil {
			return err
		}
		part.RemovedEntryIds = append(part.RemovedEntryIds, id)
	}
	for _, td := range u.removedBundles {
		if err := room(len(td)); err != nil {
			return err
		}
		part.RemovedTrustDomains = append(part.RemovedTrustDomains, td)
	}
	for _, digest := range u.removedDigests {
		if err := room(len(digest)); err != nil {
			return err
		}
		part.RemovedDigests = append(part.RemovedDigests, digest)
	}
	for _, v := range u.verdicts {
		w := v.ForAgents().Wire()
		if err := room(proto.Size(w)); err != nil {
			return err
		}
		part.Verdicts = append(part.Verdicts, w)
	}
	for _, b := range u.bundles {
		w, err := b.Wire()
		if err != nil {
			return fmt.Errorf("convert bundle of %s: %w", b.TrustDomain, err)
		}
		crls, lists := 0, []*feedv1.RevocationList{}
		for _, der := range b.CRLs {
			l := &feedv1.RevocationList{TrustDomain: b.TrustDomain.Name(), Der: der, Nested: b.Nested}
			lists, crls = append(lists, l), crls+proto.Size(l)+overhead
		}
		if err := room(proto.Size(w) + crls); err != nil {
			return err
		}
		part.Bundles = append(part.Bundles, w)
		part.Crls = append(part.Crls, lists...)
	}
	for _, e := range u.entries {
		w := e.Wire()
		if err := room(proto.Size(w)); err != nil {
			return err
		}
		part.Entries = append(part.Entries, w)
	}
	part.Checksum = u.picture.Checksum()
	return send(part, size+len(part.GetChecksum())+overhead)
}
