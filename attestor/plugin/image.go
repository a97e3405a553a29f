package plugin

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/assay-id/assay/attestor/external"
)

// image is a program as it was when its checksum was compared: a sealed copy in memory that nobody can
// change any more, not even we. What is run is this, and not what the path leads to by then.
type image struct{ file *os.File }

// openImage copies a program and compares the copy with its checksum.
func openImage(path string, want [sha256.Size]byte) (*image, error) {
	memory, err := newMemory()
	if err != nil {
		return nil, fmt.Errorf("make room for a copy of the program: %w", err)
	}
	sum, err := external.ReadProgram(path, memory)
	if err == nil && sum != want {
		err = &external.ChecksumError{Path: path, Want: want, Got: sum}
	}
	if err == nil {
		_, err = unix.FcntlInt(memory.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL)
	}
	if err != nil {
		return nil, errors.Join(err, memory.Close())
	}
	return &image{memory}, nil
}

func newMemory() (*os.File, error) {
	const flags = unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING
	fd, err := unix.MemfdCreate("assay-plugin", flags|unix.MFD_EXEC)
	if errors.Is(err, unix.EINVAL) { // Linux before 6.3 knows no MFD_EXEC and makes all of them executable
		fd, err = unix.MemfdCreate("assay-plugin", flags)
	}
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	return os.NewFile(uintptr(fd), "assay-plugin"), nil
}

// path is by what name a child can run the image: the descriptor is open in it until it does.
func (i *image) path() string { return "/proc/self/fd/" + strconv.Itoa(int(i.file.Fd())) }

func (i *image) close() {
	_ = i.file.Close() // memory only
	runtime.KeepAlive(i)
}
