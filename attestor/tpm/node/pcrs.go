package node

import (
	"bytes"
	"fmt"
	"slices"

	"github.com/google/go-tpm/tpm2"

	"github.com/assay-id/assay/attestor/tpm"
	"github.com/assay-id/assay/attestor/tpmchip"
)

// selection names registers of the SHA-256 bank.
func selection(pcrs []int) tpm2.TPMLPCRSelection {
	numbers := make([]uint, len(pcrs))
	for i, n := range pcrs {
		numbers[i] = uint(n)
	}
	return tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{
		Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(numbers...),
	}}}
}

// readPCRs reads registers; a TPM gives at most eight at once.
func readPCRs(dev *tpmchip.Device, pcrs []int) ([][]byte, error) {
	var values [][]byte
	for part := range slices.Chunk(pcrs, 8) {
		read, err := tpm2.PCRRead{PCRSelectionIn: selection(part)}.Execute(dev)
		if err != nil {
			return nil, fmt.Errorf("read registers: %w", err)
		}
		if len(read.PCRValues.Digests) != len(part) {
			return nil, fmt.Errorf("read registers: the TPM gives %d of %d; has it a SHA-256 bank?", len(read.PCRValues.Digests), len(part))
		}
		for _, digest := range read.PCRValues.Digests {
			if len(digest.Buffer) != tpm.DigestSize {
				return nil, fmt.Errorf("read registers: one has %d bytes", len(digest.Buffer))
			}
			values = append(values, digest.Buffer)
		}
	}
	return values, nil
}

func same(a, b [][]byte) bool { return slices.EqualFunc(a, b, bytes.Equal) }
