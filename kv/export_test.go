package kv

import "time"

// SetStep calls f before each irreversible step of a directory's commits.
func SetStep(s Store, f func(name string)) { s.(*dirStore).step = f }

// SetEarlierAfter says when a presence ends what earlier processes of its name left.
func SetEarlierAfter(s Store, d time.Duration) { s.(*consulStore).earlierAfter = d }
