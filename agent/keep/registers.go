package keep

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/assay-id/assay/attestor/tpmchip"
)

// nonceSize is that of a session, in bytes.
const nonceSize = 16

// ErrRegisters says that the machine was booted otherwise than when the agent's state was sealed: the TPM does not
// open it. Nothing is put aside for it and nothing made anew: what runs may be somebody else's system, and whether
// it is to have the node's identity is for an operator to say.
var ErrRegisters = errors.New("the machine was booted otherwise than when it was sealed")

// register is a platform configuration register of the SHA-256 bank, and what it was when something was sealed.
// The TPM has its own record of that; this one is for who asks what changed.
type register struct {
	Number int    `json:"number"`
	Value  []byte `json:"value"`
}

// inPolicy makes a session prove that the registers are what they are now.
func inPolicy(pcrs []int) tpm2.PolicyCallback {
	return func(t transport.TPM, session tpm2.TPMISHPolicy, _ tpm2.TPM2BNonce) error {
		_, err := tpm2.PolicyPCR{PolicySession: session, Pcrs: tpmchip.Selection(pcrs)}.Execute(t)
		return err
	}
}

// policy is the digest that an object has which opens with the registers as they are now, and what they are.
func policy(dev *tpmchip.Device, pcrs []int) ([]byte, []register, error) {
	values, err := tpmchip.ReadPCRs(dev, pcrs)
	if err != nil {
		return nil, nil, err
	}
	session, done, err := tpm2.PolicySession(dev, tpm2.TPMAlgSHA256, nonceSize, tpm2.Trial())
	if err != nil {
		return nil, nil, fmt.Errorf("begin policy in TPM: %w", err)
	}
	defer func() { _ = done() }()
	if err := inPolicy(pcrs)(dev, session.Handle(), session.NonceTPM()); err != nil {
		return nil, nil, fmt.Errorf("make policy in TPM: %w", err)
	}
	digest, err := tpm2.PolicyGetDigest{PolicySession: session.Handle()}.Execute(dev)
	if err != nil {
		return nil, nil, fmt.Errorf("make policy in TPM: %w", err)
	}
	after, err := tpmchip.ReadPCRs(dev, pcrs)
	if err != nil {
		return nil, nil, err
	}
	registers := make([]register, len(pcrs))
	for i, n := range pcrs {
		if !bytes.Equal(values[i], after[i]) {
			return nil, nil, fmt.Errorf("register %d of the TPM changes while the agent starts; seal to others", n)
		}
		registers[i] = register{n, values[i]}
	}
	return digest.PolicyDigest.Buffer, registers, nil
}

// numbers are those of registers.
func numbers(registers []register) []int {
	all := make([]int, len(registers))
	for i, r := range registers {
		all[i] = r.Number
	}
	return all
}

// changed says which registers are other than they were.
func changed(dev *tpmchip.Device, registers []register) string {
	now, err := tpmchip.ReadPCRs(dev, numbers(registers))
	if err != nil {
		return err.Error()
	}
	var which []string
	for i, r := range registers {
		if !bytes.Equal(r.Value, now[i]) {
			which = append(which, fmt.Sprintf("register %d was %x and is %x", r.Number, r.Value, now[i]))
		}
	}
	if len(which) == 0 {
		return "no register is other than the file says, so the file was changed"
	}
	return strings.Join(which, ", ")
}

// asConfigured says whether something is sealed to the registers that are wanted now.
func (t *TPM) asConfigured(b *blob) bool { return slices.Equal(numbers(b.PCRs), t.PCRs) }
