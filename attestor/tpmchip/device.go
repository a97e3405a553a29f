// Package tpmchip is a TPM 2.0 as attestors and key stores see it: how it is spoken to, what its public areas
// say, and who certified its endorsement key. Attestors do not import each other, so what they share of it is
// here.
package tpmchip

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync/atomic"
	"time"
)

const (
	// headerSize is that of a TPM response: tag, size, code.
	headerSize = 10
	// maxResponse is the largest response in bytes.
	maxResponse = 4096
	// rcRetry is the code of a TPM that is busy and wants the command again (TPM_RC_RETRY), rcYielded and
	// rcTesting likewise; resends is how often it gets it, resendPause the wait before the first.
	rcRetry, rcYielded, rcTesting = 0x922, 0x908, 0x90a
	resends                       = 20
	resendPause                   = 5 * time.Millisecond
	maxResendPause                = 200 * time.Millisecond
	// commandTime is how long a socket may take for one answer; making an RSA key takes seconds.
	commandTime = 30 * time.Second
)

// Device is an open TPM: a character device, which answers each write with one read, or the socket of a
// software TPM, which answers in pieces.
type Device struct {
	io.ReadWriteCloser
	ctx      context.Context // the library's transport has no place for one
	deadline func(time.Time) error
	gone     atomic.Bool // the context ended
}

// Open opens the TPM at path until ctx ends.
func Open(ctx context.Context, path string) (*Device, error) {
	stat, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("find TPM: %w", err)
	}
	d := &Device{ctx: ctx}
	if stat.Mode().Type() == os.ModeSocket {
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
		if err != nil {
			return nil, fmt.Errorf("open TPM: %w", err)
		}
		d.ReadWriteCloser, d.deadline = conn, conn.SetDeadline
		return d, nil
	}
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("open TPM: %w", err)
	}
	d.ReadWriteCloser, d.deadline = file, func(time.Time) error { return nil }
	return d, nil
}

// Send sends a command and returns its response. A TPM that is busy is asked again, which the library
// does not do.
func (d *Device) Send(command []byte) ([]byte, error) {
	pause := resendPause
	for try := 0; ; try++ {
		response, err := d.once(command)
		if err != nil {
			return nil, err
		}
		code := binary.BigEndian.Uint32(response[6:headerSize])
		if try == resends || code != rcRetry && code != rcYielded && code != rcTesting {
			return response, nil
		}
		select {
		case <-time.After(pause):
			pause = min(2*pause, maxResendPause)
		case <-d.ctx.Done():
			return nil, d.ctx.Err()
		}
	}
}

func (d *Device) once(command []byte) ([]byte, error) {
	if err := d.ctx.Err(); err != nil {
		return nil, err
	}
	if err := d.deadline(time.Now().Add(commandTime)); err != nil {
		return nil, err
	}
	stop := context.AfterFunc(d.ctx, func() {
		d.gone.Store(true)
		_ = d.deadline(time.Now()) // wakes a reader of the socket
	})
	defer stop()
	fail := func(what string, err error) error {
		if d.gone.Load() {
			err = d.ctx.Err()
		}
		return fmt.Errorf("%s TPM: %w", what, err)
	}
	if _, err := d.Write(command); err != nil {
		return nil, fail("write to", err)
	}
	response := make([]byte, maxResponse)
	n, err := io.ReadAtLeast(d, response, headerSize) // a device gives all of it at once
	if err != nil {
		return nil, fail("read from", err)
	}
	size := int(binary.BigEndian.Uint32(response[2:6]))
	if size < headerSize || size > maxResponse || n > size {
		return nil, errors.New("read from TPM: its response has a size that cannot be")
	}
	if _, err := io.ReadFull(d, response[n:size]); err != nil {
		return nil, fail("read from", err)
	}
	return response[:size], nil
}
