package api

import (
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/view"
	"github.com/assay-id/assay/server/wire/terms"
	"github.com/assay-id/assay/workloadapi/identity"
)

func TestWhatIsPermitted(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	s := &svidService{api: &API{cfg: Config{Now: func() time.Time { return now }}}}
	in := func(d time.Duration) *identity.Entry { return &identity.Entry{ID: "a", ExpiresAt: now.Add(d)} }

	t.Run("an entry of the picture, until the second in which it expires, whatever the picture says", func(t *testing.T) {
		for name, c := range map[string]struct {
			entry *identity.Entry
			want  bool
		}{
			"one that does not expire":       {&identity.Entry{ID: "a"}, true},
			"one with two seconds left":      {in(2 * time.Second), true},
			"one with half a second left":    {in(500 * time.Millisecond), false},
			"one that expires now":           {in(0), false},
			"one that has expired":           {in(-time.Minute), false},
			"one that is not of the picture": {&identity.Entry{ID: "b"}, false},
		} {
			if _, ok := s.authorized(&view.AgentPicture{Entries: []*identity.Entry{c.entry}}, "a"); ok != c.want {
				t.Errorf("%s is authorized: %t", name, ok)
			}
		}
	})
	t.Run("what is signed lives no longer than its entry and the verdicts", func(t *testing.T) {
		for _, c := range []struct{ entry, grant, want time.Duration }{ // 0: without an end
			{0, 0, 0}, {0, time.Hour, time.Hour}, {time.Hour, 0, time.Hour}, {time.Hour, time.Minute, time.Minute}, {time.Minute, time.Hour, time.Minute},
		} {
			p := &permitted{entry: &identity.Entry{}}
			if c.entry > 0 {
				p.entry.ExpiresAt = now.Add(c.entry)
			}
			if got := p.most(c.grant, now); got != c.want {
				t.Errorf("of an entry for %s and verdicts for %s: %s, want %s", c.entry, c.grant, got, c.want)
			}
		}
	})
	t.Run("what the agent goes by is what holds now", func(t *testing.T) {
		p := &permitted{entry: &identity.Entry{ID: "a", Revision: 3}}
		picture := &view.AgentPicture{Verdicts: []*records.Verdict{{Digest: "one", Seq: 5}, {Digest: "two", Seq: 7}}}
		by := func(rev int64, verdicts ...terms.Verdict) *terms.Item {
			return &terms.Item{Revision: rev, Verdicts: verdicts}
		}
		for name, c := range map[string]struct {
			by   *terms.Item
			want bool
		}{
			"nothing":                        {nil, true},
			"the revision":                   {by(3), true},
			"an earlier revision":            {by(2), false},
			"a later revision":               {by(4), false},
			"both verdicts":                  {by(3, terms.Verdict{Digest: "two", Seq: 7}, terms.Verdict{Digest: "one", Seq: 5}), true},
			"an earlier verdict":             {by(3, terms.Verdict{Digest: "one", Seq: 4}), false},
			"a later verdict":                {by(3, terms.Verdict{Digest: "one", Seq: 6}), false},
			"a verdict on another image":     {by(3, terms.Verdict{Digest: "three", Seq: 5}), false},
			"a good one, and an earlier one": {by(3, terms.Verdict{Digest: "one", Seq: 5}, terms.Verdict{Digest: "two", Seq: 6}), false},
			"an earlier revision, good ones": {by(2, terms.Verdict{Digest: "one", Seq: 5}), false},
		} {
			if err := p.agrees(picture, c.by); (err == nil) != c.want || err != nil && status.Code(err) != codes.FailedPrecondition {
				t.Errorf("who goes by %s gets %v", name, err)
			}
		}
	})
}
