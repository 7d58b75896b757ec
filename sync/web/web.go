// Package web is the dashboard: what kedge status, explain and history print, as pages that follow the store live.
//
// It is read-only: its forms only search, it takes only GET and HEAD, and needs a token that may
// list keys and no more. It asks nobody who they are, so whoever reaches its port sees the fleet.
// Config.Hosts keeps web sites that its users visit from reading it. All that the dashboard shows
// was written by others, and is escaped, cleaned and bounded.
//
// A page is whole without scripts. With scripts it follows the store, by server-sent events that have what changed.
//
// A page is made in three steps. Package fleet reads a Fleet, snapshot.go computes the counts that
// pages show of it, and overview.go, unit.go, node.go or overrides.go makes a view. A template of
// the same name puts the view in HTML. After a change of a template: go generate ./sync/web.
package web

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"kedge/deployments"
	"kedge/deployments/wait"
	"kedge/kv"
	"kedge/sync/conns"
	"kedge/sync/fleet"
)

//go:generate go tool -modfile=../../.tools/templ/go.mod templ generate

// Config configures a dashboard.
type Config struct {
	Store kv.Store
	// Listen is HOST:PORT; with port 0 the system chooses one, see Addr.
	Listen string
	// Hosts are the host names by which browsers reach the dashboard, besides localhost and IP addresses. Other names are
	// refused: otherwise a web site could point its own name at this server, and read the dashboard through its visitors'
	// browsers (DNS rebinding).
	Hosts []string
	// CommitURL is the URL of a commit's page, with {commit} for its hash; empty: commits are no links.
	CommitURL string
	Log       *slog.Logger // nil: discard
}

// Web is a dashboard.
type Web struct {
	c        Config
	listener net.Listener
	// viewers bounds how many browsers receive changes.
	viewers       chan struct{}
	latestChanges *changeCache
	trend         *trends

	mu            sync.Mutex
	place         string        // the store's datacenter; empty: unknown
	current       *snapshot     // nil: not read yet
	changed       chan struct{} // closed when current is replaced
	recent        []*rendered
	histories     map[deployments.UnitID]*unitHistory
	lastRequested time.Time // when a page was last requested
}

// maxViewers bounds the browsers with an open stream.
const maxViewers = 200

// maxConns bounds the connections: a new one replaces the oldest. If that ends a browser's stream, the browser connects
// again.
const maxConns = 1000

// New returns a dashboard that listens at c.Listen, for Run to serve. It is an error if New can't listen there, or if
// c.CommitURL is invalid.
func New(c Config) (*Web, error) {
	c.Log = cmp.Or(c.Log, slog.New(slog.DiscardHandler))
	if err := checkCommitURL(c.CommitURL); err != nil {
		return nil, fmt.Errorf("dashboard: %w", err)
	}
	l, err := net.Listen("tcp", c.Listen)
	if err != nil {
		return nil, fmt.Errorf("dashboard: %w", err)
	}
	return &Web{
		c: c, listener: l, viewers: make(chan struct{}, maxViewers), changed: make(chan struct{}),
		histories:     map[deployments.UnitID]*unitHistory{},
		latestChanges: &changeCache{known: map[deployments.UnitID]change{}},
		trend:         &trends{units: map[deployments.UnitID][]sample{}},
	}, nil
}

// Addr returns the address that the dashboard listens on.
func (w *Web) Addr() string { return w.listener.Addr().String() }

// Run watches the store and answers requests until ctx ends; then it returns nil. An error of the HTTP server ends it,
// as does a store that can't be watched at all. While the store is away, pages show what was last known, and say so.
func (w *Web) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s := &http.Server{
		Handler: w.handler(), ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second,
		WriteTimeout: writeWithin, IdleTimeout: time.Minute,
		MaxHeaderBytes: 16 << 10,
		ConnState:      (&conns.Limit{Max: maxConns}).Note,
		BaseContext:    func(net.Listener) context.Context { return ctx }, // the end of ctx ends the streams
		ErrorLog:       slog.NewLogLogger(w.c.Log.Handler(), slog.LevelDebug),
	}
	var helpers sync.WaitGroup
	defer helpers.Wait()
	defer cancel()
	news := wait.NewSignal()
	helpers.Go(func() { w.readChanges(ctx, news) })
	helpers.Go(func() { w.probe(ctx) })
	watched := make(chan error, 1)
	go func() {
		defer cancel()
		watched <- fleet.Watch(ctx, w.c.Store, fleet.Filter{}, func(f *fleet.Fleet) {
			w.show(f)
			news.Set()
		})
	}()
	err := conns.Serve(ctx, s, w.listener, 2*time.Second)
	cancel()
	if watchErr := <-watched; err == nil && !errors.Is(watchErr, context.Canceled) {
		err = watchErr
	}
	if err != nil {
		return fmt.Errorf("dashboard: %w", err)
	}
	return nil
}

// show makes a fleet the current one, and records it in the trends.
func (w *Web) show(f *fleet.Fleet) {
	s := &snapshot{Fleet: f}
	w.trend.record(s.all(), f.At)
	w.replace(func(old *snapshot) *snapshot {
		if old != nil {
			s.storeError = old.storeError
		}
		return s
	})
}

// replace makes the result of change the current snapshot. change gets the old one, or nil if there
// is none. If change returns nil, the old one stays.
func (w *Web) replace(change func(old *snapshot) *snapshot) {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := change(w.current)
	if s == nil {
		return
	}
	s.trend, s.latestChanges, s.pages = w.trend, w.latestChanges, map[string]*rendered{}
	w.current = s
	close(w.changed)
	w.changed = make(chan struct{})
}

// copied returns a copy of a snapshot, without its rendered pages; nil if s is nil. It is for pages
// to be rendered anew though the fleet is the same: when the store went away or came back, or the
// units' newest changes were read.
func (s *snapshot) copied() *snapshot {
	if s == nil {
		return nil
	}
	same := &snapshot{Fleet: s.Fleet, storeError: s.storeError, units: s.all()}
	same.once.Do(func() {})
	return same
}

// latest returns the current snapshot, or nil before the first read, and a channel that is closed at its next change.
func (w *Web) latest() (*snapshot, <-chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.current, w.changed
}

// readChanges waits for changes of the fleet until ctx ends. After each it reads the history
// entries of the units' current generations, for at most maxChanges units that the cache lacks. If
// it has read all of them, pages are rendered anew.
func (w *Web) readChanges(ctx context.Context, news wait.Signal) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-news.C():
		}
		if s, _ := w.latest(); s != nil && w.latestChanges.load(ctx, w.c.Store, s.Fleet) {
			w.replace((*snapshot).copied)
		}
	}
}

const (
	// probeEvery and probeWithin bound how long an unresponsive store goes unnoticed. A watch would notice only
	// after a minute, as it may just have no news.
	probeEvery  = 1500 * time.Millisecond
	probeWithin = 2 * time.Second
	// probeFor is how long after the last request for a page the store is probed, if no browser follows changes.
	probeFor = time.Minute
)

// noteRequest records that a page was requested.
func (w *Web) noteRequest() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.lastRequested = time.Now()
}

// probe checks every probeEvery, until ctx ends, that the store answers. While the store doesn't answer, probe sets the
// current snapshot's storeError. It pauses while no page is requested or followed.
func (w *Web) probe(ctx context.Context) {
	var since time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(probeEvery):
		}
		w.mu.Lock()
		idle := len(w.viewers) == 0 && time.Since(w.lastRequested) > probeFor
		w.mu.Unlock()
		s, _ := w.latest()
		if idle || s == nil {
			continue
		}
		err := w.probeStore(ctx)
		why := ""
		switch {
		case err == nil:
			since = time.Time{}
		case since.IsZero():
			since = time.Now()
		}
		if err != nil {
			why = fmt.Sprintf("The store has not been readable since %s: %v", since.UTC().Format("15:04:05 UTC"), err)
		}
		if ctx.Err() == nil && why != s.storeError {
			w.replace(func(old *snapshot) *snapshot {
				s := old.copied()
				s.storeError = why
				return s
			})
		}
	}
}

// probeStore returns an error unless the store answers a read in time. It also reads the store's datacenter, until that
// is known.
func (w *Web) probeStore(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, probeWithin)
	defer cancel()
	_, err := w.c.Store.Get(ctx, kv.MirrorKey)
	if errors.Is(err, kv.ErrNotFound) || errors.Is(err, kv.ErrDenied) {
		err = nil
	}
	if err != nil {
		return err
	}
	located, ok := w.c.Store.(kv.Located)
	w.mu.Lock()
	known := w.place != ""
	w.mu.Unlock()
	if !ok || known {
		return nil
	}
	if datacenter, err := located.Datacenter(ctx); err == nil && datacenter != "" {
		w.mu.Lock()
		w.place = datacenter
		w.mu.Unlock()
	}
	return nil
}

// source returns the store's name for people: of Consul the datacenter, once known, and the prefix;
// of any other store its String.
func (w *Web) source() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	text := w.c.Store.String()
	if _, prefix, ok := strings.Cut(text, ", prefix "); ok {
		text = strings.TrimSpace(w.place + " " + prefix)
	}
	return fleet.Clean(text, 80)
}
