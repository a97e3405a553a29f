// Package awsapi is how attestors speak with Amazon's cloud: requests signed by Signature Version 4, the
// credentials that an instance or a task has, and the proof that the holder of a role gives a server by
// signing a request that the server then sends.
//
// Why it is so: eight requests are needed in all, so there is no SDK; it would be larger than the agent. And the
// proof is asked for by more than one attestor, which do not import each other.
package awsapi

import (
	"regexp"
	"strings"
)

// What names look like. They become parts of agents' IDs, of host names and of queries, so nothing else is let
// through.
var (
	accountForm = regexp.MustCompile(`^[0-9]{12}$`)
	regionForm  = regexp.MustCompile(`^[a-z]{2}(-[a-z]+)+-[0-9]{1,2}$`)
)

// IsAccount reports whether a text is the number of an account.
func IsAccount(text string) bool { return accountForm.MatchString(text) }

// IsRegion reports whether a text is the name of a region.
func IsRegion(text string) bool { return regionForm.MatchString(text) }

// Suffix is the domain of AWS's services in a region.
func Suffix(region string) string {
	if strings.HasPrefix(region, "cn-") {
		return "amazonaws.com.cn"
	}
	return "amazonaws.com"
}

// Partition is the part of AWS's cloud that a region is in.
func Partition(region string) string {
	switch {
	case strings.HasPrefix(region, "cn-"):
		return "aws-cn"
	case strings.HasPrefix(region, "us-gov-"):
		return "aws-us-gov"
	}
	return "aws"
}
