// Package swtpm manufactures software TPMs, with an authority that certifies their endorsement keys, and runs
// them.
//
// It returns errors and never calls testing functions, so that a program can use it too.
package swtpm

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// startTime is how long a TPM may take to listen; it takes milliseconds on an idle machine.
const startTime = time.Minute

// Maker is a manufacturer. Only one goroutine may use it.
type Maker struct {
	dir  string
	runs []*exec.Cmd
}

// Available says why there can be no software TPM here, or nil.
func Available() error {
	for _, program := range []string{"swtpm", "swtpm_setup", "swtpm_localca"} {
		if _, err := exec.LookPath(program); err != nil {
			return fmt.Errorf("%w (Debian: apt-get install swtpm swtpm-tools)", err)
		}
	}
	return nil
}

// New opens a factory, in a new folder in the system's temporary folder: socket paths are short, and swtpm
// must be able to read all of it under whatever user it chooses.
func New() (*Maker, error) {
	ca, err := exec.LookPath("swtpm_localca")
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "tpm-")
	if err != nil {
		return nil, err
	}
	m := &Maker{dir: dir}
	for name, text := range map[string]string{
		"localca.conf":    fmt.Sprintf("statedir = %[1]s/ca\nsigningkey = %[1]s/ca/signkey.pem\nissuercert = %[1]s/ca/issuercert.pem\ncertserial = %[1]s/ca/certserial\n", dir),
		"localca.options": "--platform-manufacturer Test\n--platform-version 1\n--platform-model Test\n",
		"setup.conf":      fmt.Sprintf("create_certs_tool = %[2]s\ncreate_certs_tool_config = %[1]s/localca.conf\ncreate_certs_tool_options = %[1]s/localca.options\nactive_pcr_banks = sha256\n", dir, ca),
	} {
		if err := m.write(name, []byte(text)); err != nil {
			return nil, errors.Join(err, m.Close())
		}
	}
	return m, nil
}

func (m *Maker) write(name string, text []byte) error {
	return os.WriteFile(filepath.Join(m.dir, name), text, 0o600)
}

// Dir is the factory's folder, in which each TPM has a folder and a socket of its name.
func (m *Maker) Dir() string { return m.dir }

// Roots is the file with the manufacturer's authorities, which are there once it has made a TPM.
func (m *Maker) Roots() (string, error) {
	found, err := filepath.Glob(filepath.Join(m.dir, "ca", "*.pem"))
	if err != nil {
		return "", err
	}
	var all []byte
	for _, path := range found {
		text, err := os.ReadFile(path)
		if err != nil {
			return "", err
		}
		for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
			if block.Type == "CERTIFICATE" {
				all = append(all, pem.EncodeToMemory(block)...)
			}
		}
	}
	return filepath.Join(m.dir, "roots.pem"), m.write("roots.pem", all)
}

// Make manufactures a TPM and runs it; it returns the path of its socket.
func (m *Maker) Make(ctx context.Context, name string) (string, error) {
	state, socket := filepath.Join(m.dir, name), filepath.Join(m.dir, name+".sock")
	if err := os.Mkdir(state, 0o700); err != nil {
		return "", err
	}
	setup := exec.CommandContext(ctx, "swtpm_setup", "--tpm2", "--tpmstate", state, "--config", filepath.Join(m.dir, "setup.conf"),
		"--create-ek-cert", "--lock-nvram", "--pcr-banks", "sha256", "--overwrite")
	if out, err := setup.CombinedOutput(); err != nil {
		return "", fmt.Errorf("swtpm_setup: %w: %s", err, out)
	}
	run := exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+state,
		"--server", "type=unixio,path="+socket, "--ctrl", "type=unixio,path="+socket+".ctrl", "--flags", "not-need-init,startup-clear")
	run.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := run.Start(); err != nil {
		return "", err
	}
	m.runs = append(m.runs, run)
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	for {
		if conn, err := net.Dial("unix", socket); err == nil { // the file is there a moment before anybody listens
			return socket, conn.Close()
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return "", errors.New("the software TPM does not listen")
		}
	}
}

// Close ends the TPMs and removes all of it.
func (m *Maker) Close() error {
	for _, run := range m.runs {
		_ = run.Process.Kill()
		_ = run.Wait()
	}
	m.runs = nil
	return os.RemoveAll(m.dir)
}
