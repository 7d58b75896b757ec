package kv

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/consul/api"

	"kedge/deployments/wait"
)

const (
	// presenceTTL is for a process whose Consul agent runs on another machine, where that machine's health says nothing.
	presenceTTL = 30 * time.Second
	// presenceLockDelay is as good as none: the next holder of an entry is its own writer.
	presenceLockDelay = time.Millisecond
	// presencePoll is how often at least a presence looks after its session and entries.
	presencePoll = 60 * time.Second
	// takenPoll is how often it looks whether another process still has what it took.
	takenPoll = 5 * time.Second
	// earlierAfter is how long the session of a process that was killed is left, once its node has another: by then that has put all
	// that it has to say in the place of what the old one holds, so that no entry has been without a holder, as if the node were gone.
	earlierAfter = 30 * time.Second
)

// consulPresence holds entries by one session. Where the local Consul agent's node has the presence's name, that is tied
// to the node's health and to a check of the process that is beaten at that agent, and costs the servers nothing while it
// lives; else, as where the address is a distant server's or the node has no serfHealth check, it has a TTL and is renewed.
// A node that boots may get its check only later, so each Put asks for it again.
type consulPresence struct {
	store *consulStore
	name  string

	ctx    context.Context
	cancel context.CancelFunc
	done   chan struct{}
	wake   wait.Signal // a session was made that has to be looked after

	// putting keeps Puts, the repair of what they wrote, and Close apart.
	putting sync.Mutex
	session string
	node    string          // whose health the session is tied to, as Consul calls it
	heart   *heartbeat      // tells that this process lives; nil: none
	mute    bool            // there can't be one: said already
	sweep   *time.Timer     // ends what an earlier process left; nil: no session yet
	joined  uint64          // the store's index when the session was made
	changed chan struct{}   // closed, and made anew, when joined changes
	renew   bool            // the session has a TTL
	early   bool            // for want of a health check of the node
	mine    map[string]bool // every session that this presence has had
	held    map[string][]byte
	taken   map[string]bool // of held, what another process has
	closed  bool
}

func (s *consulStore) Presence(ctx context.Context, name string) (Presence, error) {
	if name == "" {
		return nil, errors.New("presence: the name is empty")
	}
	p := &consulPresence{store: s, name: name, done: make(chan struct{}), wake: wait.NewSignal(),
		mine: map[string]bool{}, held: map[string][]byte{}, taken: map[string]bool{}, changed: make(chan struct{})}
	p.ctx, p.cancel = context.WithCancel(context.WithoutCancel(ctx))
	go p.keep()
	return p, nil
}

func (p *consulPresence) Joined(ctx context.Context) (uint64, <-chan struct{}, error) {
	p.putting.Lock()
	defer p.putting.Unlock()
	if p.closed {
		return 0, nil, errPresenceClosed
	}
	if p.session == "" {
		if err := p.open(ctx); err != nil {
			return 0, nil, err
		}
	}
	return p.joined, p.changed, nil
}

func (p *consulPresence) Leave(key string) {
	p.putting.Lock()
	defer p.putting.Unlock()
	delete(p.held, key)
}

var errPresenceClosed = errors.New("the presence is closed")

func (p *consulPresence) Put(ctx context.Context, key string, value []byte) error {
	if err := checkKey(key); err != nil {
		return fmt.Errorf("put: %w", err)
	}
	p.putting.Lock()
	defer p.putting.Unlock()
	if p.closed {
		return fmt.Errorf("put %s: %w", key, errPresenceClosed)
	}
	if p.early {
		if err := p.tie(ctx); err != nil {
			p.store.log.Debug("this node's entries stay with a session that is renewed", "name", p.name, "error", err)
		}
	}
	if err := p.put(ctx, key, value); err != nil {
		return err
	}
	first := len(p.held) == 0
	p.held[key] = bytes.Clone(value)
	delete(p.taken, key)
	if first {
		p.look()
	}
	return nil
}

// look has keep look after what changed.
func (p *consulPresence) look() {
	p.wake.Set()
}

// tie moves the entries from a session with a TTL to one of the node's health. Where it can't, all stays as it was, or what it
// moved stays with the new one and the rest is repaired.
func (p *consulPresence) tie(ctx context.Context) error {
	old := p.session
	if old == "" {
		return nil // the next one is opened as it can be
	}
	id, _, err := p.openTied(ctx)
	if err != nil {
		return err
	}
	p.opened(id, p.joined, false, false)
	for _, key := range slices.Sorted(maps.Keys(p.held)) {
		if err := p.swap(ctx, key, p.held[key], p.held[key], old); err != nil && !errors.Is(err, ErrConflict) {
			return err
		}
	}
	p.store.destroySession(old)
	return nil
}

// put writes one entry and holds it, with a new session if the old one is gone.
func (p *consulPresence) put(ctx context.Context, key string, value []byte) error {
	for range 4 {
		if p.session == "" {
			if err := p.open(ctx); err != nil {
				return err
			}
		}
		held, err := p.acquire(ctx, key, value)
		switch {
		case err != nil && strings.Contains(err.Error(), "invalid session"):
			p.session = ""
			continue
		case err != nil:
			return err
		case held:
			return nil
		}
		// Held by this node's process of before, whose session lives as long as the node.
		switch err := p.evict(ctx, key, value); {
		case err == nil:
			return nil
		case !errors.Is(err, ErrConflict):
			return err
		}
	}
	return fmt.Errorf("put %s: another process keeps taking it: %w", key, ErrConflict)
}

func (p *consulPresence) acquire(ctx context.Context, key string, value []byte) (held bool, err error) {
	s := p.store
	err = s.do(ctx, "put "+key, requestTimeout, func(q *api.QueryOptions) (err error) {
		held, _, err = s.client.KV().Acquire(&api.KVPair{Key: s.prefix + key, Value: value, Session: p.session}, writeOptions(q))
		return err
	})
	return held, err
}

// evict takes the entry over from the session that holds it, without a moment in which nobody does. ErrConflict: it holds the entry
// no more.
func (p *consulPresence) evict(ctx context.Context, key string, value []byte) error {
	s := p.store
	old, err := s.Get(ctx, key)
	if errors.Is(err, ErrNotFound) {
		return ErrConflict
	}
	if err != nil {
		return err
	}
	if old.Session == "" || old.Session == p.session {
		// What an ended session held can be taken only after its delay.
		return cmp.Or(wait.For(ctx, 2*presenceLockDelay), ErrConflict)
	}
	return p.swap(ctx, key, old.Value, value, old.Session)
}

func (p *consulPresence) sessionName() string { return "kedge presence of " + p.name }

// swap takes an entry from another session. ErrConflict: that holds it no more.
func (p *consulPresence) swap(ctx context.Context, key string, old, value []byte, from string) error {
	s := p.store
	ops := api.TxnOps{
		kvOp(&api.KVTxnOp{Verb: api.KVUnlock, Key: s.prefix + key, Value: old, Session: from}),
		kvOp(&api.KVTxnOp{Verb: api.KVLock, Key: s.prefix + key, Value: value, Session: p.session}),
	}
	return s.do(ctx, "take over "+key, requestTimeout, func(q *api.QueryOptions) error { return s.txn(q, ops, false) })
}

// open makes the session.
func (p *consulPresence) open(ctx context.Context) error {
	id, joined, err := p.openTied(ctx)
	if err == nil {
		p.opened(id, joined, false, false)
		if p.sweep == nil {
			p.endEarlier(ctx, p.node, p.mine, 1)
			p.sweep = time.AfterFunc(p.store.earlierAfter, func() {
				p.putting.Lock()
				node, mine := p.node, maps.Clone(p.mine)
				p.putting.Unlock()
				p.endEarlier(p.ctx, node, mine, 0)
			})
		}
		return nil
	}
	early := errors.Is(err, errNoHealthCheck)
	if !early && !errors.Is(err, errOtherNode) {
		return err
	}
	e := p.newSession()
	e.TTL = presenceTTL.String()
	if id, err = p.store.createSession(ctx, e); err != nil {
		return err
	}
	info, _, err := p.store.sessionInfo(ctx, id, api.QueryOptions{RequireConsistent: true}, requestTimeout)
	if err == nil && info == nil {
		err = fmt.Errorf("create a session: it is gone already: %w", ErrUnavailable)
	}
	if err != nil {
		p.store.destroySession(id)
		return err
	}
	p.opened(id, info.CreateIndex, true, early)
	return nil
}

// endEarlier ends the sessions of this name that processes before this one left when they were killed: they live as long as the node,
// and so would what they held and this one doesn't, as the entry in a role that the node had. The newest keep are left. Another process
// of this name that lives makes itself a new one.
func (p *consulPresence) endEarlier(ctx context.Context, node string, mine map[string]bool, keep int) {
	var all []*api.SessionEntry
	err := p.store.do(ctx, "list this node's sessions", requestTimeout, func(q *api.QueryOptions) (err error) {
		all, _, err = p.store.client.Session().Node(node, consistent(q))
		return err
	})
	if err != nil {
		p.store.log.Debug("sessions of earlier processes of this node may stay", "name", p.name, "error", err)
	}
	all = slices.DeleteFunc(all, func(e *api.SessionEntry) bool { return e.Name != p.sessionName() || mine[e.ID] })
	slices.SortFunc(all, func(a, b *api.SessionEntry) int { return cmp.Compare(b.CreateIndex, a.CreateIndex) })
	for _, e := range all[min(keep, len(all)):] {
		p.store.destroySession(e.ID)
	}
}

func (p *consulPresence) newSession() *api.SessionEntry {
	return &api.SessionEntry{Name: p.sessionName(), Behavior: api.SessionBehaviorRelease, LockDelay: presenceLockDelay}
}

// errOtherNode: the Consul agent that answers is another node's, whose health says nothing of this one.
var errOtherNode = errors.New("the Consul agent is another node's")

// openTied makes a session that lives as long as this node is healthy. errNoHealthCheck and errOtherNode: there can't be one.
func (p *consulPresence) openTied(ctx context.Context) (id string, joined uint64, err error) {
	s := p.store
	if id, err = s.createSession(ctx, p.newSession()); err != nil {
		return "", 0, err
	}
	info, _, err := s.sessionInfo(ctx, id, api.QueryOptions{RequireConsistent: true}, requestTimeout)
	switch {
	case err != nil:
	case info == nil:
		err = fmt.Errorf("create a session: it is gone already: %w", ErrUnavailable)
	case !strings.EqualFold(info.Node, p.name):
		err = errOtherNode
	default:
		p.node = info.Node
		return p.beating(ctx, id), info.CreateIndex, nil
	}
	s.destroySession(id)
	return "", 0, err
}

// beating gives a session that also ends when this process does, in place of one of the node's health alone. Where there can't be
// one it gives back the other: an agent that died is seen to be gone only with its node then.
func (p *consulPresence) beating(ctx context.Context, plain string) (id string) {
	s := p.store
	var err error
	if p.heart == nil {
		if p.mute {
			return plain
		}
		var h *heartbeat
		if h, err = s.startHeartbeat(ctx, presenceHeartbeat); err == nil {
			p.heart = h
			go h.keep(p.ctx)
		}
	}
	if err == nil {
		if id, err = p.heart.session(ctx, *p.newSession()); err == nil {
			s.destroySession(plain)
			return id
		}
	}
	if !p.mute && ctx.Err() == nil {
		p.mute = errors.Is(err, ErrDenied)
		s.log.Warn("should this process die and its node live, nobody will see it: it can't register its service at the Consul agent",
			"service", PresenceService, "error", err)
	}
	return plain
}

func (p *consulPresence) opened(id string, joined uint64, renew, early bool) {
	p.session, p.renew, p.early = id, renew, early
	p.mine[id] = true
	if joined != p.joined {
		p.joined = joined
		close(p.changed)
		p.changed = make(chan struct{})
	}
	p.look()
}

// sessionInfo gives nil for a session that is gone, and the index to wait on.
func (s *consulStore) sessionInfo(ctx context.Context, id string, opts api.QueryOptions, timeout time.Duration) (e *api.SessionEntry, index uint64, err error) {
	err = s.do(ctx, "look at a session", timeout, func(q *api.QueryOptions) error {
		opts.Token = q.Token
		var meta *api.QueryMeta
		if e, meta, err = s.client.Session().Info(id, opts.WithContext(q.Context())); err == nil {
			index = meta.LastIndex
		}
		return err
	})
	return e, index, err
}

// keep renews the session where it must be, and repairs what is held when the session or an entry went away: the node
// was thought dead for a moment, or a snapshot was restored.
func (p *consulPresence) keep() {
	defer close(p.done)
	trouble := wait.NewBackoff(100*time.Millisecond, 10*time.Second)
	for {
		p.putting.Lock()
		session, renew, idle := p.session, p.renew, len(p.held) == 0
		watched := ""
		for key := range p.held {
			if !p.taken[key] && (watched == "" || key < watched) {
				watched = key
			}
		}
		p.putting.Unlock()
		if idle {
			select {
			case <-p.wake.C():
				continue
			case <-p.ctx.Done():
				return
			}
		}
		var err error
		if session != "" && watched != "" {
			err = p.watchEntry(session, watched, renew)
		} else if session != "" {
			err = wait.For(p.ctx, takenPoll) // another process has taken all of it
		}
		if err == nil {
			err = p.repair()
		}
		pause := 50 * time.Millisecond // a session that comes and goes must not make a busy loop
		if err == nil {
			trouble.Reset()
		} else {
			pause = trouble.Next()
		}
		p.putting.Lock()
		taken := err == nil && p.session == "" && len(p.held) > 0 // all of it
		p.putting.Unlock()
		if taken {
			select {
			case <-p.wake.C(): // by a Put
			case <-time.After(takenPoll):
			case <-p.ctx.Done():
				return
			}
			continue
		}
		if wait.For(p.ctx, pause) != nil {
			return
		}
	}
}

// watchEntry returns when the entry isn't as it was put, or the session doesn't hold it any more, or after presencePoll. It
// looks with stale reads, which repair confirms.
func (p *consulPresence) watchEntry(session, key string, renew bool) error {
	s, most := p.store, watchWait
	if renew {
		most = presenceTTL / 3
	}
	var index uint64
	idle := wait.NewBackoff(5*time.Millisecond, time.Second)
	for end := time.Now().Add(presencePoll); time.Now().Before(end); {
		if renew {
			if err := s.renewSession(p.ctx, session, requestTimeout); errors.Is(err, ErrNotFound) {
				return nil
			} else if err != nil {
				return err
			}
		}
		asked, holds := time.Now(), false
		err := s.do(p.ctx, "look at "+key, watchTimeout, func(q *api.QueryOptions) error {
			q.AllowStale, q.WaitIndex, q.WaitTime = true, index, most
			pair, meta, err := s.client.KV().Get(s.prefix+key, q)
			if err == nil {
				holds = pair != nil && pair.Session == session && p.puts(key, pair.Value)
				index = nextIndex(index, meta.LastIndex, time.Since(asked), most)
			}
			return err
		})
		if err != nil || !holds {
			return err
		}
		if index == 0 {
			return wait.For(p.ctx, time.Second) // a restore may have left the session and changed what it holds
		}
		if err := idle.Wait(p.ctx); err != nil {
			return err
		}
	}
	return nil
}

// puts reports whether value is what was put at key last.
func (p *consulPresence) puts(key string, value []byte) bool {
	p.putting.Lock()
	defer p.putting.Unlock()
	return bytes.Equal(p.held[key], value)
}

// repair looks at each entry, and puts it again where this presence's session doesn't hold it. An entry that a later
// process of this node has taken is left to it as long as that lives: else a node whose agent was started twice would be
// gone once the second ends.
func (p *consulPresence) repair() error {
	p.putting.Lock()
	defer p.putting.Unlock()
	if len(p.held) == 0 {
		return nil
	}
	if p.session != "" {
		info, _, err := p.store.sessionInfo(p.ctx, p.session, api.QueryOptions{RequireConsistent: true}, requestTimeout)
		if err != nil {
			return err
		}
		if info == nil {
			p.store.log.Warn("the session of this node's entries is gone, so they get another", "name", p.name)
			p.session = ""
		}
	}
	for _, key := range slices.Sorted(maps.Keys(p.held)) {
		e, err := p.store.Get(p.ctx, key)
		switch {
		case err != nil && !errors.Is(err, ErrNotFound):
			return err
		case e.Session != "" && e.Session == p.session && bytes.Equal(e.Value, p.held[key]):
			continue // a restored snapshot brings back what it held earlier, too
		case e.Session != "" && !p.mine[e.Session]: // of its own, a restored snapshot may have brought one back
			if !p.taken[key] {
				p.store.log.Warn("another process has taken this node's entry, and keeps it while it lives: do two agents have this name?", "key", key)
			}
			p.taken[key] = true
			continue
		}
		if err := p.put(p.ctx, key, p.held[key]); err != nil {
			return err
		}
		delete(p.taken, key)
	}
	return nil
}

func (p *consulPresence) Close(ctx context.Context) error {
	p.cancel()
	<-p.done
	p.putting.Lock()
	defer p.putting.Unlock()
	if p.closed {
		return nil
	}
	p.closed = true
	if p.heart != nil {
		defer p.heart.stop()
	}
	if p.sweep != nil && p.sweep.Stop() {
		p.endEarlier(ctx, p.node, p.mine, 0)
	}
	if p.session == "" {
		return nil
	}
	s := p.store
	var errs []error
	for _, key := range slices.Sorted(maps.Keys(p.held)) {
		// Only what is still its own: after a failure of the session the entry may be a later process's.
		ops := api.TxnOps{
			kvOp(&api.KVTxnOp{Verb: api.KVCheckSession, Key: s.prefix + key, Session: p.session}),
			kvOp(&api.KVTxnOp{Verb: api.KVDelete, Key: s.prefix + key}),
		}
		err := s.do(ctx, "delete "+key, requestTimeout, func(q *api.QueryOptions) error { return s.txn(q, ops, false) })
		if err != nil && !errors.Is(err, ErrConflict) {
			errs = append(errs, err)
		}
	}
	s.destroySession(p.session)
	return errors.Join(errs...)
}
