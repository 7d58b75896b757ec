package dir

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"kedge/deployments/wait"
	"kedge/kv"
	"kedge/kv/internal/backend"
)

// presencePoll is how often a presence checks its entries.
const presencePoll = time.Second

// presence ties entries to the life of this process.
type presence struct {
	store *Store
	name  string

	ctx    context.Context
	cancel context.CancelFunc
	done   chan struct{} // closed once keep has ended

	mu      sync.Mutex
	session *session
	gone    chan struct{} // closed, and made anew, when another session is opened
	held    map[string][]byte
	closed  bool
}

func (d *Store) Presence(ctx context.Context, name string) (kv.Presence, error) {
	if name == "" {
		return nil, errors.New("presence: the name is empty")
	}
	p := &presence{
		store: d,
		name:  name,
		held:  map[string][]byte{},
		done:  make(chan struct{}),
		gone:  make(chan struct{}),
	}
	p.ctx, p.cancel = context.WithCancel(context.WithoutCancel(ctx))
	go p.keep()
	return p, nil
}

func (p *presence) Put(ctx context.Context, key string, value []byte) error {
	_, _, err := p.Join(ctx, key, value)
	return err
}

// Join puts an entry. since is the time of the write in Unix nanoseconds, taken under the store's lock. So the times
// order the entries as long as the clock isn't set back. See kv.Presence for lost.
func (p *presence) Join(ctx context.Context, key string, value []byte) (
	since uint64, lost <-chan struct{}, err error,
) {
	if err := backend.CheckKey(key); err != nil {
		return 0, nil, fmt.Errorf("put: %w", err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return 0, nil, fmt.Errorf("put %s: %w", key, backend.ErrPresenceClosed)
	}
	err = p.store.withWriteLock(ctx, func() error {
		since = uint64(time.Now().UnixNano())
		lost, err := p.dropTakenAndListLost()
		if err != nil {
			return err
		}
		lost[key] = value
		return p.put(lost)
	})
	if err != nil {
		return 0, nil, fmt.Errorf("put %s: %w", key, err)
	}
	p.held[key] = bytes.Clone(value)
	return since, p.gone, nil
}

func (p *presence) KeepAtClose(key string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.held, key)
}

// ensureSession creates a session unless the current one is alive. The caller holds the store's
// lock exclusively.
func (p *presence) ensureSession() error {
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
	p.session = s
	close(p.gone)
	p.gone = make(chan struct{})
	return nil
}

// put writes entries and holds them, with a new session if the old one is gone. The caller holds p.mu, and the store's
// lock exclusively.
func (p *presence) put(entries map[string][]byte) error {
	if err := p.ensureSession(); err != nil {
		return err
	}
	var changes []change
	for _, k := range slices.Sorted(maps.Keys(entries)) {
		changes = append(changes, change{Key: k, Value: entries[k], Holder: p.session.id})
	}
	return p.store.commit(changes)
}

// dropTakenAndListLost returns the held entries that have no live holder any more, or not the value
// that was put. It forgets entries that another process has taken. The caller holds p.mu, and the
// store's lock at least shared.
func (p *presence) dropTakenAndListLost() (map[string][]byte, error) {
	lost := map[string][]byte{}
	for key, value := range p.held {
		switch holder, err := p.store.holder(key); {
		case err != nil:
			return nil, err
		case holder == "":
			lost[key] = value
		case p.session == nil || holder != p.session.id:
			p.store.log.Warn("another process has taken this node's entry: if two agents have the same name, rename one",
				"key", key)
			delete(p.held, key)
		default:
			path, ok := p.store.find(key)
			if now, err := readValue(path); !ok || err != nil || !bytes.Equal(now.value, value) {
				lost[key] = value
			}
		}
	}
	return lost, nil
}

// keep puts lost entries again until Close, as after a file or the whole directory was removed by hand or replaced by
// an older copy.
func (p *presence) keep() {
	defer close(p.done)
	for wait.For(p.ctx, presencePoll) == nil {
		if err := p.repair(); err != nil {
			p.store.log.Debug("could not check this node's entries", "name", p.name, "error", err)
		}
	}
}

func (p *presence) repair() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.held) == 0 {
		return nil
	}
	whole := false
	err := p.store.withReadLock(p.ctx, func() error {
		lost, err := p.dropTakenAndListLost()
		whole = len(lost) == 0
		return err
	})
	if err != nil || whole {
		return err
	}
	return p.store.withWriteLock(p.ctx, func() error {
		lost, err := p.dropTakenAndListLost()
		if err != nil || len(lost) == 0 {
			return err
		}
		return p.put(lost)
	})
}

func (p *presence) Close(ctx context.Context) error {
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
	err := p.store.withWriteLock(ctx, func() error {
		var changes []change
		for _, key := range slices.Sorted(maps.Keys(p.held)) {
			holder, err := p.store.holder(key)
			if err != nil {
				return err
			}
			if holder == p.session.id {
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
