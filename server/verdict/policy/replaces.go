package policy

import (
	"errors"
	"fmt"
	"slices"

	"github.com/assay-id/assay/server/verdict/report"
)

// Why a report does not take the place of another; tell them apart with errors.Is.
var (
	// ErrIdentical: it is the very report that is there. Taking it in again changes nothing, and is no
	// mistake of who pushes it.
	ErrIdentical = errors.New("the same report")
	// ErrOlder: its evidence is not later than what is there: a replay, or a late delivery.
	ErrOlder = errors.New("not later than the report in force")
	// ErrOlderDB: its vulnerability database is older, or it hides how old it is.
	ErrOlderDB = errors.New("from an older vulnerability database")
	// ErrFuture: it says that it was made later than it came.
	ErrFuture = errors.New("from the future")
	// ErrWeaker: it is less sound than what is there (filtered, no packages, no time).
	ErrWeaker = errors.New("less sound than the report in force")
	// ErrHold: so many packages are gone that an operator has to say whether that can be.
	ErrHold = errors.New("held for an operator")
	// ErrOtherSource: it is of another source, and stands beside the other.
	ErrOtherSource = errors.New("of another source")
)

// Replaces says whether a new report of an image may take the place of the old one of the same source:
// nil, or an error that wraps one of the above and says more. The old one stays in force then. An
// operator who releases a held report (ErrHold) puts it in force without asking here again.
//
// Nothing in it depends on the time of asking, so that a replay is refused in a hundred years too, as
// long as the old report is remembered.
func Replaces(old, next SourcedReport) error {
	if old.Report == nil || next.Report == nil {
		return fmt.Errorf("replace report: %w: there is none", ErrWeaker)
	}
	if next.Hash != "" && next.Hash == old.Hash {
		return fmt.Errorf("replace report: %w", ErrIdentical)
	}
	if !sameSource(&old, &next) {
		return fmt.Errorf("replace report of %s by one of %s: %w", label(&old), label(&next), ErrOtherSource)
	}
	wrap := func(err error, format string, args ...any) error {
		return fmt.Errorf("replace report of %s: %w: %s", label(&old), err, fmt.Sprintf(format, args...))
	}
	o, n := old.Report, next.Report
	for _, t := range []struct {
		what string
		late bool
	}{
		{"scan", n.ScannedAt.After(next.ReceivedAt.Add(Skew))},
		{"database", n.DBAt.After(next.ReceivedAt.Add(Skew))},
		{"signature", next.VerifiedAt.After(next.ReceivedAt.Add(Skew))},
	} {
		if t.late && !next.ReceivedAt.IsZero() {
			return wrap(ErrFuture, "its %s is of a time after it came, at %s", t.what, stamp(next.ReceivedAt))
		}
	}
	if n.ScannedAt.IsZero() && !o.ScannedAt.IsZero() {
		return wrap(ErrWeaker, "it does not say when it was made, as the one in force does")
	}
	if was, is := timeOf(&old), timeOf(&next); !is.After(was) {
		return wrap(ErrOlder, "its evidence is of %s, that in force of %s", stamp(is), stamp(was))
	}
	switch same := o.Scanner == n.Scanner; {
	case o.DBAt.IsZero():
	case n.DBAt.IsZero() && same:
		return wrap(ErrOlderDB, "it does not say how old its database is, as the one in force does")
	case !n.DBAt.IsZero() && n.DBAt.Before(o.DBAt):
		return wrap(ErrOlderDB, "its database is of %s, that of the one in force of %s", stamp(n.DBAt), stamp(o.DBAt))
	}
	for _, flaw := range n.Flaws {
		// An end of support comes by itself: it is news, not a trick.
		if flaw != report.FlawEOSL && !slices.Contains(o.Flaws, flaw) {
			return wrap(ErrWeaker, "it has the flaw %q, which the one in force has not", flaw)
		}
	}
	if o.Packages > 0 && n.Packages > 0 && n.Packages < o.Packages-n.Packages {
		return wrap(ErrHold, "it looked at %d packages, the one in force at %d", n.Packages, o.Packages)
	}
	return nil
}
