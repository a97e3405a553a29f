package admin

import (
	"cmp"
	"slices"
	"strings"

	"github.com/assay-id/assay/attestor"
)

// maxSimilar is how many near misses are shown for one selector.
const maxSimilar = 3

// maxDistance is how many typing mistakes make a near miss.
const maxDistance = 2

// podUID begins the value of the selector of type k8s that names one pod, which entries of pods have.
const podUID = "pod-uid:"

// ofAnotherPod reports whether a selector that a process lacks names another pod than the one it is in.
func ofAnotherPod(want attestor.Selector, facts attestor.Set) bool {
	return want.Type == "k8s" && strings.HasPrefix(want.Value, podUID) &&
		slices.ContainsFunc(facts.All(), func(s attestor.Selector) bool {
			return s.Type == want.Type && strings.HasPrefix(s.Value, podUID)
		})
}

// similar returns the selectors of a process that come close to one it lacks: the same name with
// another value (unix:uid), the same but for upper and lower case, or for a slip of the finger. The
// closest is first.
func similar(want attestor.Selector, facts attestor.Set) []attestor.Selector {
	type candidate struct {
		selector attestor.Selector
		distance int
	}
	var found []candidate
	wanted := split(want.Value)
	only := 0 // how many there are of the wanted kind, for example docker:image_id
	for _, have := range facts.All() {
		if have.Type == want.Type && split(have.Value)[0] == wanted[0] {
			only++
		}
	}
	for _, have := range facts.All() {
		if have.Type != want.Type {
			continue
		}
		parts := split(have.Value)
		distance := distance(want.Value, have.Value)
		switch {
		case strings.EqualFold(want.Value, have.Value):
			distance = 0
		case distance <= maxDistance && len(want.Value) > 2*maxDistance:
		case len(wanted) > 1 && common(wanted, parts) >= len(wanted)-1: // same name, another value
			distance += maxDistance
		case parts[0] == wanted[0] && only <= 2 && !keyed(wanted[0]):
			distance += 2 * maxDistance
		default:
			continue
		}
		found = append(found, candidate{have, distance})
	}
	slices.SortStableFunc(found, func(a, b candidate) int { return cmp.Compare(a.distance, b.distance) })
	out := make([]attestor.Selector, 0, maxSimilar)
	for _, c := range found[:min(len(found), maxSimilar)] {
		out = append(out, c.selector)
	}
	return out
}

// keyed reports whether selectors of this name have a key before their value, so that two of them
// need not be about the same thing: labels, tags, environment variables.
func keyed(name string) bool {
	return name == "env" || strings.Contains(name, "label") || strings.Contains(name, "tag")
}

// split cuts a selector's value into its names and the value proper: label:app:shop, env:MODE=prod.
func split(value string) []string {
	return strings.FieldsFunc(value+"\x00", func(r rune) bool { return r == ':' || r == '=' })
}

// common counts the leading parts that are equal.
func common(a, b []string) int {
	n := 0
	for n < len(a) && n < len(b) && a[n] == b[n] {
		n++
	}
	return n
}

// distance is the number of characters to add, drop, change or swap with their neighbor to make
// one of the other, for texts short enough to be typed; otherwise it is large.
func distance(a, b string) int {
	const longest = 200
	if len(a) > longest || len(b) > longest {
		return longest
	}
	x, y := []rune(a), []rune(b)
	if d := len(x) - len(y); d > 20 || d < -20 {
		return longest
	}
	rows := [3][]int{make([]int, len(y)+1), make([]int, len(y)+1), make([]int, len(y)+1)}
	older, old, now := rows[0], rows[1], rows[2]
	for j := range old {
		old[j] = j
	}
	for i := 1; i <= len(x); i++ {
		now[0] = i
		for j := 1; j <= len(y); j++ {
			change := 1
			if x[i-1] == y[j-1] {
				change = 0
			}
			now[j] = min(old[j]+1, now[j-1]+1, old[j-1]+change)
			if i > 1 && j > 1 && x[i-1] == y[j-2] && x[i-2] == y[j-1] {
				now[j] = min(now[j], older[j-2]+1)
			}
		}
		older, old, now = old, now, older
	}
	return old[len(y)]
}
