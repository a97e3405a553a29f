package report

// Top checks a document as Parse does (syntax, size, depth, duplicate keys) and returns the members of its
// outermost object by their exact keys, none for a document that is no object. Values lie in data, which
// must not be changed, and are checked with it.
func Top(data []byte) (map[string][]byte, error) {
	all, err := check(data)
	if err != nil {
		return nil, err
	}
	top := make(map[string][]byte, len(all))
	for _, m := range all {
		top[m.key] = m.value
	}
	return top, nil
}
