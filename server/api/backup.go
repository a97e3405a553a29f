package api

import (
	"context"
	"crypto/sha256"
	"errors"
	"hash"
	"io"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/server/backup"
	"github.com/assay-id/assay/server/store/boltkv"
	"github.com/assay-id/assay/server/wire/adminv1"
)

// Snapshots makes copies of the store; *backup.Snapshots is one.
type Snapshots interface {
	Backup(ctx context.Context, w io.Writer) error
	Take(ctx context.Context) (backup.Snapshot, error)
}

// adminService is assay.admin.v1 on the private socket.
type adminService struct {
	adminv1.UnimplementedAdminServer
	api *API
}

// backupPart is how many bytes of a backup go into one message.
const backupPart = 256 << 10

// Backup sends a copy of the store. The audit line is written before the first part leaves.
func (s *adminService) Backup(_ *adminv1.BackupRequest, stream grpc.ServerStreamingServer[adminv1.BackupResponse]) error {
	if s.api.Snapshots == nil {
		return refusal(codes.Unimplemented, "this store cannot be backed up over the socket")
	}
	if err := ledgerOf(stream.Context()).write(nil); err != nil {
		return err
	}
	w := &partWriter{stream: stream, sum: sha256.New(), part: make([]byte, 0, backupPart)}
	if err := s.api.Snapshots.Backup(stream.Context(), w); err != nil {
		return fail("cannot back up the store", err)
	}
	if err := w.flush(); err != nil {
		return err
	}
	return stream.Send(&adminv1.BackupResponse{Sum: w.sum.Sum(nil)})
}

// partWriter sends what is written in parts.
type partWriter struct {
	stream grpc.ServerStreamingServer[adminv1.BackupResponse]
	sum    hash.Hash
	part   []byte
}

func (w *partWriter) Write(p []byte) (int, error) {
	n := 0
	for n < len(p) {
		take := min(len(p)-n, backupPart-len(w.part))
		w.part = append(w.part, p[n:n+take]...)
		n += take
		if len(w.part) == backupPart {
			if err := w.flush(); err != nil {
				return n, err
			}
		}
	}
	return n, nil
}

func (w *partWriter) flush() error {
	if len(w.part) == 0 {
		return nil
	}
	w.sum.Write(w.part)
	err := w.stream.Send(&adminv1.BackupResponse{Part: w.part})
	// The message may still be on its way out of gRPC's hands.
	w.part = make([]byte, 0, backupPart)
	return err
}

// TakeSnapshot makes a snapshot beside the automatic ones.
func (s *adminService) TakeSnapshot(ctx context.Context, _ *adminv1.TakeSnapshotRequest) (*adminv1.TakeSnapshotResponse, error) {
	if s.api.Snapshots == nil {
		return nil, refusal(codes.Unimplemented, "this store cannot make snapshots")
	}
	made, err := s.api.Snapshots.Take(ctx)
	switch {
	case errors.Is(err, backup.ErrNoRoom):
		return nil, &failure{st: status.New(codes.ResourceExhausted, err.Error()), cause: err}
	case errors.Is(err, boltkv.ErrDamaged):
		return nil, &failure{st: status.New(codes.DataLoss, err.Error()), cause: err}
	case err != nil:
		return nil, fail("cannot make a snapshot", err)
	}
	return &adminv1.TakeSnapshotResponse{
		Path: made.Path, Revision: uint64(made.Rev), Size: made.Size, MadeAt: made.Made.Unix(),
	}, nil
}
