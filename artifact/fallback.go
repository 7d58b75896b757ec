package artifact

import "sync"

// fallBack logs why the fetch needs more bytes than it should, once per fetch and message. Not safe for concurrent use.
func (f *fetch) fallBack(why string, args ...any) {
	if f.log == nil || f.said[why] {
		return
	}
	if f.said == nil {
		f.said = map[string]bool{}
	}
	f.said[why] = true
	f.log.Warn(why+", so that more is fetched", args...)
}

// spoiled counts files that an old release or a delta should have provided, but that were missing or wrong there.
type spoiled struct {
	mu    sync.Mutex
	n     int
	first string
}

func (s *spoiled) add(path string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.n++; s.n == 1 || path < s.first {
		s.first = path
	}
}

func (s *spoiled) sum() (n int, first string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.n, s.first
}
