package kv

import "bytes"

// ParseCache caches the parsed values of a watch, by key, so that each view parses only the values
// that changed. A change of one key brings a view of all, and whoever may write keys can write tens
// of thousands. The zero value is ready.
type ParseCache[T any] map[string]*parsedValue[T] // references, as each view makes another map

type parsedValue[T any] struct {
	value  []byte
	result T
	err    error
}

// Next returns the cache for the watch's next view, and a function that parses an entry of that view with parse and
// caches it. For an unchanged value the function returns the earlier result or error. size is about how many entries
// the view has. The new cache lacks keys for which the function isn't called.
func (p ParseCache[T]) Next(size int, parse func(value []byte) (T, error)) (ParseCache[T], func(Entry) (T, error)) {
	next := make(ParseCache[T], size)
	return next, func(e Entry) (T, error) {
		now := p[e.Key]
		if now == nil || !bytes.Equal(now.value, e.Value) {
			now = &parsedValue[T]{value: e.Value}
			now.result, now.err = parse(e.Value)
		}
		next[e.Key] = now
		return now.result, now.err
	}
}
