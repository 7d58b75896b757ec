package kvtest

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"kedge/deployments/wait"
	"kedge/kv"
)

// When says whether a write fails before or after its effect.
type When int

const (
	// Before: nothing was written.
	Before When = iota + 1
	// After: all was written, but the writer gets an error.
	After
)

// FaultyStore is a store that fails on demand, and counts the writes.
type FaultyStore struct {
	store kv.Store

	mu      sync.Mutex
	down    error
	changed chan struct{} // closed and replaced when down changes
	hook    func(write int, keys []string) When
	n       int
	counts  map[string]int
}

// Faulty wraps a store. Its leases are those of the wrapped store.
func Faulty(s kv.Store) *FaultyStore {
	return &FaultyStore{store: s, changed: make(chan struct{}), counts: map[string]int{}}
}

// FailWrites makes the store call hook before each Commit, Put and Join, unless the store is down. hook gets the number
// of the write, from 0, and its keys. If hook returns Before or After, the write fails with ErrUnavailable at that
// point. If hook returns 0 or is nil, the write passes.
func (f *FaultyStore) FailWrites(hook func(write int, keys []string) When) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hook, f.n = hook, 0
}

// SetDown makes reads, views, EnsureFolders and writes fail with err, until SetDown is called with nil. Until then
// Lease waits. Leases and presences stay held, and can be released and closed.
func (f *FaultyStore) SetDown(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.down = err
	close(f.changed)
	f.changed = make(chan struct{})
}

// Writes returns how often each key was written or deleted since ResetWrites, including writes that failed After.
func (f *FaultyStore) Writes() map[string]int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return maps.Clone(f.counts)
}

// ResetWrites sets the counts of Writes to 0.
func (f *FaultyStore) ResetWrites() {
	f.mu.Lock()
	defer f.mu.Unlock()
	clear(f.counts)
}

func (f *FaultyStore) trouble() (changed <-chan struct{}, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.down != nil {
		err = fmt.Errorf("kvtest: the store is down: %w", f.down)
	}
	return f.changed, err
}

func (f *FaultyStore) write(keys []string, do func() error) error {
	if _, err := f.trouble(); err != nil {
		return err
	}
	f.mu.Lock()
	var when When
	if f.hook != nil {
		when = f.hook(f.n, keys)
	}
	f.n++
	f.mu.Unlock()
	if when == Before {
		return fmt.Errorf("kvtest: failed before writing %v: %w", keys, kv.ErrUnavailable)
	}
	if err := do(); err != nil {
		return err
	}
	f.mu.Lock()
	for _, k := range keys {
		f.counts[k]++
	}
	f.mu.Unlock()
	if when == After {
		return fmt.Errorf("kvtest: failed after writing %v: %w", keys, kv.ErrUnavailable)
	}
	return nil
}

func (f *FaultyStore) Get(ctx context.Context, key string) (kv.Entry, error) {
	if _, err := f.trouble(); err != nil {
		return kv.Entry{}, err
	}
	return f.store.Get(ctx, key)
}

func (f *FaultyStore) List(ctx context.Context, prefix string) ([]kv.Entry, error) {
	if _, err := f.trouble(); err != nil {
		return nil, err
	}
	return f.store.List(ctx, prefix)
}

// Watch shows the store's views. When the store goes down, Watch shows the last view again, with SetDown's error. When
// the store is up again, Watch shows the latest view.
func (f *FaultyStore) Watch(ctx context.Context, prefix string, show func(kv.View)) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	views := make(chan kv.View)
	ended := make(chan error, 1)
	go func() {
		ended <- f.store.Watch(ctx, prefix, func(v kv.View) { _ = wait.Send(ctx, views, v) })
	}()
	var shown, latest kv.View
	wasDown := false
	for started := false; ; {
		changed, down := f.trouble()
		switch {
		case down != nil && !wasDown:
			wasDown = true
			shown.Err, shown.Since = down, time.Now()
			show(cloneView(shown))
		case down == nil && wasDown && started:
			wasDown = false
			shown = latest
			shown.Since = time.Now()
			show(cloneView(shown))
		case down == nil:
			wasDown = false
		}
		select {
		case latest = <-views:
			started = true
			if down == nil {
				shown = latest
				show(cloneView(shown))
			}
		case <-changed:
		case err := <-ended:
			return err
		}
	}
}

func cloneView(v kv.View) kv.View {
	v.Entries = slices.Clone(v.Entries)
	return v
}

func (f *FaultyStore) Commit(ctx context.Context, lease kv.Lease, ops ...kv.Op) error {
	var keys []string
	for _, op := range ops {
		keys = append(keys, op.Key)
	}
	return f.write(keys, func() error { return f.store.Commit(ctx, lease, ops...) })
}

func (f *FaultyStore) Lease(ctx context.Context, key, holder string, ttl time.Duration) (kv.Lease, error) {
	for {
		changed, down := f.trouble()
		if down == nil {
			return f.store.Lease(ctx, key, holder, ttl)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (f *FaultyStore) Presence(ctx context.Context, name string) (kv.Presence, error) {
	p, err := f.store.Presence(ctx, name)
	if err != nil {
		return nil, err
	}
	return &faultyPresence{f, p}, nil
}

func (f *FaultyStore) EnsureFolders(ctx context.Context, prefixes ...string) error {
	if _, err := f.trouble(); err != nil {
		return err
	}
	return f.store.EnsureFolders(ctx, prefixes...)
}

func (f *FaultyStore) String() string { return f.store.String() }
func (f *FaultyStore) Close() error   { return f.store.Close() }

type faultyPresence struct {
	f *FaultyStore
	p kv.Presence
}

func (p *faultyPresence) Put(ctx context.Context, key string, value []byte) error {
	return p.f.write([]string{key}, func() error { return p.p.Put(ctx, key, value) })
}

func (p *faultyPresence) Join(ctx context.Context, key string, value []byte) (
	since uint64, lost <-chan struct{}, err error,
) {
	err = p.f.write([]string{key}, func() (err error) {
		since, lost, err = p.p.Join(ctx, key, value)
		return err
	})
	return since, lost, err
}

func (p *faultyPresence) KeepAtClose(key string) { p.p.KeepAtClose(key) }

func (p *faultyPresence) Close(ctx context.Context) error { return p.p.Close(ctx) }
