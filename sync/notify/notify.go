// Package notify sends notifications about rollouts: events over HTTP, and commit statuses at the
// Git server. The mirror that holds the lease runs a Notifier, which follows the store's state. For
// each receiver, the Notifier stores at mirror/notified/NAME the last state that the receiver was
// notified of. An event that a receiver didn't take is sent again with the same ID, even by the
// next mirror. It is dropped once it was refused three times, or tried for a day.
//
// A slow or dead receiver delays no other. When a dead one is back, it gets each unit's latest
// state, and not each step on the way. For at most maxPast generations that it missed, it gets an
// event "started".
package notify

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"kedge/deployments"
	"kedge/deployments/wait"
	"kedge/kv"
)

// Notifier carries out a Config. Make it with New, then Run it while this process holds the lease.
type Notifier struct {
	c      Config
	store  kv.Store
	log    *slog.Logger
	client *http.Client
	source string
	lease  kv.Lease // nil: none is needed; Run sets it
	sent   *prometheus.CounterVec
	// giveUp is how long an event or a status is tried. The pauses are the least times between two actions: statusPause
	// from a unit's status to its next pending one, healthPause from one read of the nodes' reports to the next,
	// historyPause until a history that could not be read is tried again. healthHold is as the constant healthHold.
	giveUp, statusPause, healthPause, historyPause, healthHold time.Duration

	mu      sync.Mutex
	seen    seen
	changed chan struct{} // closed and replaced whenever seen may have changed
}

// seen is what a Notifier knows of the store since Run began.
type seen struct {
	units map[deployments.UnitID]unitNow
	// mirrorState is the last mirror/state that parses; zero: there was none.
	mirrorState deployments.MirrorState
	// recordsSynced is set once desired/, and mirrorSynced once mirror/, has been read: see kv.View.Synced.
	recordsSynced, mirrorSynced bool
}

// New returns a notifier. metrics may be nil.
func New(c Config, store kv.Store, metrics *prometheus.Registry, log *slog.Logger) *Notifier {
	n := &Notifier{
		c: c, store: store, log: log, source: "kedge",
		client: &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }},
		giveUp: 24 * time.Hour, statusPause: 5 * time.Second, healthPause: 15 * time.Second,
		historyPause: 5 * time.Second, healthHold: healthHold,
		changed: make(chan struct{}),
		sent: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "kedge_mirror_notifications_total",
			Help: "Notifications by receiver and result: delivered, failed (tried again) or dropped.",
		}, []string{"receiver", "result"}),
	}
	if metrics != nil {
		metrics.MustRegister(n.sent)
	}
	return n
}

// Run sends events and writes statuses until ctx ends, or the store can't be watched, and returns why it ended. It may
// be called again then: it begins with what the store holds by that time, as another mirror may have led meanwhile.
// What receivers were notified of is written only while lease is held; once it turns out to be lost, the error wraps
// kv.ErrLeaseLost. A nil lease is never lost.
func (n *Notifier) Run(ctx context.Context, lease kv.Lease) error {
	n.lease = lease
	n.change(func() { n.seen = seen{} })
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return n.store.Watch(ctx, kv.DesiredPrefix, n.seeRecords) })
	g.Go(func() error { return n.store.Watch(ctx, kv.MirrorPrefix, n.seeMirror) })
	if slices.ContainsFunc(n.c.Receivers, func(r Receiver) bool {
		return len(r.Events) == 0 || slices.Contains(r.Events, KindUnhealthy) || slices.Contains(r.Events, KindRecovered)
	}) {
		g.Go(func() error { return n.followHealth(ctx) })
	}
	for i := range n.c.Receivers {
		r := &n.c.Receivers[i]
		g.Go(func() error { return n.follow(ctx, r.Name, func(c *cursor) error { return n.sendNew(ctx, r, c) }) })
	}
	for i := range n.c.Statuses {
		s := &n.c.Statuses[i]
		g.Go(func() error {
			return n.follow(ctx, s.Name, func(c *cursor) error { return n.writeStatuses(ctx, s, c) })
		})
	}
	return g.Wait()
}

// change calls f, which updates seen, with n.mu held. Then it wakes all calls of follow.
func (n *Notifier) change(f func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	f()
	close(n.changed)
	n.changed = make(chan struct{})
}

func (n *Notifier) seeRecords(v kv.View) {
	if !v.Synced {
		return
	}
	n.change(func() {
		was := n.seen.units
		n.seen.recordsSynced, n.seen.units = true, make(map[deployments.UnitID]unitNow, len(v.Entries))
		for _, e := range v.Entries {
			key, err := kv.ParseKey(e.Key)
			if err != nil {
				continue
			}
			id := key.UnitID()
			u := was[id] // keeps the health, and the last record if the present one doesn't parse
			u.id = id
			if r, err := deployments.ParseRecord(e.Value); err == nil {
				u.record = r
			}
			n.seen.units[id] = u
		}
	})
}

func (n *Notifier) seeMirror(v kv.View) {
	if !v.Synced {
		return
	}
	n.mu.Lock()
	now := n.seen.mirrorState
	same := n.seen.mirrorSynced
	n.mu.Unlock()
	for _, e := range v.Entries {
		if e.Key != kv.MirrorKey {
			continue
		}
		if s, err := deployments.ParseMirrorState(e.Value); err == nil { // the mirror will replace a state that doesn't parse
			same = same && s.Refused == now.Refused && s.Error == now.Error
			now = s
		}
	}
	if !same {
		n.change(func() { n.seen.mirrorState, n.seen.mirrorSynced = now, true })
	}
}

// followHealth polls which nodes are unhealthy until ctx ends, at a pace that costs at most a fiftieth of a core.
func (n *Notifier) followHealth(ctx context.Context) error {
	for {
		began := time.Now()
		entries, err := n.store.List(ctx, kv.StatusPrefix)
		if err == nil {
			sick := unhealthyNodes(entries)
			n.mu.Lock()
			same := true
			for id, u := range n.seen.units {
				same = same && u.healthKnown && slices.Equal(u.unhealthy, sick[id])
			}
			n.mu.Unlock()
			if !same {
				n.change(func() {
					for id, u := range n.seen.units {
						u.unhealthy, u.healthKnown = sick[id], true
						n.seen.units[id] = u
					}
				})
			}
		}
		if err := wait.For(ctx, max(n.healthPause, 50*time.Since(began))); err != nil {
			return err
		}
	}
}

// unhealthyNodes returns, by unit, the names of the live nodes on which the unit's release fails its health checks,
// sorted.
func unhealthyNodes(entries []kv.Entry) map[deployments.UnitID][]string {
	sick := map[deployments.UnitID][]string{}
	for _, e := range entries {
		key, err := kv.ParseKey(e.Key)
		if err != nil || e.Session == "" {
			continue
		}
		report, err := deployments.ParseReport(e.Value)
		if err != nil {
			continue
		}
		for name, u := range report.Units {
			if u.State == deployments.StateUnhealthy {
				id := key.Role.Unit(name)
				sick[id] = append(sick[id], key.Node)
			}
		}
	}
	for _, nodes := range sick {
		slices.Sort(nodes)
	}
	return sick
}

// cursor is the state that one receiver, or one StatusTarget, was notified of. What was dropped
// counts as notified.
type cursor struct {
	Units map[string]notified `json:"units"`
	// Refused is the commit that was refused when the receiver was last up to date; empty: none was.
	Refused string `json:"refused,omitempty"`

	key    string
	stored []byte
	// statusAt is when each unit's status was last written, and healthAt when its health was last notified; a
	// restart loses both.
	statusAt, healthAt map[string]time.Time
	// nextCheck is when to check even if nothing changes; zero: never.
	nextCheck time.Time
}

// wakeAt makes the cursor's follower check at a time, even if nothing changes.
func (c *cursor) wakeAt(at time.Time) {
	if c.nextCheck.IsZero() || at.Before(c.nextCheck) {
		c.nextCheck = at
	}
}

// follow reads a receiver's cursor, calls step whenever there may be something to send, and saves the cursor after each
// step. It returns when ctx ends, or with step's error.
func (n *Notifier) follow(ctx context.Context, name string, step func(*cursor) error) error {
	c := &cursor{key: kv.MirrorPrefix + "notified/" + name, statusAt: map[string]time.Time{},
		healthAt: map[string]time.Time{}}
	retry := wait.NewBackoff(time.Second, time.Minute)
	for {
		err := n.load(ctx, c)
		if err == nil {
			break
		}
		if retry.Tries() == 0 {
			n.log.Warn("could not read which events a receiver has had: trying again, and sending it none until then",
				"receiver", name, "error", err)
		}
		if err := retry.Wait(ctx); err != nil {
			return err
		}
	}
	for {
		n.mu.Lock()
		changed, synced := n.changed, n.seen.recordsSynced && n.seen.mirrorSynced
		n.mu.Unlock()
		c.nextCheck = time.Time{}
		if synced {
			if c.Units == nil {
				n.startAtPresent(c)
			}
			if err := step(c); err != nil {
				return err
			}
			if err := n.save(ctx, name, c); err != nil {
				return err
			}
		}
		var clock <-chan time.Time
		if !c.nextCheck.IsZero() {
			clock = time.After(time.Until(c.nextCheck))
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-changed:
		case <-clock:
		}
	}
}

// load reads a receiver's cursor into c. c.Units stays nil if the store has no cursor for the receiver, or one that
// doesn't parse.
func (n *Notifier) load(ctx context.Context, c *cursor) error {
	e, err := n.store.Get(ctx, c.key)
	switch {
	case errors.Is(err, kv.ErrNotFound):
		return nil
	case err != nil:
		return err
	}
	if err := json.Unmarshal(e.Value, c); err != nil {
		n.log.Warn("the record of which events a receiver has had doesn't parse: it is told only what happens from now on",
			"key", c.key, "error", err)
		c.Units = nil
	}
	c.stored = e.Value
	return nil
}

// save writes a cursor if it changed. It returns an error only if the lease is lost: one that wraps kv.ErrLeaseLost.
// After any other failure the next call tries again; until then a new mirror would resend.
func (n *Notifier) save(ctx context.Context, name string, c *cursor) error {
	value, err := json.Marshal(c)
	if err != nil {
		panic(err) // plain data always encodes
	}
	if string(value) == string(c.stored) {
		return nil
	}
	if err := n.store.Commit(ctx, n.lease, kv.Put(c.key, value)); err != nil {
		if errors.Is(err, kv.ErrLeaseLost) {
			return fmt.Errorf("write which events the receiver %s has had: %w", name, err)
		}
		if ctx.Err() == nil {
			n.log.Warn("could not write which events a receiver has had: another mirror would send them again",
				"receiver", name, "error", err)
		}
		return nil
	}
	c.stored = value
	return nil
}

// startAtPresent begins a cursor at the state known now, so that a new receiver isn't notified of the past. State that
// is read only later, such as the nodes' health, is news to it.
func (n *Notifier) startAtPresent(c *cursor) {
	units, refused := n.current()
	c.Units, c.Refused = map[string]notified{}, refused.Refused
	for _, u := range units {
		_, now := eventsSince(notified{Generation: u.record.Generation}, u)
		if s, ok := statusOf(u); ok {
			now.Status = hashOf(s)
		}
		c.Units[u.id.String()] = now
	}
}

// current returns all units, sorted, and the mirror's state.
func (n *Notifier) current() ([]unitNow, deployments.MirrorState) {
	n.mu.Lock()
	defer n.mu.Unlock()
	units := slices.Collect(maps.Values(n.seen.units))
	slices.SortFunc(units, func(a, b unitNow) int { return a.id.Compare(b.id) })
	return units, n.seen.mirrorState
}

// sendNew sends a receiver the events that it lacks. It returns an error only when ctx has ended, or the lease is lost.
func (n *Notifier) sendNew(ctx context.Context, r *Receiver, c *cursor) error {
	units, state := n.current()
	gone := maps.Clone(c.Units)
	for _, u := range units {
		name := u.id.String()
		delete(gone, name)
		if !matches(r.Units, u.id) || u.record.Generation == 0 {
			continue
		}
		was := c.Units[name]
		if next := c.healthAt[name].Add(n.healthHold); u.healthKnown && time.Now().Before(next) &&
			len(u.unhealthy) > 0 != was.Unhealthy {
			u.healthKnown = false
			c.wakeAt(next)
		}
		events, now := eventsSince(was, u)
		if len(events) > 0 || now.Generation > was.Generation {
			var later bool
			if u.history, later = n.historyOf(ctx, u.id); later {
				c.wakeAt(time.Now().Add(n.historyPause))
				continue
			}
			events, now = eventsSince(was, u)
		}
		now.Status = was.Status
		for _, e := range events {
			if err := n.send(ctx, r, e); err != nil {
				return err
			}
		}
		if now.HealthChanges != was.HealthChanges {
			c.healthAt[name] = time.Now()
		}
		if c.Units[name] = now; len(events) > 0 {
			if err := n.save(ctx, r.Name, c); err != nil {
				return err
			}
		}
	}
	for name := range gone {
		delete(c.Units, name)
		delete(c.healthAt, name)
	}
	if state.Refused != c.Refused {
		if state.Refused != "" {
			e := Event{Kind: KindRefused, ID: "refused/" + state.Refused, Data: Data{Commit: state.Refused,
				Message: fmt.Sprintf("commit %.12s is not taken: %s", state.Refused, state.Error)}}
			if err := n.send(ctx, r, e); err != nil {
				return err
			}
		}
		c.Refused = state.Refused
	}
	return nil
}

// maxPast bounds the missed generations of one unit that a receiver is told of.
const maxPast = 5

// historyOf returns the newest entries of a unit's history that parse, at most maxPast, oldest first. later says that
// the store is away, so that the history is to be read again; any other error is logged, and nothing is returned.
func (n *Notifier) historyOf(ctx context.Context, id deployments.UnitID) (past []deployments.History, later bool) {
	entries, err := n.store.List(ctx, kv.HistoryPrefixOf(id))
	if errors.Is(err, kv.ErrUnavailable) && !errors.Is(err, kv.ErrTooLarge) || ctx.Err() != nil {
		n.log.Debug("could not read a unit's history: its events wait", "unit", id.String(), "error", err)
		return nil, true
	}
	if err != nil {
		n.log.Warn("could not read a unit's history: no event of its rollout's start is sent, and others lack the author",
			"unit", id.String(), "error", err)
		return nil, false
	}
	for _, e := range entries {
		if h, err := deployments.ParseHistory(e.Value); err == nil {
			past = append(past, h)
		}
	}
	slices.SortFunc(past, func(a, b deployments.History) int { return cmp.Compare(a.Generation, b.Generation) })
	return past[max(0, len(past)-maxPast):], false
}

const (
	// healthHold is the least time between two events about one unit's health to one receiver: health may flap.
	healthHold = 5 * time.Minute
	// maxPause bounds the average pause between two tries (one may last twice as long), and each Retry-After.
	maxPause = 5 * time.Minute
	// maxRefusals is the number of refusals after which an event or a status is dropped.
	maxRefusals = 3
)

// send delivers an event, unless the receiver doesn't want its kind. It returns the error of try.
func (n *Notifier) send(ctx context.Context, r *Receiver, e Event) error {
	if len(r.Events) > 0 && !slices.Contains(r.Events, e.Kind) {
		return nil
	}
	if e.Data.Unit != "" && n.c.Link != "" {
		e.Data.Link = strings.ReplaceAll(n.c.Link, "{unit}", e.Data.Unit)
	}
	e.Data.sanitize()
	return n.try(ctx, r.Name, "event", e.ID, func() error { return r.deliver(ctx, n.client, n.source, e) })
}

// try calls f until it succeeds, was refused maxRefusals times, or giveUp has passed. It logs when it gives up, and
// returns an error only when ctx has ended.
func (n *Notifier) try(ctx context.Context, receiver, what, id string, f func() error) error {
	retry, began, refusals := wait.NewBackoff(time.Second, maxPause), time.Now(), 0
	for {
		err := f()
		switch {
		case err == nil:
			n.sent.WithLabelValues(receiver, "delivered").Inc()
			return nil
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case errors.Is(err, errRefused):
			refusals++
		}
		if refusals >= maxRefusals || time.Since(began) > n.giveUp {
			n.sent.WithLabelValues(receiver, "dropped").Inc()
			n.log.Error("dropped a notification: the receiver refused it, or took none for a day",
				"receiver", receiver, what, id, "tries", retry.Tries()+1, "error", err)
			return nil
		}
		n.sent.WithLabelValues(receiver, "failed").Inc()
		if retry.Tries() == 0 {
			n.log.Warn("a notification was not taken: trying again", "receiver", receiver, what, id, "error", err)
		}
		pause := retry.Next()
		if asked := (*retryAfterError)(nil); errors.As(err, &asked) {
			pause = max(pause, asked.after)
		}
		if err := wait.For(ctx, pause); err != nil {
			return err
		}
	}
}

// writeStatuses writes the commit statuses that changed, and a refused commit's. It fails only when ctx
// has ended, or the lease is lost.
func (n *Notifier) writeStatuses(ctx context.Context, s *StatusTarget, c *cursor) error {
	units, state := n.current()
	gone := maps.Clone(c.Units)
	for _, u := range units {
		name := u.id.String()
		delete(gone, name)
		status, ok := statusOf(u)
		was := c.Units[name]
		if !ok || !matches(s.Units, u.id) || hashOf(status) == was.Status {
			continue
		}
		if next := c.statusAt[name].Add(n.statusPause); status.state == statusPending && time.Now().Before(next) {
			c.wakeAt(next)
			continue
		}
		if n.c.Link != "" {
			status.link = strings.ReplaceAll(n.c.Link, "{unit}", name)
		}
		if err := n.try(ctx, s.Name, "commit", status.commit,
			func() error { return s.write(ctx, n.client, status) }); err != nil {
			return err
		}
		c.statusAt[name] = time.Now()
		status.link = ""
		c.Units[name] = notified{Generation: u.record.Generation, Status: hashOf(status)}
		if err := n.save(ctx, s.Name, c); err != nil {
			return err
		}
	}
	for name := range gone {
		delete(c.Units, name)
		delete(c.statusAt, name)
	}
	if state.Refused != "" && state.Refused != c.Refused {
		refused := commitStatus{commit: state.Refused, name: "kedge", state: statusFailure, description: clipped(state.Error)}
		if err := n.try(ctx, s.Name, "commit", refused.commit,
			func() error { return s.write(ctx, n.client, refused) }); err != nil {
			return err
		}
	}
	c.Refused = state.Refused
	return nil
}

// hashOf returns a text that identifies a status, apart from its link.
func hashOf(s commitStatus) string {
	h := fnv.New64a()
	fmt.Fprintf(h, "%s\n%s\n%s\n%s", s.commit, s.name, s.state, s.description)
	return fmt.Sprintf("%016x", h.Sum64())
}
