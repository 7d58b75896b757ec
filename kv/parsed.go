package kv

import "bytes"

// Parsed caches the parsed values of a watch, by key, so that each view parses only the values that changed. A token
// can write keys by the ten thousand, and each change of one brings them all. The zero value is ready.
type Parsed[T any] map[string]*parsedValue[T] // references, as each view makes another map

type parsedValue[T any] struct {
	value  []byte
	result T
	err    error
}

// Next returns a parser for the entries of the watch's next view, and the map that it fills. size is about how many
// entries there are. Keys that the parser isn't called for are dropped.
func (p Parsed[T]) Next(size int, parse func(value []byte) (T, error)) (Parsed[T], func(Entry) (T, error)) {
	next := make(Parsed[T], size)
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
