package policy

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/assay-id/assay/conf"
	"github.com/assay-id/assay/server/verdict/report"
)

// Block is scan_policy "name" { … } as it stands in the file. The tags are gohcl's.
type Block struct {
	Name          string     `hcl:"name,label"`
	Mode          string     `hcl:"mode,optional"`
	Sources       []string   `hcl:"sources,optional"`
	MinSources    *int       `hcl:"min_sources,optional"`
	AllowUnsigned bool       `hcl:"allow_unsigned,optional"`
	MaxAge        string     `hcl:"max_age,optional"`
	MaxDBAge      string     `hcl:"max_db_age,optional"`
	RequireDBTime bool       `hcl:"require_db_time,optional"`
	FeedMaxAge    string     `hcl:"feed_max_age,optional"`
	Fail          []Fails    `hcl:"fail,block"`
	UnknownAs     string     `hcl:"unknown_as,optional"`
	OnMissing     string     `hcl:"on_missing,optional"`
	OnStale       string     `hcl:"on_stale,optional"`
	OnError       string     `hcl:"on_error,optional"`
	Grace         []Graces   `hcl:"grace,block"`
	VEX           *Vexes     `hcl:"vex,block"`
	TrustScanner  bool       `hcl:"trust_scanner_suppressions,optional"`
	AllowEmpty    bool       `hcl:"allow_empty,optional"`
	AllowIndex    bool       `hcl:"allow_index_match,optional"`
	OnFail        string     `hcl:"on_fail,optional"`
	BlastGuard    *Blasts    `hcl:"blast_guard,block"`
	SVIDTTLMax    string     `hcl:"svid_ttl_max,optional"`
	JWTTTLMax     string     `hcl:"jwt_ttl_max,optional"`
	ExceptionMax  string     `hcl:"exception_max_age,optional"`
	EPSSBelow     *[]float64 `hcl:"epss_below,optional"`
}

// Fails is a fail block, Graces a grace block, Vexes the vex block and Blasts the blast_guard block.
type (
	Fails struct {
		Severity  string   `hcl:"severity,optional"`
		OnlyFixed bool     `hcl:"only_fixed,optional"`
		KEV       bool     `hcl:"kev,optional"`
		EPSS      *float64 `hcl:"epss,optional"`
	}
	Graces struct {
		Severity string `hcl:"severity,optional"`
		For      string `hcl:"for,optional"`
	}
	Vexes struct {
		Trust                []string `hcl:"trust,optional"`
		Accept               []string `hcl:"accept,optional"`
		RequireJustification *bool    `hcl:"require_justification,optional"`
		MaxAge               string   `hcl:"max_age,optional"`
		AnyImage             bool     `hcl:"any_image,optional"`
	}
	Blasts struct {
		MaxFraction  *float64 `hcl:"max_fraction,optional"`
		Window       string   `hcl:"window,optional"`
		MinWorkloads *int     `hcl:"min_workloads,optional"`
	}
)

// How long identities behind a gate live at most where no policy says it: so long does one last that could
// not be taken back.
const (
	DefaultSVIDTTL = 10 * time.Minute
	DefaultJWTTTL  = 2 * time.Minute
)

// Defaults of the vex and blast_guard blocks; without the block there is neither.
const (
	defaultVEXMaxAge    = 90 * day
	defaultMaxFraction  = 0.2
	defaultBlastWindow  = 5 * time.Minute
	defaultMinWorkloads = 10
)

const day = 24 * time.Hour

// defaults is a policy in which every key has its default. Wanting evidence is denied, nothing has
// grace, and nobody's word but a named source's counts.
func defaults() *ScanPolicy {
	return &ScanPolicy{
		Mode:            Enforce,
		MinSources:      1,
		MaxAge:          24 * time.Hour,
		MaxDBAge:        48 * time.Hour,
		FeedMaxAge:      72 * time.Hour,
		Fail:            []FailRule{{Severity: report.Critical}},
		UnknownAs:       report.High,
		OnMissing:       Otherwise{Action: Deny},
		OnStale:         Otherwise{Action: Deny},
		OnError:         Otherwise{Action: Deny},
		OnFail:          Withdraw,
		SVIDTTLMax:      DefaultSVIDTTL,
		JWTTTLMax:       DefaultJWTTTL,
		ExceptionMaxAge: 90 * day,
		EPSSBelow:       []float64{0.1, 0.5},
	}
}

// compiler collects problems and goes on.
type compiler struct {
	prefix   string
	nth      int
	problems []conf.KeyProblem
}

func (c *compiler) say(field, format string, args ...any) {
	field = strings.TrimSuffix(c.prefix+field, ".")
	c.problems = append(c.problems, conf.KeyProblem{Field: field, Nth: c.nth, Text: fmt.Sprintf(format, args...)})
}

// in runs do for a block, in whose name it complains.
func (c *compiler) in(block string, nth int, do func()) {
	c.prefix, c.nth = block+".", nth
	do()
	c.prefix, c.nth = "", 0
}

// A policy's name is part of selectors, where a colon parts it from what follows.
var nameForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)

// New checks a block and returns the policy, or every problem that the block has.
func New(b Block) (*ScanPolicy, []conf.KeyProblem) {
	p, c := defaults(), &compiler{}
	p.Name = b.Name
	if !nameForm.MatchString(b.Name) {
		c.say("name", "%q cannot be a policy's name: use 1 to 64 letters, digits, dots, dashes and underscores, beginning with a letter or a digit.", b.Name)
	}
	p.Mode = oneOf(c, "mode", b.Mode, p.Mode, Enforce, Audit, Off)
	c.sources(p, &b)
	p.AllowUnsigned = b.AllowUnsigned
	p.MaxAge = c.duration("max_age", b.MaxAge, p.MaxAge, time.Minute, 366*day)
	p.MaxDBAge = c.duration("max_db_age", b.MaxDBAge, p.MaxDBAge, time.Minute, 366*day)
	p.RequireDBTime = b.RequireDBTime
	p.FeedMaxAge = c.duration("feed_max_age", b.FeedMaxAge, p.FeedMaxAge, time.Minute, 366*day)
	if len(b.Fail) > 0 {
		p.Fail = nil
	}
	for i, f := range b.Fail {
		c.in("fail", i+1, func() { c.fail(p, f) })
	}
	p.UnknownAs = c.severity("unknown_as", b.UnknownAs, p.UnknownAs)
	p.OnMissing = c.otherwise("on_missing", b.OnMissing, p.OnMissing)
	p.OnStale = c.otherwise("on_stale", b.OnStale, p.OnStale)
	p.OnError = c.otherwise("on_error", b.OnError, p.OnError)
	c.graces(p, b.Grace)
	if b.VEX != nil {
		c.in("vex", 0, func() { c.vex(p, b.VEX) })
	}
	p.TrustScannerSuppressions, p.AllowEmpty, p.AllowIndexMatch = b.TrustScanner, b.AllowEmpty, b.AllowIndex
	p.OnFail = oneOf(c, "on_fail", b.OnFail, p.OnFail, Withdraw, Quarantine, Revoke)
	if b.BlastGuard != nil {
		c.in("blast_guard", 0, func() { c.blast(p, b.BlastGuard) })
	}
	p.SVIDTTLMax = c.duration("svid_ttl_max", b.SVIDTTLMax, p.SVIDTTLMax, time.Minute, day)
	p.JWTTTLMax = c.duration("jwt_ttl_max", b.JWTTTLMax, p.JWTTTLMax, time.Second, day)
	p.ExceptionMaxAge = c.duration("exception_max_age", b.ExceptionMax, p.ExceptionMaxAge, time.Minute, 366*day)
	c.thresholds(p, b.EPSSBelow)
	if len(c.problems) > 0 {
		return nil, c.problems
	}
	p.words = newWords(p)
	return p, nil
}

func (c *compiler) sources(p *ScanPolicy, b *Block) {
	p.Sources = slices.Clone(b.Sources)
	slices.Sort(p.Sources)
	switch {
	case len(b.Sources) == 0:
		c.say("sources", "name at least one trust policy whose reports count, for without one nobody can clear an image.")
	case slices.Contains(b.Sources, ""):
		c.say("sources", "an empty name is no source.")
	case len(slices.Compact(p.Sources)) != len(b.Sources):
		c.say("sources", "a source is named twice; name each once.")
	}
	if b.MinSources == nil {
		return
	}
	p.MinSources = *b.MinSources
	switch {
	case p.MinSources < 1:
		c.say("min_sources", "%d is too few: at least 1 source must clear an image.", p.MinSources)
	case len(b.Sources) > 0 && p.MinSources > len(b.Sources):
		c.say("min_sources", "%d can never be reached, for sources names %d.", p.MinSources, len(b.Sources))
	}
}

func (c *compiler) fail(p *ScanPolicy, f Fails) {
	rule := FailRule{OnlyFixed: f.OnlyFixed, KEV: f.KEV}
	rule.Severity = c.severity("severity", f.Severity, report.Unknown)
	if f.EPSS != nil {
		rule.EPSS = *f.EPSS
		// Written so that what is no number is refused too.
		if !(rule.EPSS > 0 && rule.EPSS <= 1) {
			c.say("epss", "%v is no probability to fail at: write a number above 0, up to 1.", rule.EPSS)
		}
	}
	if f == (Fails{}) {
		c.say("", "the block asks for nothing; give it severity, only_fixed, kev or epss, or leave it out.")
	}
	p.Fail = append(p.Fail, rule)
}

func (c *compiler) graces(p *ScanPolicy, blocks []Graces) {
	var seen [report.Critical + 1]bool
	before := len(c.problems)
	defer func() {
		if len(c.problems) == before {
			c.fairGraces(p, blocks)
		}
	}()
	for i, g := range blocks {
		c.in("grace", i+1, func() {
			s := c.severity("severity", g.Severity, report.Unknown)
			if g.Severity == "" {
				c.say("severity", "%s", "the grace of which severity? Write one of "+severityList+".")
			} else if seen[s] && s != report.Unknown {
				c.say("severity", "%q has a grace block already; keep one.", g.Severity)
			}
			seen[s] = true
			if g.For == "" {
				c.say("for", "for how long? Write a length of time, as in \"72h\", or \"0s\" for none.")
			}
			p.Grace[s] = c.duration("for", g.For, 0, 0, 366*day)
		})
	}
	p.Grace[report.Unknown] = 0 // Unknown counts as unknown_as says, for grace too
}

// fairGraces refuses a worse finding a longer grace than a lesser one: what is found out to be worse than it was
// thought to be would be let be for longer. A severity without a block has none, which is what those have that no
// rule is about.
func (c *compiler) fairGraces(p *ScanPolicy, blocks []Graces) {
	for i, worse := range blocks {
		s := c.severity("severity", worse.Severity, report.Unknown)
		for _, lesser := range blocks {
			if t := c.severity("severity", lesser.Severity, report.Unknown); t < s && p.Grace[t] < p.Grace[s] {
				c.in("grace", i+1, func() {
					c.say("for", "%q findings have %s, and %q ones, which are lesser, only %s; give the worse no longer than the lesser.",
						worse.Severity, length(p.Grace[s]), lesser.Severity, length(p.Grace[t]))
				})
				break
			}
		}
	}
}

func (c *compiler) vex(p *ScanPolicy, b *Vexes) {
	p.VEX = VEXRule{Trust: slices.Clone(b.Trust), Accept: slices.Clone(b.Accept), RequireJustification: true, AnyImage: b.AnyImage}
	if len(b.Trust) == 0 || slices.Contains(b.Trust, "") {
		c.say("trust", "name the trust policies whose statements count, or leave the vex block out.")
	}
	if len(b.Accept) == 0 {
		p.VEX.Accept = []string{"not_affected", "fixed"}
	}
	for _, status := range b.Accept {
		if status != "not_affected" && status != "fixed" {
			c.say("accept", "%q does not take a finding off; there are \"not_affected\" and \"fixed\".", status)
		}
	}
	if b.RequireJustification != nil {
		p.VEX.RequireJustification = *b.RequireJustification
	}
	p.VEX.MaxAge = c.duration("max_age", b.MaxAge, defaultVEXMaxAge, time.Minute, 3660*day)
}

func (c *compiler) blast(p *ScanPolicy, b *Blasts) {
	g := BlastGuard{MaxFraction: defaultMaxFraction, MinWorkloads: defaultMinWorkloads}
	if b.MaxFraction != nil {
		g.MaxFraction = *b.MaxFraction
		if !(g.MaxFraction > 0 && g.MaxFraction <= 1) {
			c.say("max_fraction", "%v is no part of a whole: write a number above 0, up to 1.", g.MaxFraction)
		}
	}
	if b.MinWorkloads != nil {
		g.MinWorkloads = *b.MinWorkloads
		if g.MinWorkloads < 0 {
			c.say("min_workloads", "%d is negative; write how many workloads may always be withdrawn, 0 for none.", g.MinWorkloads)
		}
	}
	g.Window = c.duration("window", b.Window, defaultBlastWindow, time.Second, 7*day)
	p.Blast = g
}

func (c *compiler) thresholds(p *ScanPolicy, given *[]float64) {
	if given == nil {
		return
	}
	p.EPSSBelow = slices.Clone(*given)
	slices.Sort(p.EPSSBelow)
	p.EPSSBelow = slices.Compact(p.EPSSBelow)
	if len(p.EPSSBelow) > 16 {
		c.say("epss_below", "%d thresholds are too many: 16 at most.", len(p.EPSSBelow))
	}
	for _, t := range p.EPSSBelow {
		if !(t > 0 && t <= 1) {
			c.say("epss_below", "%v is no probability: write numbers above 0, up to 1.", t)
		}
	}
}

// severityWords are the severities a policy may speak of, the worst first.
var severityWords = []string{"critical", "high", "medium", "low", "negligible"}

const severityList = `"critical", "high", "medium", "low" and "negligible"`

func (c *compiler) severity(field, text string, byDefault report.Severity) report.Severity {
	if text == "" {
		return byDefault
	}
	i := slices.Index(severityWords, text)
	if i < 0 {
		c.say(field, "%q is no severity; there are %s.", text, severityList)
		return byDefault
	}
	return report.Critical - report.Severity(i)
}

func (c *compiler) otherwise(field, text string, byDefault Otherwise) Otherwise {
	switch {
	case text == "":
		return byDefault
	case text == string(Deny), text == string(Allow):
		return Otherwise{Action: Action(text)}
	}
	length, found := strings.CutPrefix(text, "grace:")
	if !found || length == "" {
		c.say(field, "%q is unknown; there are \"deny\", \"allow\" and, with a length of time, \"grace:15m\".", text)
		return byDefault
	}
	return Otherwise{Action: GraceFirst, For: c.duration(field, length, 0, time.Second, 366*day)}
}

// duration reads what time.ParseDuration does, and days: "90d".
func (c *compiler) duration(field, text string, byDefault, low, high time.Duration) time.Duration {
	if text == "" {
		return byDefault
	}
	d, err := parseDuration(text)
	switch {
	case err != nil:
		c.say(field, "%q is no length of time: write a number and a unit, as in \"90s\", \"15m\", \"24h\" or \"90d\".", text)
	case d < 0:
		c.say(field, "%q is negative.", text)
	case d < low:
		c.say(field, "%q is too short: it must be at least %s.", text, length(low))
	case d > high:
		c.say(field, "%q is too long: it must be at most %s.", text, length(high))
	default:
		return d
	}
	return byDefault
}

func parseDuration(text string) (time.Duration, error) {
	days, found := strings.CutSuffix(text, "d")
	if !found {
		return time.ParseDuration(text)
	}
	// Read as hours, so that one parser knows what a number is and where it overflows.
	d, err := time.ParseDuration(days + "h")
	if err != nil {
		return 0, err
	}
	if d > 1<<62/24 || d < -(1<<62/24) {
		return 0, fmt.Errorf("duration %s is too long", text)
	}
	return d * 24, nil
}

func oneOf[T ~string](c *compiler, field, text string, byDefault T, allowed ...T) T {
	if text == "" {
		return byDefault
	}
	if slices.Contains(allowed, T(text)) {
		return T(text)
	}
	quoted := make([]string, len(allowed))
	for i, a := range allowed {
		quoted[i] = `"` + string(a) + `"`
	}
	c.say(field, "%q is unknown; there are %s.", text, strings.Join(quoted, ", "))
	return byDefault
}

// length writes a duration as an operator would: 24h, 15m, 90d.
func length(d time.Duration) string {
	if d >= 2*day && d%day == 0 {
		return fmt.Sprintf("%dd", d/day)
	}
	text := d.String()
	if strings.HasSuffix(text, "m0s") {
		text = strings.TrimSuffix(text, "0s")
	}
	if strings.HasSuffix(text, "h0m") {
		text = strings.TrimSuffix(text, "0m")
	}
	return text
}
