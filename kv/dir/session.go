package dir

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// session is a file that its process keeps flock'ed. The kernel frees the lock when the process dies.
type session struct {
	store *Store
	id    string
	file  *os.File
}

// openSession creates a session, with name in its file for people, and removes those of dead processes. The caller
// holds the store's lock exclusively.
func (d *Store) openSession(name string) (*session, error) {
	old, err := os.ReadDir(d.path(sessionsDir))
	if err != nil {
		return nil, err
	}
	for _, f := range old {
		if !d.alive(f.Name()) {
			_ = os.Remove(d.path(sessionsDir + "/" + f.Name()))
		}
	}
	s := &session{store: d, id: rand.Text()}
	s.file, err = os.OpenFile(s.path(), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return nil, err
	}
	// This waits at most for another process that tests the lock, for an instant.
	if err := unix.Flock(int(s.file.Fd()), unix.LOCK_EX); err != nil {
		s.close()
		return nil, fmt.Errorf("lock the session %s: %w", s.path(), err)
	}
	if _, err := fmt.Fprintf(s.file, "%s, process %d\n", name, os.Getpid()); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

func (s *session) path() string { return s.store.path(sessionsDir + "/" + s.id) }

func (s *session) valid() bool { return sameFile(s.file, s.path()) }

func (s *session) close() {
	if s.valid() {
		_ = os.Remove(s.path())
	}
	s.file.Close()
}

// alive reports whether the process that made the session lives, and has not closed the session.
func (d *Store) alive(id string) bool {
	f, err := os.Open(d.path(sessionsDir + "/" + id))
	if err != nil {
		return false
	}
	defer f.Close()
	return errors.Is(unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB), unix.EWOULDBLOCK)
}

// holder returns the live session that holds a key, or "".
func (d *Store) holder(key string) string {
	id, err := os.ReadFile(d.path(heldDir + "/" + heldName(key)))
	if err != nil || !d.alive(string(id)) {
		return ""
	}
	return string(id)
}

func heldName(key string) string { return strings.ReplaceAll(key, "/", "@") }
