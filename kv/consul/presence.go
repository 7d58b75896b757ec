package consul

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
	"kedge/kv"
	"kedge/kv/internal/backend"
)

const (
	// presenceTTL is the TTL of a session that can't be tied to this node's health. Either the Consul agent runs on
	// another machine, or the node has no health check.
	presenceTTL = 30 * time.Second
	// presenceLockDelay is how long Consul keeps an entry from being acquired after its session was
	// lost. It is next to nothing, as the same node acquires the entry next; 0 would mean 15 s.
	presenceLockDelay = time.Millisecond
	// presenceCheckAfter is how long a presence watches one entry before it checks all. A read that blocks may double it.
	presenceCheckAfter = 60 * time.Second
	// takenPoll is how often a presence checks whether another process that took all its entries still holds one.
	takenPoll = 5 * time.Second
	// endOthersAfter is how long a killed process's last session is left alone once the node has a new one. By then the
	// new process has written all its entries. An entry without a holder would make the node look gone.
	endOthersAfter = 30 * time.Second
	// addHeartbeatMost bounds the average time between two tries to add a heartbeat. A try asks the Consul agent alone,
	// or also the servers if the agent has taken the service.
	addHeartbeatMost = time.Minute
)

// presence holds entries by one session, of one of two kinds:
//
//   - If the local Consul agent's node has the presence's name and a serfHealth check, the session is tied to that
//     node's health, and costs the servers nothing. If the token may register a heartbeat's service at that agent, the
//     session is also tied to the heartbeat's check.
//   - If the Consul agent's node has another name, or no serfHealth check, the session has a TTL and is renewed.
//
// A booting node may get its serfHealth check only later, so each Put tries again to tie the session to that check. The
// node's Consul agent may take heartbeats only later, so addHeartbeat tries again.
type presence struct {
	store *Store
	name  string

	ctx    context.Context
	cancel context.CancelFunc
	done   chan struct{}
	wake   wait.Signal // set when there is a new session, or a first entry, for watchEntries to watch

	sweeping sync.Mutex // held by sweep's call, and by Close; locked before putting
	// putting serializes all methods that use the fields below.
	putting sync.Mutex
	session string
	node    string // the Consul name of the node whose health the session is tied to

	heart    *heartbeat // shows that this process lives; nil: none
	endHeart context.CancelFunc
	// heartbeatDenied is set if the token may not register the heartbeat, and that was logged.
	heartbeatDenied bool
	// sessionWithoutHeartbeat is the session that addHeartbeat is to replace; empty: none.
	sessionWithoutHeartbeat string
	heartbeatTimer          *time.Timer    // calls addHeartbeat; nil: it was never needed
	heartbeatPause          *wait.Backoff  // the pauses before heartbeatTimer
	heartbeatErrors         backend.Causes // why there was no heartbeat

	oldSessions []string // sessions that may still hold entries, as moveTo failed
	// sweep ends the sessions of earlier processes; nil: openSession made no node session yet.
	sweep             *time.Timer
	gone              chan struct{}   // closed, and made anew, when the session is lost
	hasTTL            bool            // the session has a TTL
	awaitsHealthCheck bool            // the session has a TTL because the node has no health check yet
	mine              map[string]bool // all sessions that this presence has had
	held              map[string][]byte
	// tried has the last values to put, whether or not the store confirmed them.
	tried  map[string][]byte
	taken  map[string]bool // those of held that another process has taken
	closed bool
}

func (s *Store) Presence(ctx context.Context, name string) (kv.Presence, error) {
	if name == "" {
		return nil, errors.New("presence: the name is empty")
	}
	p := &presence{store: s, name: name, done: make(chan struct{}), wake: wait.NewSignal(),
		mine: map[string]bool{}, held: map[string][]byte{},
		tried: map[string][]byte{}, taken: map[string]bool{}, gone: make(chan struct{}),
		heartbeatPause: wait.NewBackoff(time.Second, addHeartbeatMost)}
	p.ctx, p.cancel = context.WithCancel(context.WithoutCancel(ctx))
	go p.watchEntries()
	return p, nil
}

func (p *presence) KeepAtClose(key string) {
	p.putting.Lock()
	defer p.putting.Unlock()
	delete(p.held, key)
}

// Join puts an entry and returns the index of the entry's last write. That write is an earlier one
// if the entry was held with this value already. Join doesn't return the session's index, which
// would not order nodes as their entries do. If other processes keep taking the entry, the error is
// ErrConflict.
func (p *presence) Join(ctx context.Context, key string, value []byte) (
	since uint64, lost <-chan struct{}, err error,
) {
	p.putting.Lock()
	defer p.putting.Unlock()
	for range 4 {
		if err := p.putAndHold(ctx, key, value); err != nil {
			return 0, nil, err
		}
		e, err := p.store.Get(ctx, key)
		switch {
		case err != nil && !errors.Is(err, kv.ErrNotFound):
			return 0, nil, err
		case e.Session == p.session && bytes.Equal(e.Value, value):
			return e.Version, p.gone, nil
		}
	}
	return 0, nil, fmt.Errorf("put %s: another process keeps taking it: %w", key, kv.ErrConflict)
}

func (p *presence) Put(ctx context.Context, key string, value []byte) error {
	p.putting.Lock()
	defer p.putting.Unlock()
	return p.putAndHold(ctx, key, value)
}

// putAndHold writes an entry, and keeps it from then on.
func (p *presence) putAndHold(ctx context.Context, key string, value []byte) error {
	if err := backend.CheckKey(key); err != nil {
		return fmt.Errorf("put: %w", err)
	}
	if p.closed {
		return fmt.Errorf("put %s: %w", key, backend.ErrPresenceClosed)
	}
	if p.awaitsHealthCheck {
		if err := p.moveToNodeSession(ctx); err != nil {
			p.store.log.Debug("could not move this node's entries to a session without a TTL", "name", p.name, "error", err)
		}
	}
	p.tried[key] = bytes.Clone(value)
	if err := p.put(ctx, key, value); err != nil {
		return err
	}
	first := len(p.held) == 0
	p.held[key] = bytes.Clone(value)
	delete(p.taken, key)
	if first {
		p.wakeWatch()
	}
	return nil
}

// wakeWatch wakes watchEntries, which waits as long as no entry is held.
func (p *presence) wakeWatch() {
	p.wake.Set()
}

// moveToNodeSession moves the entries from a session with a TTL to one that depends on the node's
// health. After an error either session may hold them; repair moves the rest. Entries that another
// process has taken stay with that process.
func (p *presence) moveToNodeSession(ctx context.Context) error {
	if p.session == "" {
		return nil // the next session is opened by the usual choice
	}
	id, err := p.openNodeSession(ctx)
	if err != nil {
		return err
	}
	return p.moveTo(ctx, id)
}

// moveTo moves the entries to another session that depends on the node's health, as moveToNodeSession says.
func (p *presence) moveTo(ctx context.Context, id string) error {
	old := p.session
	p.oldSessions = append(p.oldSessions, old)
	p.setSession(id, false, false)
	for _, key := range slices.Sorted(maps.Keys(p.held)) {
		if err := p.swap(ctx, key, p.held[key], p.held[key], old); err != nil && !errors.Is(err, kv.ErrConflict) {
			return err
		}
	}
	p.oldSessions = slices.DeleteFunc(p.oldSessions, func(session string) bool { return session == old })
	p.store.destroySession(old)
	return nil
}

// put writes one entry and holds it, with a new session if the old one is gone. If other processes keep taking the
// entry, the error is ErrConflict.
func (p *presence) put(ctx context.Context, key string, value []byte) error {
	for range 4 {
		if p.session == "" {
			if err := p.openSession(ctx); err != nil {
				return err
			}
		}
		held, err := p.acquire(ctx, key, value)
		switch {
		case err != nil && strings.Contains(err.Error(), "invalid session"):
			p.lose()
			continue
		case err != nil:
			return err
		case held:
			return nil
		}
		// Another session holds it, such as that of this node's earlier process, which may live as long as the node.
		switch err := p.evict(ctx, key, value); {
		case err == nil:
			return nil
		case !errors.Is(err, kv.ErrConflict):
			return err
		}
	}
	return fmt.Errorf("put %s: another process keeps taking it: %w", key, kv.ErrConflict)
}

func (p *presence) acquire(ctx context.Context, key string, value []byte) (held bool, err error) {
	s := p.store
	err = s.do(ctx, "put "+key, requestTimeout, func(q *api.QueryOptions) (err error) {
		held, _, err = s.client.KV().
			Acquire(&api.KVPair{Key: s.prefix + key, Value: value, Session: p.session}, writeOptions(q))
		return err
	})
	return held, err
}

// evict takes the entry over from the session that holds it, in one step, so that the entry always has a holder. The
// error is ErrConflict if no other session holds the entry, or if its holder changed meanwhile.
func (p *presence) evict(ctx context.Context, key string, value []byte) error {
	s := p.store
	old, err := s.Get(ctx, key)
	if errors.Is(err, kv.ErrNotFound) {
		return kv.ErrConflict
	}
	if err != nil {
		return err
	}
	if old.Session == "" || old.Session == p.session {
		// An entry of an ended session can be taken only after the lock-delay.
		return cmp.Or(wait.For(ctx, 2*presenceLockDelay), kv.ErrConflict)
	}
	return p.swap(ctx, key, old.Value, value, old.Session)
}

func (p *presence) sessionName() string { return "kedge presence of " + p.name }

// swap takes an entry, whose value is old, over from another session, and writes value. The error
// is ErrConflict if that session doesn't hold the entry, or if this presence's session is gone.
func (p *presence) swap(ctx context.Context, key string, old, value []byte, from string) error {
	s := p.store
	ops := api.TxnOps{
		kvOp(&api.KVTxnOp{Verb: api.KVUnlock, Key: s.prefix + key, Value: old, Session: from}),
		kvOp(&api.KVTxnOp{Verb: api.KVLock, Key: s.prefix + key, Value: value, Session: p.session}),
	}
	return s.do(ctx, "take over "+key, requestTimeout, func(q *api.QueryOptions) error { return s.txn(q, ops, false) })
}

// openSession creates the session, tied to this node if possible, or else with a TTL. With the
// first session that is tied to this node, openSession ends the sessions of earlier processes, the
// newest of them only after endOthersAfter.
func (p *presence) openSession(ctx context.Context) error {
	id, err := p.openNodeSession(ctx)
	if err == nil {
		p.setSession(id, false, false)
		if p.sweep == nil {
			p.endOthers(p.namedSessions(ctx, p.node), p.mine, 1)
			node := p.node
			p.sweep = time.AfterFunc(p.store.endOthersAfter, func() {
				p.sweeping.Lock()
				defer p.sweeping.Unlock()
				all := p.namedSessions(p.ctx, node)
				p.putting.Lock() // any session of this presence in all is in mine from here on
				mine := maps.Clone(p.mine)
				p.putting.Unlock()
				p.endOthers(all, mine, 0)
			})
		}
		return nil
	}
	awaitsHealthCheck := errors.Is(err, errNoHealthCheck)
	if !awaitsHealthCheck && !errors.Is(err, errOtherNode) {
		return err
	}
	e := p.newSession()
	e.TTL = presenceTTL.String()
	if id, err = p.store.createSession(ctx, e); err != nil {
		return err
	}
	p.setSession(id, true, awaitsHealthCheck)
	return nil
}

// namedSessions returns the sessions of this name, also those of other processes, the newest first.
// After an error, which is logged, it returns none.
func (p *presence) namedSessions(ctx context.Context, node string) (all []*api.SessionEntry) {
	err := p.store.do(ctx, "list this node's sessions", requestTimeout, func(q *api.QueryOptions) (err error) {
		all, _, err = p.store.client.Session().Node(node, consistent(q))
		return err
	})
	if err != nil {
		p.store.log.Debug("could not end the sessions of earlier processes of this node", "name", p.name, "error", err)
	}
	all = slices.DeleteFunc(all, func(e *api.SessionEntry) bool { return e.Name != p.sessionName() })
	slices.SortFunc(all, func(a, b *api.SessionEntry) int { return cmp.Compare(b.CreateIndex, a.CreateIndex) })
	return all
}

// endOthers destroys the sessions in all that aren't in mine, except the newest ones, as many as
// keep says. Most are sessions of killed processes. Such a session may live as long as the node.
// While it lives, it holds entries that this process doesn't write, such as those of a role that the
// node had before. If a process of this name is still alive, it opens a new session.
func (p *presence) endOthers(all []*api.SessionEntry, mine map[string]bool, keep int) {
	all = slices.DeleteFunc(all, func(e *api.SessionEntry) bool { return mine[e.ID] })
	for _, e := range all[min(keep, len(all)):] {
		p.store.destroySession(e.ID)
	}
}

func (p *presence) newSession() *api.SessionEntry {
	return &api.SessionEntry{Name: p.sessionName(), Behavior: api.SessionBehaviorRelease, LockDelay: presenceLockDelay}
}

// errOtherNode means that the Consul agent that answers belongs to another node, whose health says nothing of this one.
var errOtherNode = errors.New("the Consul agent belongs to another node")

// openNodeSession creates a session that ends when this node is unhealthy and, if possible, when this process is dead.
// It returns errNoHealthCheck or errOtherNode if there can't be one.
func (p *presence) openNodeSession(ctx context.Context) (id string, err error) {
	s := p.store
	if id, err = s.createSession(ctx, p.newSession()); err != nil {
		return "", err
	}
	info, _, err := s.sessionInfo(ctx, id, api.QueryOptions{RequireConsistent: true}, requestTimeout)
	switch {
	case err != nil:
	case info == nil:
		err = fmt.Errorf("create a session: Consul no longer has the one that it just made: %w", kv.ErrUnavailable)
	case !strings.EqualFold(info.Node, p.name):
		err = errOtherNode
	default:
		p.node = info.Node
		return p.withHeartbeat(ctx, id), nil
	}
	s.destroySession(id)
	return "", err
}

// withHeartbeat replaces plain, a session that depends only on the node's health, by one that also depends on this
// process, and returns that. If this fails, it returns plain: a dead agent is then noticed only when its node is gone,
// unless addHeartbeat replaces plain later.
func (p *presence) withHeartbeat(ctx context.Context, plain string) (id string) {
	if p.heartbeatDenied {
		return plain
	}
	var err error
	if p.heart != nil {
		if id, err = p.heartbeatSession(ctx, knownCheck); err != nil {
			p.stopHeart()
		}
	}
	if p.heart == nil {
		id, err = p.heartbeatSession(ctx, presenceHeartbeat.ttl/2)
	}
	if err != nil {
		p.lacksHeartbeat(ctx, plain, err)
		return plain
	}
	p.hasHeartbeat()
	p.store.destroySession(plain)
	return id
}

// heartbeatSession creates a session that depends on the heartbeat, which it starts if there is
// none. retryFor is as heartbeat.newSession says.
func (p *presence) heartbeatSession(ctx context.Context, retryFor time.Duration) (id string, err error) {
	if p.heart == nil {
		h, err := p.store.startHeartbeat(ctx, presenceHeartbeat)
		if err != nil {
			return "", err
		}
		p.heart = h
		var beats context.Context
		beats, p.endHeart = context.WithCancel(p.ctx)
		go h.keep(beats)
	}
	return p.heart.newSession(ctx, *p.newSession(), retryFor)
}

// lacksHeartbeat notes why a session has no heartbeat. If the session may get one later,
// addHeartbeat will try again.
func (p *presence) lacksHeartbeat(ctx context.Context, session string, err error) {
	p.heartbeatDenied = errors.Is(err, kv.ErrDenied)
	if ctx.Err() == nil && p.heartbeatErrors.FirstOfKind(err) {
		p.store.log.Warn("no heartbeat for this node's entries: if this process dies, the node counts as live until its "+
			"machine is down", "service", PresenceService, "name", p.name, "error", err)
	}
	p.sessionWithoutHeartbeat = ""
	if !mayBeatLater(ctx, err) {
		return
	}
	p.sessionWithoutHeartbeat = session
	if p.heartbeatTimer != nil {
		p.heartbeatTimer.Stop()
	}
	p.heartbeatTimer = time.AfterFunc(p.heartbeatPause.Next(), p.addHeartbeat)
}

// hasHeartbeat notes that a session has a heartbeat.
func (p *presence) hasHeartbeat() {
	p.sessionWithoutHeartbeat = ""
	p.heartbeatErrors.FirstOfKind(nil)
	p.heartbeatPause.Reset()
}

// mayBeatLater reports whether a heartbeat that failed to start may start later: the Consul agent didn't refuse it, or
// the caller's ctx ended before the agent's answer.
func mayBeatLater(ctx context.Context, err error) bool {
	return ctx.Err() != nil || errors.Is(err, kv.ErrUnavailable)
}

// addHeartbeat moves the entries from a session without a heartbeat to one with a heartbeat, and tries again later if
// the Consul agent isn't ready for heartbeats yet.
func (p *presence) addHeartbeat() {
	p.putting.Lock()
	defer p.putting.Unlock()
	if p.closed || p.ctx.Err() != nil || p.session == "" || p.session != p.sessionWithoutHeartbeat {
		return // openNodeSession tries to give a later session a heartbeat
	}
	id, err := p.heartbeatSession(p.ctx, knownCheck)
	if err != nil {
		p.lacksHeartbeat(p.ctx, p.session, err)
		return
	}
	p.hasHeartbeat()
	p.store.log.Info("this node's entries have a heartbeat now", "service", PresenceService, "name", p.name)
	if err := p.moveTo(p.ctx, id); err != nil {
		p.store.log.Debug("could not move this node's entries to a session with a heartbeat", "name", p.name, "error", err)
	}
}

// knownCheck is how long to wait until the servers know a check that was registered earlier. After the restore of a
// snapshot the servers have lost such a check, which the Consul agent notices only after minutes. A new check reaches
// the servers at once.
const knownCheck = time.Second

// stopHeart ends the heartbeat, if there is one, and so the session that depends on it.
func (p *presence) stopHeart() {
	if p.heart != nil {
		p.endHeart()
		p.heart.stop()
		p.heart = nil
	}
}

func (p *presence) setSession(id string, hasTTL, awaitsHealthCheck bool) {
	p.session, p.hasTTL, p.awaitsHealthCheck = id, hasTTL, awaitsHealthCheck
	p.mine[id] = true
	p.wakeWatch()
}

// lose forgets the session, as its entries lost their holder or the values that were put, and closes gone.
func (p *presence) lose() {
	p.session = ""
	close(p.gone)
	p.gone = make(chan struct{})
}

func (p *presence) Close(ctx context.Context) error {
	p.cancel()
	<-p.done
	p.sweeping.Lock()
	defer p.sweeping.Unlock()
	p.putting.Lock()
	defer p.putting.Unlock()
	if p.closed {
		return nil
	}
	p.closed = true
	if p.heartbeatTimer != nil {
		p.heartbeatTimer.Stop()
	}
	defer p.stopHeart()
	if p.sweep != nil && p.sweep.Stop() {
		p.endOthers(p.namedSessions(ctx, p.node), p.mine, 0)
	}
	sessions := p.oldSessions
	if p.session != "" {
		sessions = append(sessions, p.session)
	}
	var errs []error
	for _, session := range sessions {
		for _, key := range slices.Sorted(maps.Keys(p.held)) {
			// Only entries that the session still holds are deleted: after a failure of the session, an entry may belong to
			// a later process.
			if err := p.deleteHeld(ctx, key, session); err != nil && !errors.Is(err, kv.ErrConflict) {
				errs = append(errs, err)
			}
		}
		p.store.destroySession(session)
	}
	return errors.Join(errs...)
}

// deleteHeld deletes an entry that a session holds. If the session doesn't hold it, the error is ErrConflict.
func (p *presence) deleteHeld(ctx context.Context, key, session string) error {
	s := p.store
	ops := api.TxnOps{
		kvOp(&api.KVTxnOp{Verb: api.KVCheckSession, Key: s.prefix + key, Session: session}),
		kvOp(&api.KVTxnOp{Verb: api.KVDelete, Key: s.prefix + key}),
	}
	return s.do(ctx, "delete "+key, requestTimeout, func(q *api.QueryOptions) error { return s.txn(q, ops, false) })
}
