package kv

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"kedge/deployments/wait"
)

// leasePoll is how often a lease is looked after, and how soon a waiting process sees that one is free.
const leasePoll = 200 * time.Millisecond

// dirSession is a file that its process keeps flock'ed: the kernel tells everybody when it dies.
type dirSession struct {
	store *dirStore
	id    string
	file  *os.File
}

// openSession makes a session, and removes those of dead processes. The caller holds the store's lock.
func (d *dirStore) openSession(name string) (*dirSession, error) {
	old, err := os.ReadDir(d.path(sessionsDir))
	if err != nil {
		return nil, err
	}
	for _, f := range old {
		if !d.alive(f.Name()) {
			_ = os.Remove(d.path(sessionsDir + "/" + f.Name()))
		}
	}
	s := &dirSession{store: d, id: rand.Text()}
	s.file, err = os.OpenFile(s.path(), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return nil, err
	}
	// Another process may be looking at it just now, for an instant.
	if err := unix.Flock(int(s.file.Fd()), unix.LOCK_EX); err != nil {
		s.close()
		return nil, fmt.Errorf("lock the session: %w", err)
	}
	if _, err := fmt.Fprintf(s.file, "%s, process %d\n", name, os.Getpid()); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

func (s *dirSession) path() string { return s.store.path(sessionsDir + "/" + s.id) }

func (s *dirSession) valid() bool { return sameFile(s.file, s.path()) }

func (s *dirSession) close() {
	if s.valid() {
		_ = os.Remove(s.path())
	}
	s.file.Close()
}

// alive reports whether the process that made the session lives.
func (d *dirStore) alive(id string) bool {
	f, err := os.Open(d.path(sessionsDir + "/" + id))
	if err != nil {
		return false
	}
	defer f.Close()
	return errors.Is(unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB), unix.EWOULDBLOCK)
}

// holder gives the session that holds a key, empty for none.
func (d *dirStore) holder(key string) string {
	id, err := os.ReadFile(d.path(heldDir + "/" + heldName(key)))
	if err != nil || !d.alive(string(id)) {
		return ""
	}
	return string(id)
}

func heldName(key string) string { return strings.ReplaceAll(key, "/", "@") }

// Lease is held for as long as its process lives and lets it: an end by the clock would protect from nothing here, as
// a process that sleeps keeps its flock and every commit looks at it.
func (d *dirStore) Lease(ctx context.Context, key, holder string, ttl time.Duration) (Lease, error) {
	if err := checkKey(key); err != nil {
		return nil, fmt.Errorf("lease: %w", err)
	}
	if ttl <= 0 {
		return nil, fmt.Errorf("lease %s: a ttl of %v", key, ttl)
	}
	value, err := json.Marshal(holderValue{holder})
	if err != nil {
		return nil, fmt.Errorf("lease %s: %w", key, err)
	}
	for {
		var session *dirSession
		err := d.writing(ctx, func() error {
			if d.holder(key) != "" {
				return nil
			}
			s, err := d.openSession("lease of " + holder)
			if err != nil {
				return err
			}
			if err := d.commit([]change{{Key: key, Value: value, Hold: s.id}}); err != nil {
				s.close()
				return err
			}
			session = s
			return nil
		})
		if err != nil && !errors.Is(err, ErrUnavailable) {
			return nil, fmt.Errorf("lease %s: %w", key, err)
		}
		if session != nil {
			l := &dirLease{store: d, key: key, session: session, done: make(chan struct{})}
			l.ctx, l.cancel = context.WithCancelCause(context.WithoutCancel(ctx))
			go l.keep()
			return l, nil
		}
		if err := wait.For(ctx, leasePoll); err != nil {
			return nil, err
		}
	}
}

type dirLease struct {
	store   *dirStore
	key     string
	session *dirSession

	ctx    context.Context
	cancel context.CancelCauseFunc
	done   chan struct{}
}

func (l *dirLease) Context() context.Context { return l.ctx }

func (l *dirLease) lose() { l.cancel(ErrLeaseLost) }

// valid reports whether the lease holds its key. Anyone who may write the files can end that, as in Consul by
// deleting the key.
func (l *dirLease) valid() bool {
	if l.ctx.Err() != nil || !l.session.valid() {
		return false
	}
	id, err := os.ReadFile(l.store.path(heldDir + "/" + heldName(l.key)))
	if err != nil || string(id) != l.session.id {
		return false
	}
	_, ok := l.store.find(l.key)
	return ok
}

// keep watches that the lease is its own still.
func (l *dirLease) keep() {
	defer close(l.done)
	for wait.For(l.ctx, leasePoll) == nil {
		valid := true
		// Under the lock, so that a write in progress can't look like a loss.
		err := l.store.reading(l.ctx, func() error {
			valid = l.valid()
			return nil
		})
		if err == nil && !valid || errors.Is(err, ErrUnavailable) && !l.store.there() {
			l.lose()
		}
	}
	if errors.Is(context.Cause(l.ctx), ErrLeaseLost) {
		l.session.close()
	}
}

func (l *dirLease) Release(ctx context.Context) error {
	l.cancel(context.Canceled)
	<-l.done
	if errors.Is(context.Cause(l.ctx), ErrLeaseLost) {
		return nil
	}
	defer l.session.close()
	err := l.store.writing(ctx, func() error {
		if l.store.holder(l.key) != l.session.id {
			return nil
		}
		return l.store.commit([]change{{Key: l.key, Keep: true, Unhold: true}})
	})
	if err != nil {
		return fmt.Errorf("release the lease %s: %w", l.key, err)
	}
	return nil
}

// presenceLook is how often a presence looks after its entries.
const presenceLook = time.Second

// dirPresence holds entries by the life of this process: all of a machine's kedge processes use one directory.
type dirPresence struct {
	store *dirStore
	name  string

	ctx    context.Context
	cancel context.CancelFunc
	done   chan struct{} // closed once keep has ended

	mu      sync.Mutex
	session *dirSession
	joined  uint64        // when the session was opened, in nanoseconds
	changed chan struct{} // closed, and made anew, when joined changes
	held    map[string][]byte
	closed  bool
}

func (d *dirStore) Presence(ctx context.Context, name string) (Presence, error) {
	if name == "" {
		return nil, errors.New("presence: the name is empty")
	}
	p := &dirPresence{store: d, name: name, held: map[string][]byte{}, done: make(chan struct{}), changed: make(chan struct{})}
	p.ctx, p.cancel = context.WithCancel(context.WithoutCancel(ctx))
	go p.keep()
	return p, nil
}

func (p *dirPresence) Put(ctx context.Context, key string, value []byte) error {
	if err := checkKey(key); err != nil {
		return fmt.Errorf("put: %w", err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return fmt.Errorf("put %s: %w", key, errPresenceClosed)
	}
	err := p.store.writing(ctx, func() error {
		lost := p.lost()
		lost[key] = value
		return p.put(lost)
	})
	if err != nil {
		return fmt.Errorf("put %s: %w", key, err)
	}
	p.held[key] = bytes.Clone(value)
	return nil
}

func (p *dirPresence) Joined(ctx context.Context) (uint64, <-chan struct{}, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return 0, nil, errPresenceClosed
	}
	err := p.store.writing(ctx, p.open)
	if err != nil {
		return 0, nil, fmt.Errorf("join as %s: %w", p.name, err)
	}
	return p.joined, p.changed, nil
}

func (p *dirPresence) Leave(key string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.held, key)
}

// open makes a session where there is none that counts. The caller holds the store's lock.
func (p *dirPresence) open() error {
	if p.session != nil && p.session.valid() {
		return nil
	}
	if p.session != nil {
		p.session.close()
		p.session = nil
	}
	s, err := p.store.openSession("presence of " + p.name)
	if err != nil {
		return err
	}
	p.session, p.joined = s, uint64(time.Now().UnixNano())
	close(p.changed)
	p.changed = make(chan struct{})
	return nil
}

// put writes entries and holds them, with a new session if the old one is gone. The caller holds the store's lock.
func (p *dirPresence) put(entries map[string][]byte) error {
	if err := p.open(); err != nil {
		return err
	}
	var changes []change
	for _, k := range slices.Sorted(maps.Keys(entries)) {
		changes = append(changes, change{Key: k, Value: entries[k], Hold: p.session.id})
	}
	return p.store.commit(changes)
}

// lost gives the entries that aren't as they were put, and forgets those that another process has taken.
func (p *dirPresence) lost() map[string][]byte {
	lost := map[string][]byte{}
	for key, value := range p.held {
		switch holder := p.store.holder(key); {
		case holder == "":
			lost[key] = value
		case p.session == nil || holder != p.session.id:
			p.store.log.Warn("another process has taken this node's entry, so it stays with that", "key", key)
			delete(p.held, key)
		default:
			path, ok := p.store.find(key)
			if now, err := readValue(path); !ok || err != nil || !bytes.Equal(now.value, value) {
				lost[key] = value
			}
		}
	}
	return lost
}

// keep puts again what was lost: a file was removed by hand, or the whole directory was, and came back as it was earlier.
func (p *dirPresence) keep() {
	defer close(p.done)
	for wait.For(p.ctx, presenceLook) == nil {
		if err := p.repair(); err != nil {
			p.store.log.Debug("this node's entries can't be looked after", "name", p.name, "error", err)
		}
	}
}

func (p *dirPresence) repair() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.held) == 0 {
		return nil
	}
	whole := false
	err := p.store.reading(p.ctx, func() error {
		whole = len(p.lost()) == 0
		return nil
	})
	if err != nil || whole {
		return err
	}
	return p.store.writing(p.ctx, func() error {
		if lost := p.lost(); len(lost) > 0 {
			return p.put(lost)
		}
		return nil
	})
}

func (p *dirPresence) Close(ctx context.Context) error {
	p.cancel()
	<-p.done
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil
	}
	p.closed = true
	if p.session == nil {
		return nil
	}
	defer p.session.close()
	err := p.store.writing(ctx, func() error {
		var changes []change
		for _, key := range slices.Sorted(maps.Keys(p.held)) {
			if p.store.holder(key) == p.session.id {
				changes = append(changes, change{Key: key, Delete: true})
			}
		}
		return p.store.commit(changes)
	})
	if err != nil {
		return fmt.Errorf("delete the entries of %s: %w", p.name, err)
	}
	return nil
}
