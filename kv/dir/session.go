package dir

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
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
		if alive, err := d.alive(f.Name()); err == nil && !alive {
			_ = os.Remove(d.path(sessionsDir + "/" + f.Name()))
		}
	}
	s := &session{store: d, id: rand.Text()}
	s.file, err = os.OpenFile(s.path(), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return nil, err
	}
	// This waits only while another process tests the lock in alive, which takes an instant.
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

// alive reports whether the process that made the session lives, and has not closed the session. With an error, such as
// too many open files, neither is known.
func (d *Store) alive(id string) (bool, error) {
	if ignoredFile(id) {
		return false, nil // no session has such an ID: a power cut may have damaged the record of a holder
	}
	f, err := os.Open(d.path(sessionsDir + "/" + id))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	err = unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return true, nil
	}
	return false, err
}

// holder returns the live session that holds a key, or "". After an error it isn't known who holds the key.
func (d *Store) holder(key string) (string, error) {
	id, err := os.ReadFile(d.path(heldDir + "/" + heldName(key)))
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	alive, err := d.alive(string(id))
	if err != nil || !alive {
		return "", err
	}
	return string(id), nil
}

func heldName(key string) string { return strings.ReplaceAll(key, "/", "@") }
