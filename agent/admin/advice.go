package admin

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/assay-id/assay/agent/admin/wire"
	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/workloadapi/identity"
)

// advise says in sentences what to do next, the most useful first.
func advise(x explanation, p *wire.Process, st Status, held uint64, entries int, now time.Time) []string {
	var out []string
	say := func(format string, args ...any) { out = append(out, strings.TrimSpace(fmt.Sprintf(format, args...))) }
	if p.GetExited() {
		say("The process exited while it was looked at, so all of this may be about another one. Ask again about one that runs.")
	}
	if st.Banned {
		say("The server has banned this agent and gives it nothing. If that is over, evict it on the server: assay-server agent evict -spiffeID %s. It then has to prove its node again: with join_token by a new token.", quote(orUnknown(st.AgentID.String(), "AGENT_ID")))
	}
	neverHeard := entries == 0 && held == 0 && !st.Banned
	if neverHeard {
		say("The agent has no picture from its server %syet, so nothing can match%s. %s", at(st), why(st), cureUplink(st, x))
	}
	for _, f := range x.failed {
		say("The %s attestor failed (%s), so entries that need its selectors cannot match. %s", f.Attestor, f.Err, cure(f))
	}
	switch {
	case len(x.matches) > 0:
		out = append(out, adviseMatched(x, now)...)
	case neverHeard, st.Banned:
	case entries == 0:
		say("The server has given this agent no entries at all. Entries reach it when their parent is %s, or an alias that this node's selectors match; look at those with: assay-server agent show -spiffeID %s",
			orUnknown(x.parent.String(), orUnknown(st.AgentID.String(), "this agent's ID")), quote(orUnknown(st.AgentID.String(), "AGENT_ID")))
		out = append(out, elsewhere(x, st)...)
		say("To give the process an identity: %s", create(x, st))
	default:
		out = append(out, adviseUnmatched(x, st)...)
	}
	switch {
	case st.Connected || st.Banned || neverHeard:
	case st.Heard.IsZero():
		say("The agent has not heard from its server %ssince it started%s: entries made or changed meanwhile are not known here. %s", at(st), why(st), cureUplink(st, x))
	default:
		say("The agent last heard from its server %s%s ago%s: entries made or changed since then are not known here. %s", at(st), age(now.Sub(st.Heard)), why(st), cureUplink(st, x))
	}
	if slices.ContainsFunc(x.matches, func(m match) bool { return m.withheld() == "" }) && !slices.ContainsFunc(x.matches, func(m match) bool { return m.err != nil || m.over(now) }) {
		say("%s", itsSide)
	}
	if st.Connected && st.ServerRev > held {
		say("The agent is %d revisions behind the server and catching up; ask again in a moment.", st.ServerRev-held)
	}
	return out
}

func at(st Status) string {
	if st.Server == "" {
		return ""
	}
	return "(" + st.Server + ") "
}

func why(st Status) string {
	if st.Err == nil {
		return ""
	}
	text, _, _ := strings.Cut(plain(st.Err), "; make a new one with") // cureUplink says that in its own words
	return " (" + text + ")"
}

var (
	rpcError  = regexp.MustCompile(`rpc error: code = \w+ desc = `)
	transport = regexp.MustCompile(`connection error: desc = "(?:transport: )?(?:Error while dialing: )?(.*)"`)
)

// plain leaves out of an error what gRPC wraps around its cause.
func plain(err error) string {
	text := rpcError.ReplaceAllString(err.Error(), "")
	if m := transport.FindStringSubmatchIndex(text); m != nil {
		text = text[:m[0]] + strings.ReplaceAll(text[m[2]:m[3]], `\"`, `"`) + text[m[1]:]
	}
	return text
}

// cureUplink is what usually brings an agent and its server together.
func cureUplink(st Status, x explanation) string {
	if st.Err == nil {
		return ""
	}
	text := st.Err.Error()
	has := func(parts ...string) bool {
		return slices.ContainsFunc(parts, func(part string) bool { return strings.Contains(text, part) })
	}
	const bundle = "Write what this prints on the server into the file that trust_bundle_path in agent.hcl names: assay-server bundle show. The agent looks at it again by itself."
	switch {
	case has("join token"):
		name := ""
		if !x.parent.IsZero() && x.parent != st.AgentID {
			name = " -spiffeID " + quote(x.parent.String())
		}
		return "A token works once, and only for a time. Make one on the server, hand it to the agent as join_token or -joinToken, and restart it: assay-server token generate" + name
	case has("read trust bundle"):
		return bundle
	case has("get trust bundle"):
		return "The ConfigMap that trust_bundle_config_map in agent.hcl names is written by the server: does it run, and has server.hcl a bundle_config_map of that name for the agents' namespace? The agent's role needs get and watch on it."
	case has("fetch trust bundle"):
		return "Is trust_bundle_url in agent.hcl right? Whoever answers there has to show a certificate that this machine's own authorities vouch for, as for any https page."
	case has("certificate has expired or is not yet valid"):
		return "Is this machine's clock right? Compare \"date -u\" here and on the server. If both agree, the bundle that the agent knows the server by is too old: " +
			strings.ToLower(bundle[:1]) + bundle[1:]
	case has("x509: ", "certificate signed by unknown authority", "server cannot be verified"):
		return "Whoever answers there does not show what this agent's bundle vouches for: another server, or one whose authorities were replaced while the agent was away. If it is the right one: " +
			strings.ToLower(bundle[:1]) + bundle[1:]
	case has("connection refused", "no route to host", "no such host", "i/o timeout", "deadline exceeded", "DeadlineExceeded", "network is unreachable", "connection reset"):
		return "Does the server run there, are server_address and server_port in agent.hcl right, and does nothing in between block it?"
	}
	return "The server's log and audit log say why."
}

// elsewhere looks for entries that this agent is not given.
func elsewhere(x explanation, st Status) []string {
	sel := telling(x.facts)
	if len(sel) == 0 {
		return nil
	}
	names := orUnknown(st.AgentID.String(), "this agent")
	if !x.parent.IsZero() && x.parent != st.AgentID {
		names = x.parent.String() + " and " + names
	}
	return []string{fmt.Sprintf("An entry for it may have expired, or hang on a parent that is another node (this one is %s). Look on the server: assay-server entry show -selector %s",
		names, quote(sel[0].String()))}
}

// cure is what usually helps an attestor.
func cure(f attestor.Finding) string {
	text := f.Err.Error()
	switch {
	case errors.Is(f.Err, context.DeadlineExceeded):
		return "It did not answer in time: is what it asks overloaded?"
	case strings.Contains(text, "permission denied"):
		return "The agent lacks a permission for it: which user does the agent run as?"
	case strings.Contains(text, "no such file"), strings.Contains(text, "connection refused"):
		return "What it asks is not there: does it run, and is its address in agent.hcl right?"
	}
	return "The agent's log has more."
}

func adviseMatched(x explanation, now time.Time) []string {
	var out []string
	var given []match
	for _, m := range x.matches {
		if m.err != nil && m.withheld() == "" {
			out = append(out, fmt.Sprintf("The SVID of entry %s could not be signed or renewed (%s); the agent goes on trying.", m.entry.ID, plain(m.err)))
		}
		if m.over(now) && m.err == nil && m.withheld() == "" {
			out = append(out, fmt.Sprintf("The SVID of entry %s expired %s ago, and no workload is given one that is over: the agent has another signed as soon as its server answers.", m.entry.ID, age(now.Sub(m.until))))
		}
		if m.shadowed {
			out = append(out, fmt.Sprintf("Entry %s matches but is not handed out: an older entry has the same hint %q.", m.entry.ID, m.entry.Hint))
			continue
		}
		if m.entry.StoreSVID {
			out = append(out, fmt.Sprintf("Entry %s matches but was made with -storeSVID, which is for plugins that put SVIDs into a store of secrets: no workload gets it. If this one should: %s", m.entry.ID, forWorkloads(m.entry)))
			continue
		}
		given = append(given, m)
	}
	if len(given) > 1 {
		out = append(out, fmt.Sprintf("The process gets %d identities. A client that takes only one takes the first, %s, because its entry is the oldest.", len(given), given[0].entry.SPIFFEID))
	}
	return out
}

// itsSide is what is left when the agent would give an identity and the workload has none.
const itsSide = "If the workload itself still has no identity, look at its side: does SPIFFE_ENDPOINT_SOCKET name this agent's socket, is the socket mounted into its container, and does it call from this very process?"

// othersPods is said where no entry comes near but those of other pods, which are not to be given away.
const othersPods = "No entry is this pod's: those that come near are other pods'. A pod has its entries of the ClusterSPIFFEIDs that select it; whether one does, and what is wrong with it: kubectl get clusterspiffeids"

// adviseUnmatched compares with the entry that is nearest.
func adviseUnmatched(x explanation, st Status) []string {
	var out []string
	if x.facts.Len() == 0 && len(x.failed) == 0 {
		return append(out, "Nothing at all is proved about this process, so no entry can match. Configure a workload attestor in agent.hcl that knows this kind of process.")
	}
	if len(x.near) > 0 {
		n := x.near[0]
		if n.another {
			return append(out, othersPods, "To give the process an identity of its own: "+create(x, st))
		}
		if unknown := untold(x); len(unknown) > 0 {
			return append(out, fmt.Sprintf("The nearest entry, %s for %s, needs %s, of which nothing is known until that attestor answers.",
				n.entry.ID, n.entry.SPIFFEID, strings.Join(unknown, " and ")))
		}
		if i := slices.IndexFunc(n.missing, func(m missing) bool { return m.never }); i >= 0 {
			return append(out, fmt.Sprintf("The nearest entry, %s for %s, can match nobody here: %s.", n.entry.ID, n.entry.SPIFFEID, n.missing[i].reason))
		}
		if gates := ungrantedOf(n); len(gates) == len(n.missing) {
			return append(out, fmt.Sprintf("The nearest entry, %s for %s, demands %s of the image. %s. Ask the server why: assay-server evidence explain -image%s",
				n.entry.ID, n.entry.SPIFFEID, strings.Join(gates, " and "), sentence(n.missing[0].reason), digestOf(x)))
		}
		var wrong, absent []string
		for _, m := range n.missing {
			if len(m.similar) > 0 {
				wrong = append(wrong, fmt.Sprintf("%s where the process has %s", m.selector, m.similar[0]))
			} else {
				absent = append(absent, m.selector.String())
			}
		}
		switch {
		case len(wrong) > 0 && len(absent) == 0:
			out = append(out, fmt.Sprintf("The nearest entry, %s for %s, asks for %s. If the entry is wrong: %s. If the workload is wrong, correct it and start it again.",
				n.entry.ID, n.entry.SPIFFEID, strings.Join(wrong, ", and for "), correct(n)))
		case len(n.missing) < n.entry.Selectors.Len():
			out = append(out, fmt.Sprintf("The nearest entry, %s for %s, also asks for %s, which the process does not have.",
				n.entry.ID, n.entry.SPIFFEID, strings.Join(append(names(wrong), absent...), " and ")))
		default:
			out = append(out, "No entry that this agent is given shares a selector with this process.")
			out = append(out, elsewhere(x, st)...)
		}
	}
	return append(out, "To give the process an identity of its own: "+create(x, st))
}

// untold returns what the nearest entry wants of attestors that failed.
func untold(x explanation) []string {
	var out []string
	for _, m := range x.near[0].missing {
		if slices.ContainsFunc(x.failed, func(f attestor.Finding) bool { return f.Attestor == m.selector.Type }) {
			out = append(out, m.selector.String())
		}
	}
	return out
}

// names keeps what is asked for of "x where the process has y".
func names(wrong []string) []string {
	out := make([]string, 0, len(wrong))
	for _, w := range wrong {
		name, _, _ := strings.Cut(w, " where the process has ")
		out = append(out, name)
	}
	return out
}

// forWorkloads is the command that makes an entry for a store one for workloads.
func forWorkloads(e *identity.Entry) string {
	served := *e
	served.StoreSVID = false
	return update(near{entry: &served})
}

// correct is what makes the nearest entry match. One that the server's registrar made it would make again.
func correct(n near) string {
	if strings.HasPrefix(n.entry.ID, "kube.") {
		return "correct what it is made from, kubectl get clusterspiffeids,clusterstaticentries"
	}
	return update(n)
}

// update is the command that makes the nearest entry match.
func update(n near) string {
	var b strings.Builder
	fmt.Fprintf(&b, "assay-server entry update -entryID %s -spiffeID %s", quote(n.entry.ID), quote(n.entry.SPIFFEID.String()))
	if !n.entry.ParentID.IsZero() {
		fmt.Fprintf(&b, " -parentID %s", quote(n.entry.ParentID.String()))
	}
	for _, s := range n.entry.Selectors.All() {
		for _, m := range n.missing {
			if m.selector == s && len(m.similar) > 0 {
				s = m.similar[0]
				break
			}
		}
		fmt.Fprintf(&b, " -selector %s", quote(s.String()))
	}
	// An update replaces the whole entry, so what else it says is said again.
	e := n.entry
	for _, name := range e.DNSNames {
		fmt.Fprintf(&b, " -dns %s", quote(name))
	}
	for _, td := range e.FederatesWith {
		fmt.Fprintf(&b, " -federatesWith %s", quote(td.IDString()))
	}
	if e.Hint != "" {
		fmt.Fprintf(&b, " -hint %s", quote(e.Hint))
	}
	if e.X509SVIDTTL > 0 {
		fmt.Fprintf(&b, " -x509SVIDTTL %d", e.X509SVIDTTL/time.Second)
	}
	if e.JWTSVIDTTL > 0 {
		fmt.Fprintf(&b, " -jwtSVIDTTL %d", e.JWTSVIDTTL/time.Second)
	}
	if !e.ExpiresAt.IsZero() {
		fmt.Fprintf(&b, " -entryExpiry %d", e.ExpiresAt.Unix())
	}
	for _, flag := range []struct {
		name string
		set  bool
	}{
		{"admin", e.Admin}, {"downstream", e.Downstream}, {"storeSVID", e.StoreSVID},
		{"disableX509SVIDPrefetch", e.NoPrefetch}, {"jwtSVIDIncludeJTI", e.JTI},
	} {
		if flag.set {
			b.WriteString(" -" + flag.name)
		}
	}
	return b.String()
}

// create is a command that makes an entry for the process.
func create(x explanation, st Status) string {
	hangsOn := x.parent
	if hangsOn.IsZero() {
		hangsOn = st.AgentID
	}
	parent, name := "AGENT_ID", "spiffe://TRUST_DOMAIN/NAME"
	if !hangsOn.IsZero() {
		parent = hangsOn.String()
		name = hangsOn.TrustDomain().IDString() + "/NAME"
	}
	var b strings.Builder
	fmt.Fprintf(&b, "assay-server entry create -parentID %s -spiffeID %s", quote(parent), quote(name))
	for _, s := range telling(x.facts) {
		fmt.Fprintf(&b, " -selector %s", quote(s.String()))
	}
	return b.String()
}

// telling picks the one or two selectors that an entry for this process would most likely use.
func telling(facts attestor.Set) []attestor.Selector {
	for _, kind := range []struct {
		prefix string
		most   int
	}{
		{"k8s:sa:", 1}, {"docker:label:", 1}, {"docker:image_config_digest:", 1}, {"systemd:id:", 1},
		{"unix:path:", 1}, {"unix:uid:", 1}, {"", 1},
	} {
		all := facts.All()
		i := slices.IndexFunc(all, func(s attestor.Selector) bool {
			// Labels of build tools and compose say how a container was made, not what it is.
			return strings.HasPrefix(s.String(), kind.prefix) && !strings.HasPrefix(s.Value, "label:com.") && !strings.HasPrefix(s.Value, "label:org.")
		})
		if i < 0 {
			continue
		}
		out := []attestor.Selector{all[i]}
		// A program anybody can start says little without its user, and each namespace has its own "default".
		if with := map[string]string{"unix:path:": "unix:uid:", "k8s:sa:": "k8s:ns:"}[kind.prefix]; with != "" {
			if j := slices.IndexFunc(all, func(s attestor.Selector) bool { return strings.HasPrefix(s.String(), with) }); j >= 0 {
				out = append(out, all[j])
			}
		}
		return out
	}
	return nil
}

// quote makes a word safe to paste into a shell.
func quote(word string) string {
	if word != "" && !strings.ContainsFunc(word, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !strings.ContainsRune(":/._-=@%+,", r)
	}) {
		return word
	}
	return "'" + strings.ReplaceAll(word, "'", `'\''`) + "'"
}

func orUnknown(text, unknown string) string {
	if text == "" {
		return unknown
	}
	return text
}

// age prints a duration as people say it.
func age(d time.Duration) string {
	switch {
	case d < 0:
		return "0s"
	case d < time.Minute:
		return d.Round(100 * time.Millisecond).String()
	case d < time.Hour:
		return d.Round(time.Second).String()
	case d < 48*time.Hour:
		return strings.TrimSuffix(d.Round(time.Minute).String(), "0s")
	}
	return fmt.Sprintf("%d days", int(d.Hours()/24))
}
