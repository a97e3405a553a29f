// Package rules reads the blocks of the server's file that are about evidence: scan_policy,
// trust_policy and evidence_source. The keys of each are described by their own packages; here is how they
// hang together.
//
//	scan_policy.sources, scan_policy.vex.trust ──> trust_policy       who signed it
//	                                           ├─> evidence_source    who brought it, if that may bring it unsigned
//	                                           └─> "local"            what a local administrator brought
//
// Why it is so: the names are one space, since a scan policy does not care by what means somebody is
// vouched for; so a name that is a trust policy's cannot be an evidence source's too.
package rules

import (
	"fmt"
	"slices"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/gohcl"

	"github.com/assay-id/assay/conf"
	"github.com/assay-id/assay/server/verdict"
	"github.com/assay-id/assay/server/verdict/policy"
	"github.com/assay-id/assay/server/verdict/trust"
)

// The types of block.
const (
	Scan   = "scan_policy"
	Trust  = "trust_policy"
	Source = "evidence_source"
)

// Kinds decode the blocks, for conf.
func Kinds() []conf.NamedKind {
	return []conf.NamedKind{
		{Block: Scan, Decode: decodeScan},
		{Block: Trust, Decode: func(name string, body hcl.Body) (any, []conf.KeyProblem, hcl.Diagnostics) {
			b := trust.PolicyBlock{}
			diags := gohcl.DecodeBody(body, nil, &b)
			if diags.HasErrors() {
				return nil, nil, diags
			}
			b.Name = name
			p, problems := trust.NewPolicy(b)
			return p, problems, diags
		}},
		{Block: Source, Decode: func(name string, body hcl.Body) (any, []conf.KeyProblem, hcl.Diagnostics) {
			b := trust.SourceBlock{}
			diags := gohcl.DecodeBody(body, nil, &b)
			if diags.HasErrors() {
				return nil, nil, diags
			}
			b.Name = name
			s, problems := trust.NewSource(b)
			return s, problems, diags
		}},
	}
}

func decodeScan(name string, body hcl.Body) (any, []conf.KeyProblem, hcl.Diagnostics) {
	b := policy.Block{}
	diags := gohcl.DecodeBody(body, nil, &b)
	if diags.HasErrors() {
		return nil, nil, diags
	}
	b.Name = name
	p, problems := policy.New(b)
	return p, problems, diags
}

// Check says what is wrong between the blocks. Others are sources that no block of evidence makes: what other
// parts of the server take in unsigned is from them.
func Check(all []conf.Named, others ...string) []conf.NamedProblem {
	var problems []conf.NamedProblem
	say := func(block, name, field, format string, args ...any) {
		problems = append(problems, conf.NamedProblem{Block: block, Name: name, KeyProblem: conf.KeyProblem{Field: field, Text: fmt.Sprintf(format, args...)}})
	}
	signers, sources, silent := []string{}, []string{verdict.Local}, map[string]bool{}
	for _, p := range conf.NamedOf[*trust.Policy](all, Trust) {
		if p.Name() == verdict.Local {
			say(Trust, p.Name(), "name", "%q is what local administrators push; give it another name.", verdict.Local)
		}
		signers = append(signers, p.Name())
	}
	for _, s := range conf.NamedOf[*trust.Source](all, Source) {
		if slices.Contains(signers, s.Name()) || s.Name() == verdict.Local {
			say(Source, s.Name(), "name", "%q is a trust_policy's name, or \"local\": a source needs a name of its own.", s.Name())
		}
		sources = append(sources, s.Name())
		silent[s.Name()] = !s.AllowUnsigned()
	}
	for _, name := range others {
		silent[name] = false
	}
	known := slices.Concat(signers, sources, others)
	for _, p := range conf.NamedOf[*policy.ScanPolicy](all, Scan) {
		for _, list := range []struct {
			field string
			names []string
		}{{"sources", p.Sources}, {"vex.trust", p.VEX.Trust}} {
			for _, name := range list.names {
				switch {
				case !slices.Contains(known, name):
					say(Scan, p.Name, list.field, "%q is no trust_policy and no evidence_source of this file, and not \"local\".", name)
				case silent[name]:
					say(Scan, p.Name, list.field, "evidence_source %q vouches for nothing by itself: it lets documents in that are signed under a trust_policy, which is to be named here; or give it allow_unsigned.", name)
				}
			}
		}
	}
	return problems
}

// ScanPolicies reads the scan policies of a text, as of a file under the given name.
func ScanPolicies(file string, text []byte) ([]*policy.ScanPolicy, error) {
	if file == "" {
		file = "policies"
	}
	named, err := conf.DecodeNamed(file, text, []conf.NamedKind{{Block: Scan, Decode: decodeScan}})
	if err != nil {
		return nil, err
	}
	if len(named) == 0 {
		return nil, fmt.Errorf("%s has no scan_policy", file)
	}
	return conf.NamedOf[*policy.ScanPolicy](named, Scan), nil
}
