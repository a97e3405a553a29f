package admin

import (
	"bytes"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/assay-id/assay/agent/admin/wire"
)

// Render writes an explanation as a page of plain text for a person: the answer in the first line,
// then what it rests on, then what to do.
func Render(w io.Writer, r *wire.ExplainResponse) error {
	return render(w, r, time.Now())
}

// page collects lines. What comes from processes and attestors is made printable on its way in: a
// process can name itself with terminal commands.
type page struct{ bytes.Buffer }

func (p *page) line(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	p.WriteString(strings.TrimRight(strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, text), " "))
	p.WriteByte('\n')
}

func (p *page) title(format string, args ...any) {
	p.WriteByte('\n')
	p.line(format, args...)
}

func render(w io.Writer, r *wire.ExplainResponse, now time.Time) error {
	p := &page{}
	p.line("%s", verdict(r, now))
	p.title("Process")
	p.process(r.GetProcess(), now)
	p.title("Proved about it")
	p.findings(r)
	if len(r.GetImages()) > 0 {
		p.title("What the server has decided of its image")
		p.images(r)
	}
	p.title("Entries that match: %d of %d", len(r.GetMatches()), r.GetEntries())
	first := slices.IndexFunc(r.GetMatches(), handed)
	for i, e := range r.GetMatches() {
		note := ""
		switch {
		case e.GetWithheld() != "":
			note = "  (not handed out: " + e.GetWithheld() + ")"
		case i == first && slices.ContainsFunc(r.GetMatches()[i+1:], handed):
			note = "  (the default)"
		}
		p.line("  %s%s", e.GetSpiffeId(), note)
		p.entry(e)
		p.svid(e, r.GetAgent(), now)
		for _, s := range e.GetSelectors() {
			p.line("      has      %s", text(s))
		}
	}
	if len(r.GetNearest()) > 0 {
		p.title("Nearest entries that do not match")
		for _, n := range r.GetNearest() {
			p.near(n)
		}
	}
	p.title("Agent")
	p.agent(r.GetAgent(), now)
	if len(r.GetAdvice()) > 0 {
		p.title("What to do")
		for i, a := range r.GetAdvice() {
			p.wrapped(fmt.Sprintf("  %d. ", i+1), a)
		}
	}
	_, err := w.Write(p.Bytes())
	return err
}

// handed reports whether an entry that matches is handed out.
func handed(e *wire.Entry) bool { return e.GetWithheld() == "" }

// verdict is the answer in one line.
func verdict(r *wire.ExplainResponse, now time.Time) string {
	who := fmt.Sprintf("Process %d", r.GetProcess().GetPid())
	if name := r.GetProcess().GetName(); name != "" {
		who += " (" + name + ")"
	}
	if r.GetProcess().GetExited() {
		return who + " exited while it was looked at."
	}
	var given []string
	var first *wire.Entry
	for _, e := range r.GetMatches() {
		if handed(e) {
			given = append(given, e.GetSpiffeId())
			if first == nil {
				first = e
			}
		}
	}
	switch {
	case len(given) > 0 && first.GetSvidExpiresAt() != 0 && first.GetSvidExpiresAt() <= now.UnixMilli():
		return who + " matches " + given[0] + ", but the SVID that is held for it has expired and has no successor yet."
	case len(given) > 0 && first.GetSvidExpiresAt() == 0 && first.GetSvidError() != "":
		return who + " matches " + given[0] + ", but its SVID could not be signed: " + first.GetSvidError() + "."
	case len(given) > 0 && first.GetSvidExpiresAt() == 0 && !r.GetAgent().GetConnected():
		return who + " matches " + given[0] + ", but no SVID is held for it and the server cannot be asked at the moment."
	case len(given) == 1:
		return who + " gets " + given[0] + "."
	case len(given) > 1:
		return fmt.Sprintf("%s gets %s and %d more.", who, given[0], len(given)-1)
	case len(r.GetMatches()) > 0:
		return who + " gets no identity: " + r.GetMatches()[0].GetSpiffeId() + " matches and is not handed out: " + r.GetMatches()[0].GetWithheld() + "."
	case r.GetAgent().GetBanned():
		return who + " gets no identity: the server has banned this agent."
	case r.GetEntries() == 0 && r.GetAgent().GetHeldRev() == 0:
		return who + " gets no identity: this agent has no picture from its server yet."
	case r.GetEntries() == 0:
		return who + " gets no identity: this agent holds no entries."
	case len(r.GetNearest()) == 0:
		return who + " gets no identity: no entry matches."
	}
	n := r.GetNearest()[0]
	m := n.GetMissing()[0]
	if slices.ContainsFunc(n.GetMissing(), func(m *wire.Missing) bool {
		return m.GetSelector().GetType() == "k8s" && strings.HasPrefix(m.GetSelector().GetValue(), podUID) && len(m.GetSimilar()) > 0
	}) {
		return who + " gets no identity: no entry is this pod's."
	}
	why := "the nearest entry wants " + text(m.GetSelector())
	if len(n.GetMissing()) > 1 {
		why += fmt.Sprintf(" and %d more", len(n.GetMissing())-1)
	}
	if slices.ContainsFunc(r.GetFindings(), func(f *wire.Finding) bool {
		return f.GetError() != "" && f.GetAttestor() == m.GetSelector().GetType()
	}) {
		why += ", and the " + m.GetSelector().GetType() + " attestor failed"
	}
	if len(m.GetSimilar()) > 0 {
		why += ", and it has " + text(m.GetSimilar()[0])
	}
	return who + " gets no identity: " + why + "."
}

func (p *page) process(x *wire.Process, now time.Time) {
	p.line("  program    %s", orUnknown(x.GetExe(), "unknown (not readable)"))
	p.line("  user       uid %d, gid %d", x.GetUid(), x.GetGid())
	if x.GetNamespacePid() != 0 {
		p.line("  inside     PID %d of its own PID namespace", x.GetNamespacePid())
	}
	if c := x.GetContainer(); c != "" {
		others := ""
		if n := x.GetSiblings(); n > 0 {
			others = fmt.Sprintf(" (with %d other processes)", n)
		}
		p.line("  container  %s%s", c[:min(12, len(c))], others)
	}
	if x.GetCgroup() != "" {
		p.line("  cgroup     %s", x.GetCgroup())
	}
	if at := x.GetStartedAt(); at != 0 {
		p.line("  running    for %s", age(now.Sub(time.UnixMilli(at))))
	}
}

func (p *page) findings(r *wire.ExplainResponse) {
	if len(r.GetFindings()) == 0 {
		p.line("  nothing: this agent has no workload attestor configured")
	}
	for _, f := range r.GetFindings() {
		took := (time.Duration(f.GetTookUs()) * time.Microsecond).String()
		switch {
		case f.GetError() != "":
			p.line("  %-10s FAILED after %s: %s", f.GetAttestor(), took, f.GetError())
		case len(f.GetSelectors()) == 0:
			p.line("  %-10s nothing, in %s", f.GetAttestor(), took)
		default:
			p.line("  %-10s %s, in %s", f.GetAttestor(), count(len(f.GetSelectors()), "selector"), took)
		}
		for _, s := range f.GetSelectors() {
			p.line("      %s", text(s))
		}
	}
}

func (p *page) entry(e *wire.Entry) {
	more := ""
	if e.GetHint() != "" {
		more += fmt.Sprintf(", hint %q", e.GetHint())
	}
	if at := e.GetExpiresAt(); at != 0 {
		more += ", expires " + time.UnixMilli(at).UTC().Format(time.RFC3339)
	}
	p.line("    entry %s%s", e.GetId(), more)
}

// svid says what is held for an entry that matches.
func (p *page) svid(e *wire.Entry, a *wire.Agent, now time.Time) {
	if !handed(e) {
		return
	}
	var state string
	if at := e.GetSvidExpiresAt(); at != 0 {
		state = "valid for " + age(time.UnixMilli(at).Sub(now))
		if left := time.UnixMilli(at).Sub(now); left <= 0 {
			state = "EXPIRED " + age(-left) + " ago"
		}
	} else if e.GetSvidError() == "" && a.GetConnected() {
		state = "none held: signed when it is asked for"
	} else {
		state = "NONE held"
	}
	if e.GetSvidError() != "" {
		state += "; the last attempt failed: " + e.GetSvidError()
	}
	p.line("    X509-SVID %s", state)
}

func (p *page) near(n *wire.Near) {
	e := n.GetEntry()
	p.line("  %s", e.GetSpiffeId())
	p.entry(e)
	for _, s := range e.GetSelectors() {
		if !slices.ContainsFunc(n.GetMissing(), func(m *wire.Missing) bool { return text(m.GetSelector()) == text(s) }) {
			p.line("      has      %s", text(s))
		}
	}
	for _, m := range n.GetMissing() {
		p.line("      MISSING  %s", text(m.GetSelector()))
		for _, s := range m.GetSimilar() {
			p.line("        it has %s%s", text(s), difference(text(m.GetSelector()), text(s)))
		}
		if m.GetReason() != "" {
			p.line("        %s", m.GetReason())
		}
	}
}

// difference points out what is easily overlooked.
func difference(want, have string) string {
	switch {
	case strings.EqualFold(want, have):
		return "  (differs in upper and lower case)"
	case strings.TrimSpace(want) == strings.TrimSpace(have), strings.Join(strings.Fields(want), "") == strings.Join(strings.Fields(have), ""):
		return "  (differs in blanks)"
	}
	return ""
}

func (p *page) agent(a *wire.Agent, now time.Time) {
	since := func(ms int64) string { return age(now.Sub(time.UnixMilli(ms))) }
	if a.GetSpiffeId() != "" {
		p.line("  identity   %s", a.GetSpiffeId())
	} else {
		p.line("  identity   none yet")
	}
	if at := a.GetSvidExpiresAt(); at != 0 {
		left := time.UnixMilli(at).Sub(now)
		if left > 0 {
			p.line("  its SVID   valid for %s", age(left))
		} else {
			p.line("  its SVID   EXPIRED %s ago", age(-left))
		}
	}
	state := orUnknown(a.GetUplink(), "unknown")
	switch {
	case a.GetBanned():
		state = "BANNED by the server"
	case a.GetConnected():
		state = "connected (" + state + ")"
	default:
		state = "NOT CONNECTED (" + state + ")"
	}
	switch {
	case a.GetServer() == "":
	case a.GetBanned():
		state += " at " + a.GetServer()
	default:
		state += " to " + a.GetServer()
	}
	p.line("  server     %s", state)
	if a.GetLastError() != "" {
		when := ""
		if a.GetLastErrorAt() != 0 {
			when = " (" + since(a.GetLastErrorAt()) + " ago)"
		}
		p.line("  last error %s%s", a.GetLastError(), when)
	}
	behind := "up to date"
	if a.GetBanned() {
		behind = "emptied by the ban"
	} else if d := a.GetServerRev() - a.GetHeldRev(); d > 0 {
		behind = fmt.Sprintf("%d BEHIND the server's %d", d, a.GetServerRev())
	} else if !a.GetConnected() {
		behind = "the newest that was heard of"
	}
	p.line("  picture    revision %d, %s", a.GetHeldRev(), behind)
	if at := a.GetLastHeard(); at != 0 {
		p.line("  heard      %s ago", since(at))
	} else {
		p.line("  heard      never since the agent started")
	}
}

// wrapped writes a paragraph at most 100 columns wide. Commands stand on lines of their own, whole,
// so that they can be copied.
func (p *page) wrapped(lead, paragraph string) {
	const width = 100
	indent := strings.Repeat(" ", len(lead))
	words, command, rest := cutCommand(paragraph)
	line := lead
	flush := func() {
		if strings.TrimSpace(line) != "" {
			p.line("%s", line)
		}
		line = indent
	}
	add := func(words string) {
		for word := range strings.FieldsSeq(words) {
			if len(line)+len(word) > width && strings.TrimSpace(line) != "" {
				flush()
			}
			line += word + " "
		}
	}
	add(words)
	if command != "" {
		flush()
		p.line("%s  %s", indent, command)
		add(rest)
	}
	flush()
}

// cutCommand finds the command in an advice: from the program's name to the full stop that ends the
// sentence, which is not one inside quotes.
func cutCommand(s string) (before, command, after string) {
	i := strings.Index(s, "assay-server ")
	if i < 0 {
		return s, "", ""
	}
	before, command = s[:i], s[i:]
	quoted := false
	for j, r := range command {
		switch {
		case r == '\'':
			quoted = !quoted
		case r == '.' && !quoted && strings.HasPrefix(command[j:], ". "):
			return before, command[:j], command[j+2:]
		}
	}
	return before, command, ""
}

func text(s *wire.Selector) string { return s.GetType() + ":" + s.GetValue() }

func count(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}
