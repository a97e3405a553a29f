package tpmchip

import (
	"crypto/sha256"
	"fmt"
	"slices"

	"github.com/google/go-tpm/tpm2"
)

// PCRs is how many platform configuration registers a bank has.
const PCRs = 24

// CheckPCRs says what is wrong with a list of registers, or nil: it must be in order, without repetition.
func CheckPCRs(pcrs []int) error {
	last := -1
	for _, n := range pcrs {
		if n <= last || n >= PCRs {
			return fmt.Errorf("register %d: registers are numbers from 0 to %d, in order and each once", n, PCRs-1)
		}
		last = n
	}
	return nil
}

// Selection names registers of the SHA-256 bank.
func Selection(pcrs []int) tpm2.TPMLPCRSelection {
	numbers := make([]uint, len(pcrs))
	for i, n := range pcrs {
		numbers[i] = uint(n)
	}
	return tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{
		Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(numbers...),
	}}}
}

// ReadPCRs reads registers; a TPM gives at most eight at once.
func ReadPCRs(dev *Device, pcrs []int) ([][]byte, error) {
	var values [][]byte
	for part := range slices.Chunk(pcrs, 8) {
		read, err := tpm2.PCRRead{PCRSelectionIn: Selection(part)}.Execute(dev)
		if err != nil {
			return nil, fmt.Errorf("read registers: %w", err)
		}
		if len(read.PCRValues.Digests) != len(part) {
			return nil, fmt.Errorf("read registers: the TPM gives %d of %d; has it a SHA-256 bank?", len(read.PCRValues.Digests), len(part))
		}
		for _, digest := range read.PCRValues.Digests {
			if len(digest.Buffer) != sha256.Size {
				return nil, fmt.Errorf("read registers: one has %d bytes", len(digest.Buffer))
			}
			values = append(values, digest.Buffer)
		}
	}
	return values, nil
}
