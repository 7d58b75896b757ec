package mirror

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"kedge/deployments"
	"kedge/deployments/wait"
	"kedge/kv"
	"kedge/policy"
	"kedge/sync/git"
)

// lead waits for the lease, works while it holds, and waits again.
func (m *Mirror) lead(ctx context.Context) {
	retry := wait.NewBackoff(500*time.Millisecond, 30*time.Second)
	failed := false
	for ctx.Err() == nil {
		lease, err := m.c.Store.Lease(ctx, kv.MirrorLease, m.c.Name, m.c.LeaseTTL)
		if err != nil {
			if ctx.Err() != nil {
				return
			}
			if !failed {
				m.c.Log.Warn("cannot ask for the mirror's lease", "store", m.c.Store, "error", err)
			}
			failed = true
			_ = retry.Wait(ctx)
			continue
		}
		failed = false
		retry.Reset()
		m.work(ctx, lease)
		_ = wait.For(ctx, wait.Jitter(time.Second, 0.2)) // whoever else waits goes first
	}
}

// work holds the lease until it is lost or ctx ends, and gives it back.
func (m *Mirror) work(ctx context.Context, lease kv.Lease) {
	m.c.Log.Info("this mirror holds the lease", "name", m.c.Name)
	m.setLeading(lease)
	defer m.setLeading(nil)
	m.Trigger() // a webhook may have come to the mirror before this one, or while none led
	defer m.setScene(nil)
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		if err := lease.Release(ctx); err != nil && !errors.Is(err, kv.ErrLeaseLost) {
			m.c.Log.Warn("cannot give back the mirror's lease, it will run out", "error", err)
		}
	}()
	held, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(lease.Context(), func() { cancel(context.Cause(lease.Context())) })()

	err := newLeader(m, lease).run(held)
	if ctx.Err() == nil {
		m.c.Log.Warn("this mirror lost the lease", "name", m.c.Name, "error", err)
	}
}

// setLeading notes the lease that is held; nil: none.
func (m *Mirror) setLeading(lease kv.Lease) {
	m.mu.Lock()
	m.holds = lease
	m.mu.Unlock()
	m.metrics.led(lease != nil)
}

// leader is a Mirror while it holds the lease: what it has seen of the store, and what it wrote there.
type leader struct {
	*Mirror
	lease kv.Lease

	mu       sync.Mutex
	desired  kv.View
	control  kv.View
	status   kv.View
	state    kv.View // of mirror/
	wake     wait.Signal
	snapshot chan []kv.Entry

	hook uint64 // the version of kv.MirrorHook that was heeded; sawState's alone

	// The rest belongs to run's goroutine.
	written    Status // what mirror/state holds
	writtenAt  time.Time
	accepted   *git.Commit // the commit that KV holds, or is to hold; nil: it can't be read
	recalled   string      // the branch's head when accepted was last looked for
	judged     string      // the head that was last judged, against accepted's, and the verdict
	verdict    error
	inspection *inspection // of judged's releases; nil: none was needed yet
	patience   *wait.Backoff
	inspecting sync.WaitGroup
	owned      map[deployments.UnitID]own
	obeyed     map[deployments.UnitID]uint64  // versions of orders that were consumed
	complaint  string                         // the orders that can't be obeyed, as they were last logged
	reports    map[string]parsedReport        // by key in status/
	folders    map[[2]string]bool             // the roles whose folders are there
	past       map[deployments.UnitID]History // newest generations, of the roles in pastOf
	pastOf     map[[2]string]bool
	ranks      map[deployments.UnitID]*policy.Ranks
	absent     map[string]absence // by key in status/
	// unforgetting is set once it is known that this mirror may not remove what is there.
	unforgetting bool
}

func newLeader(m *Mirror, lease kv.Lease) *leader {
	return &leader{
		Mirror: m, lease: lease,
		wake: wait.NewSignal(), snapshot: make(chan []kv.Entry, 1),
		owned: map[deployments.UnitID]own{}, obeyed: map[deployments.UnitID]uint64{}, folders: map[[2]string]bool{},
		past: map[deployments.UnitID]History{}, pastOf: map[[2]string]bool{},
		ranks:    map[deployments.UnitID]*policy.Ranks{},
		absent:   map[string]absence{},
		patience: wait.NewBackoff(m.patience, max(m.patience, maxPatience)),
	}
}

// run works until ctx ends, or the lease is found to be lost.
func (l *leader) run(ctx context.Context) error {
	if err := l.persist(ctx, "begin", l.begin); err != nil {
		return err
	}
	defer l.inspecting.Wait()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return l.c.Store.Watch(ctx, kv.DesiredPrefix, l.sawDesired) })
	g.Go(func() error { return l.c.Store.Watch(ctx, kv.ControlPrefix, l.sawControl) })
	g.Go(func() error { return l.c.Store.Watch(ctx, kv.StatusPrefix, l.sawStatus) })
	g.Go(func() error { return l.c.Store.Watch(ctx, kv.MirrorPrefix, l.sawState) })
	if l.c.Snapshot != nil {
		g.Go(func() error { return l.keepSnapshot(ctx) })
	}
	g.Go(func() error { return l.loop(ctx) })
	return g.Wait()
}

// begin reads what the mirror before this one left.
func (l *leader) begin(ctx context.Context) error {
	if err := l.c.Store.EnsureFolders(ctx, kv.DesiredPrefix, kv.PinsPrefix, kv.ControlPrefix, kv.StatusPrefix, kv.HistoryPrefix, kv.MirrorPrefix); err != nil {
		return err
	}
	entries, err := l.c.Store.List(ctx, kv.MirrorPrefix)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Key != kv.MirrorKey {
			continue
		}
		if err := json.Unmarshal(e.Value, &l.written); err != nil {
			l.c.Log.Warn("the mirror's own state doesn't parse, it is written anew", "key", e.Key, "error", err)
			l.written = Status{}
		}
	}
	return nil
}

// persist does f until it succeeds, the lease is lost or ctx ends.
func (l *leader) persist(ctx context.Context, what string, f func(context.Context) error) error {
	retry := wait.NewBackoff(500*time.Millisecond, 30*time.Second)
	for tries := 0; ; tries++ {
		err := f(ctx)
		if err == nil || errors.Is(err, kv.ErrLeaseLost) {
			return err
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if tries == 0 {
			l.c.Log.Warn("the store is in trouble", "doing", what, "store", l.c.Store, "error", err)
		}
		if err := retry.Wait(ctx); err != nil {
			return err
		}
	}
}

// loop observes, decides, acts and reports, whenever something changed.
func (l *leader) loop(ctx context.Context) error {
	retry := wait.NewBackoff(200*time.Millisecond, 30*time.Second)
	var trouble error
	for {
		git, gitChanged := l.gitChanged()
		again, err := l.round(ctx, git)
		switch {
		case errors.Is(err, kv.ErrLeaseLost):
			return err
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case err == nil:
			if trouble != nil {
				l.c.Log.Info("the store takes writes again", "store", l.c.Store)
			}
			trouble = nil
			retry.Reset()
		case errors.Is(err, kv.ErrConflict): // somebody else wrote, and the watch will show it
			again = wait.Jitter(time.Second, 0.2)
		default:
			if trouble == nil {
				l.c.Log.Warn("the store takes no writes", "store", l.c.Store, "error", err)
			}
			trouble = err
			again = retry.Next()
			gitChanged = nil
			// Wakes that come one after the other, as from a fleet that reports, must not hurry it.
			pause := min(again, wait.Jitter(time.Second, 0.2))
			if err := wait.For(ctx, pause); err != nil {
				return err
			}
			again = max(time.Millisecond, again-pause)
		}
		var clock <-chan time.Time
		if again > 0 {
			clock = time.After(again)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-gitChanged:
		case <-l.hurry.C():
			l.hurried()
		case <-l.wake.C():
		case <-clock:
		}
	}
}

// round does once what there is to do. again is when to look even if nothing changes; 0: never.
func (l *leader) round(ctx context.Context, git gitState) (again time.Duration, err error) {
	l.mu.Lock()
	view, control, fleet, state := l.desired, l.control, l.status, l.state
	l.mu.Unlock()
	if !view.Settled {
		return 0, nil
	}
	now := time.Now()
	cells := l.observe(view)
	l.recall(cmp.Or(git.head, "none"))
	unsureFor, refused, unsure := l.judge(ctx, git, cells)

	status := l.written
	status.Holder, status.Refused, status.Error = l.c.Name, "", ""
	var writes []write
	if l.accepted != nil {
		if err := l.prepare(ctx, cells, now); err != nil {
			return 0, err
		}
		var all bool
		var at time.Time
		nodes := l.fleet(fleet)
		seen := fleet.Since
		if fleet.Err != nil { // there may be a gap yet
			seen = now
		}
		l.setScene(&scene{units: l.accepted.Tree.Units, cells: cells, fleet: nodes})
		writes, all, at = decide(facts{commit: l.accepted, now: now, cells: cells, owned: l.owned, orders: l.orders(control), past: l.past,
			fleet: nodes, blind: !fleet.Settled, seen: seen, ranks: l.ranks})
		if !at.IsZero() {
			again = max(time.Millisecond, at.Sub(now))
		}
		if !all && l.accepted.Hash != l.written.Head {
			if !fleet.Settled && fleet.Err != nil {
				l.complain(ctx, fmt.Errorf("the nodes' reports can't be read: %w", fleet.Err), now)
			}
			return settle, nil // a commit is taken whole: it waits until the watch shows the writes of the last one
		}
		status.Applying = ""
		if l.accepted.Hash != status.Head {
			status.Head, status.Author, status.At, status.Rules = l.accepted.Hash, l.accepted.Author, now.UTC().Truncate(time.Millisecond), rulesOf(l.accepted)
			status.Past = l.accepted.Past
		}
	}
	switch {
	case refused != nil:
		status.Refused, status.Error = git.head, clip(refused.Error(), maxError)
	case unsure != nil:
		status.Error = clip(unsure.Error(), maxError)
		again = sooner(again, unsureFor)
	case git.away != nil:
		status.Error = clip(git.away.Error(), maxError)
	}
	gitKnown := git.head != "" || git.away != nil
	if !gitKnown || !worthWriting(l.written, status, l.writtenAt, now) {
		status = l.written
	}
	lost, at := l.lostState(state, now)
	if !lost && !at.IsZero() {
		again = sooner(again, max(time.Millisecond, at.Sub(now)))
	}
	if err := l.act(ctx, writes, status, lost, now); err != nil {
		l.complain(ctx, err, now)
		return 0, err
	}
	due, err := l.forget(ctx, fleet, cells, now)
	if err != nil {
		return 0, err
	}
	again = sooner(again, due)
	for _, o := range l.owned {
		if o.version == 0 {
			again = sooner(again, settle) // should its write not show by then, it is looked for again
		}
	}
	return again, nil
}

// sooner is the shorter of two times to wait, where 0 is for ever.
func sooner(a, b time.Duration) time.Duration {
	if a == 0 || b > 0 && b < a {
		return b
	}
	return a
}
