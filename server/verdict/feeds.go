package verdict

import (
	"bufio"
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/records/stored"
	"github.com/assay-id/assay/server/verdict/policy"
)

// feeds are the files with what the world says of vulnerabilities, as they were read last.
type feeds struct {
	now       policy.Feeds
	kev, epss seenFile
}

// seenFile tells whether a file is another one than before.
type seenFile struct {
	path string
	size int64
	time time.Time
}

// maxFeed is several times what the feeds have.
const maxFeed = 256 << 20

// defaultFeedEvery is how often files are looked at where the rules do not say.
const defaultFeedEvery = time.Minute

// watchFeeds reads the feeds again when their files have changed, and judges everything anew then.
func (s *Service) watchFeeds(ctx context.Context) {
	for ctx.Err() == nil {
		s.mu.Lock()
		if s.readFeeds() {
			if err := s.evaluate(ctx, "feed", s.all()); err != nil && ctx.Err() == nil {
				s.cfg.Log.WithError(err).Error("cannot write verdicts after a feed has changed")
			}
		}
		s.staleFeeds(ctx)
		every := cmp.Or(s.rules.FeedEvery, defaultFeedEvery)
		s.mu.Unlock()
		timer := time.NewTimer(every)
		select {
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
	}
}

// readFeeds reads the files that have changed and reports whether any has. One that cannot be read
// leaves what was known: its age speaks for itself. mu is held.
func (s *Service) readFeeds() (changed bool) {
	for _, f := range []struct {
		name, path string
		seen       *seenFile
		read       func([]byte, time.Time) error
		forget     func()
	}{
		{"KEV", s.rules.KEVPath, &s.feeds.kev, s.readKEV, func() { s.feeds.now.KEV, s.feeds.now.KEVAt = nil, time.Time{} }},
		{"EPSS", s.rules.EPSSPath, &s.feeds.epss, s.readEPSS, func() { s.feeds.now.EPSS, s.feeds.now.EPSSAt = nil, time.Time{} }},
	} {
		if f.path == "" {
			if f.seen.path != "" {
				f.forget()
				*f.seen, changed = seenFile{}, true
			}
			continue
		}
		info, err := os.Stat(f.path)
		if err == nil {
			now := seenFile{path: f.path, size: info.Size(), time: info.ModTime()}
			if now == *f.seen {
				continue
			}
			var content []byte
			if content, err = readWhole(f.path); err == nil {
				if err = f.read(content, info.ModTime()); err == nil {
					*f.seen, changed = now, true
				}
			}
		}
		if err != nil {
			s.cfg.Log.WithError(err).WithField("feed", f.name).Warn("cannot read a vulnerability feed, going on with what was known")
		}
	}
	return changed
}

func readWhole(path string) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read feed: %w", err)
	}
	defer func() { _ = file.Close() }()
	buffered := bufio.NewReader(file)
	var r io.Reader = buffered
	if magic, err := buffered.Peek(2); err == nil && bytes.Equal(magic, []byte{0x1f, 0x8b}) {
		if r, err = gzip.NewReader(buffered); err != nil {
			return nil, fmt.Errorf("read feed %s: %w", path, err)
		}
	}
	content, err := io.ReadAll(io.LimitReader(r, maxFeed+1))
	if err != nil {
		return nil, fmt.Errorf("read feed %s: %w", path, err)
	}
	if len(content) > maxFeed {
		return nil, fmt.Errorf("read feed %s: it is larger than %d bytes", path, maxFeed)
	}
	return content, nil
}

// readKEV reads CISA's catalogue of known exploited vulnerabilities.
func (s *Service) readKEV(content []byte, modified time.Time) error {
	kev, at, err := parseKEV(content)
	if err != nil {
		return err
	}
	s.feeds.now.KEV, s.feeds.now.KEVAt = kev, earlierOf(at, modified)
	s.m.feedAge.WithLabelValues("kev").Set(float64(s.feeds.now.KEVAt.Unix()))
	return nil
}

func parseKEV(content []byte) (map[string]bool, time.Time, error) {
	var file struct {
		Released        string `json:"dateReleased"`
		Vulnerabilities []struct {
			ID string `json:"cveID"`
		} `json:"vulnerabilities"`
	}
	if err := json.Unmarshal(content, &file); err != nil {
		return nil, time.Time{}, fmt.Errorf("read KEV catalogue: %w", err)
	}
	kev := make(map[string]bool, len(file.Vulnerabilities))
	for _, v := range file.Vulnerabilities {
		if id := strings.ToUpper(strings.TrimSpace(v.ID)); id != "" {
			kev[id] = true
		}
	}
	if len(kev) == 0 {
		return nil, time.Time{}, errors.New("read KEV catalogue: it names no vulnerability, which cannot be")
	}
	at, _ := time.Parse(time.RFC3339, file.Released) // zero if it does not say
	return kev, at, nil
}

// readEPSS reads FIRST's scores: a comment with the date, a header, and cve,epss,percentile.
func (s *Service) readEPSS(content []byte, modified time.Time) error {
	epss, at, err := parseEPSS(content)
	if err != nil {
		return err
	}
	s.feeds.now.EPSS, s.feeds.now.EPSSAt = epss, earlierOf(at, modified)
	s.m.feedAge.WithLabelValues("epss").Set(float64(s.feeds.now.EPSSAt.Unix()))
	return nil
}

func parseEPSS(content []byte) (map[string]float64, time.Time, error) {
	epss := map[string]float64{}
	var at time.Time
	lines := bufio.NewScanner(bytes.NewReader(content))
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if _, date, ok := strings.Cut(line, "score_date:"); ok && strings.HasPrefix(line, "#") {
			for _, form := range []string{"2006-01-02T15:04:05-0700", time.RFC3339, "2006-01-02"} {
				if t, err := time.Parse(form, date); err == nil {
					at = t
					break
				}
			}
			continue
		}
		if line == "" || strings.HasPrefix(line, "#") || strings.HasPrefix(line, "cve,") {
			continue
		}
		id, rest, ok := strings.Cut(line, ",")
		score, _, _ := strings.Cut(rest, ",")
		p, err := strconv.ParseFloat(score, 64)
		if id = strings.ToUpper(strings.TrimSpace(id)); !ok || id == "" || err != nil || !(p >= 0 && p <= 1) {
			return nil, time.Time{}, fmt.Errorf("read EPSS scores: line %d is not cve,epss,percentile", n)
		}
		epss[id] = p
	}
	if err := lines.Err(); err != nil {
		return nil, time.Time{}, fmt.Errorf("read EPSS scores: %w", err)
	}
	if len(epss) == 0 {
		return nil, time.Time{}, errors.New("read EPSS scores: there are none, which cannot be")
	}
	return epss, at, nil
}

// earlierOf is when a feed's content is from: what it says itself, and never later than its file.
func earlierOf(said, modified time.Time) time.Time {
	if said.IsZero() || modified.Before(said) {
		return modified
	}
	return said
}

// feedGuard and a feed's name is where it is kept that the feed was told to be stale, beside the guards of
// policies: no policy has a colon in its name.
const feedGuard = "feed:"

// staleFeeds tells once of a feed that has become too old for a policy. mu is held.
func (s *Service) staleFeeds(ctx context.Context) {
	now := s.cfg.Now()
	for _, f := range []struct {
		name, path string
		at         time.Time
	}{{"KEV", s.rules.KEVPath, s.feeds.now.KEVAt}, {"EPSS", s.rules.EPSSPath, s.feeds.now.EPSSAt}} {
		oldest := time.Duration(0)
		for _, p := range s.rules.Policies {
			oldest = stricter(oldest, p.FeedMaxAge)
		}
		stale := f.path != "" && oldest > 0 && now.Sub(f.at) > oldest
		told := feedGuard + f.name
		if stale == (s.state.guards[told] != nil) {
			continue
		}
		change := records.EvidenceChange{Guards: map[string]*stored.EvidenceGuard{told: nil}}
		delete(s.state.guards, told)
		if stale {
			change.Guards[told] = &stored.EvidenceGuard{TrippedAt: nanos(now)}
			s.state.guards[told] = change.Guards[told]
			e := event{Type: eventFeed, Reason: fmt.Sprintf("the %s feed is of %s, older than feed_max_age %s", f.name, f.at.UTC().Format(time.RFC3339), oldest)}
			s.alert(&change, e, "feed", now)
			s.cfg.Log.WithField("feed", f.name).Warn("A vulnerability feed is too old to clear findings")
		}
		if err := s.Store.WriteEvidence(ctx, change); err != nil && ctx.Err() == nil {
			s.cfg.Log.WithError(err).Error("cannot keep an alert")
		}
	}
}
