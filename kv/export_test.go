package kv

// SetStep calls f before each irreversible step of a directory's commits.
func SetStep(s Store, f func(name string)) { s.(*dirStore).step = f }
