package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// One user gets no more connections from the agent than are left for all others, and one process with
// 5,000 connections is no node. So streams are held by processes of their own, this program again, each
// as another user where we may choose.

const (
	holders     = 5
	firstHolder = 61001 // user ID
	holderGroup = 61000
)

// holding is what a holder says of each round of answers: how many streams had one, and when the first
// and the last came.
type holding struct {
	Streams     int
	First, Last time.Time
}

// holder is a process with open streams.
type holder struct {
	cmd  *exec.Cmd
	stop io.Closer
	says *json.Decoder
}

// hold is what the other process does: it opens streams, and tells about the first answer to each and
// about every one after, until its standard input ends.
func hold(socket string, count int) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	all, err := openMany(ctx, socket, count)
	if err != nil {
		return err
	}
	defer closeAll(all)
	out := json.NewEncoder(os.Stdout)
	if err := out.Encode(holding{Streams: count}); err != nil {
		return err
	}
	ended := make(chan error, 2)
	go func() {
		_, err := io.Copy(io.Discard, os.Stdin)
		ended <- err
	}()
	go func() {
		arrived := make([]time.Time, count)
		for {
			err := parallel(count, count, func(i int) error {
				_, err := all[i].client.Recv()
				arrived[i] = time.Now()
				return err
			})
			if err != nil {
				ended <- err
				return
			}
			round := holding{Streams: count, First: arrived[0], Last: arrived[0]}
			for _, at := range arrived {
				if at.Before(round.First) {
					round.First = at
				}
				if at.After(round.Last) {
					round.Last = at
				}
			}
			if err := out.Encode(round); err != nil {
				ended <- err
				return
			}
		}
	}()
	return <-ended
}

// startHolders opens streams from other processes and waits until each has its first answer.
func (b *bench) startHolders(count int) ([]*holder, error) {
	program, err := b.ownProgram()
	if err != nil {
		return nil, err
	}
	var list []*holder
	for i := range holders {
		share := count / holders
		if i < count%holders {
			share++
		}
		h := &holder{cmd: exec.Command(program, "-hold", fmt.Sprint(share), "-socket", b.agent.Socket)}
		h.cmd.Stderr = os.Stderr
		h.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if os.Geteuid() == 0 {
			h.cmd.SysProcAttr.Credential = &syscall.Credential{Uid: firstHolder + uint32(i), Gid: holderGroup, NoSetGroups: true}
		}
		in, err := h.cmd.StdinPipe()
		if err != nil {
			return list, err
		}
		out, err := h.cmd.StdoutPipe()
		if err != nil {
			return list, err
		}
		h.stop, h.says = in, json.NewDecoder(bufio.NewReader(out))
		if err := h.cmd.Start(); err != nil {
			return list, fmt.Errorf("start a holder of streams: %w", err)
		}
		list = append(list, h)
	}
	for _, h := range list {
		if _, err := h.next(); err != nil {
			return list, err
		}
	}
	return list, nil
}

// next waits for the next round of answers.
func (h *holder) next() (holding, error) {
	var round holding
	if err := h.says.Decode(&round); err != nil {
		return round, fmt.Errorf("hear from a holder of streams: %w", err)
	}
	return round, nil
}

func stopHolders(list []*holder) error {
	var errs []error
	for _, h := range list {
		_ = h.stop.Close()
		errs = append(errs, h.cmd.Wait())
	}
	return errors.Join(errs...)
}

// ownProgram is this program where other users can start it.
func (b *bench) ownProgram() (string, error) {
	path := filepath.Join(b.Dir, "bench")
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	from, err := os.Executable()
	if err != nil {
		return "", err
	}
	program, err := os.ReadFile(from)
	if err != nil {
		return "", err
	}
	return path, os.WriteFile(path, program, 0o755)
}

// heldBy is the selector that all holders match.
func heldBy() string {
	if os.Geteuid() == 0 {
		return fmt.Sprintf("gid:%d", holderGroup)
	}
	return fmt.Sprintf("uid:%d", os.Getuid())
}

// mostStreams is how many streams the agent lets the holders have: it needs two files for each and keeps
// a third, and all users together are left one share less than there is.
func mostStreams() int {
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err != nil {
		return 1000
	}
	places := int(min(files.Max, 1<<20)) / 3
	if os.Geteuid() == 0 {
		return places * holders / (holders + 1)
	}
	return places / 2
}
