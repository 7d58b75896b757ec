package dir

// SetStep calls f before each irreversible step of a store's commits.
func SetStep(s *Store, f func(name string)) { s.step = f }
