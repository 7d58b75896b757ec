// Package web is the dashboard: what kedge status, explain and history print, as pages that follow the store live.
//
// It is read-only: its one form searches, it takes no request but GET, and needs a token that may list keys and no
// more. It
// asks nobody who they are, so whoever reaches its port sees the fleet; Config.Hosts says why a web site that its
// users visit
// does not. All that it shows was written by others, and is escaped, cleaned and bounded.
//
// A page is whole without scripts. With them it is told what has changed of it, by server-sent events.
//
// Pages are made in three steps: fleet.Fleet, what snapshot.go counts of it, and a view (overview.go, unit.go, node.go,
// overrides.go) that a template of the same name puts in HTML. After a change of a template: go generate ./sync/web.
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
	"kedge/sync/fleet"
)

//go:generate go tool -modfile=../../.tools/templ/go.mod templ generate

// Config is what a dashboard needs.
type Config struct {
	Store kv.Store
	// Listen is HOST:PORT; port 0: one of the system's choosing, see Addr.
	Listen string
	// Hosts are the names by which browsers reach it, beside localhost and every IP address. Others are refused: a
	// web site whose name
	// its owner points at this server could else be made to read it by its visitors' browsers (DNS rebinding).
	Hosts []string
	// CommitURL is where a commit can be looked at, with {commit} in the place of its hash; empty: commits are no links.
	CommitURL string
	Log       *slog.Logger // nil: none
}

// Web is a dashboard.
type Web struct {
	c        Config
	listener net.Listener
	// viewers bounds how many browsers are told of changes.
	viewers chan struct{}
	log     *changes
	trend   *trends

	mu      sync.Mutex
	place   string        // of the store: see source
	current *snapshot     // nil: not yet read
	changed chan struct{} // closed when current was replaced
	recent  []*rendered
	pasts   map[deployments.UnitID]*past
	used    time.Time // when somebody asked for a page
}

// maxViewers hold a connection each.
const maxViewers = 200

// New listens. An error is the listener's, or the configuration's.
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
		pasts: map[deployments.UnitID]*past{},
		log:   &changes{known: map[deployments.UnitID]change{}},
		trend: &trends{units: map[deployments.UnitID][]sample{}},
	}, nil
}

// Addr is where it listens.
func (w *Web) Addr() string { return w.listener.Addr().String() }

// Run watches the store and answers until ctx ends; it returns nil then. An outage of the store does not end it:
// it is shown.
func (w *Web) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s := &http.Server{
		Handler: w.handler(), ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second,
		WriteTimeout: writeWithin, IdleTimeout: time.Minute,
		MaxHeaderBytes: 16 << 10,
		BaseContext:    func(net.Listener) context.Context { return ctx }, // ends the streams
		ErrorLog:       slog.NewLogLogger(w.c.Log.Handler(), slog.LevelDebug),
	}
	defer context.AfterFunc(ctx, func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		defer cancel()
		if s.Shutdown(ctx) != nil {
			s.Close()
		}
	})()
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
	err := s.Serve(w.listener)
	if errors.Is(err, http.ErrServerClosed) {
		err = nil
	}
	cancel()
	if watchErr := <-watched; err == nil && !errors.Is(watchErr, context.Canceled) {
		err = watchErr
	}
	if err != nil {
		return fmt.Errorf("dashboard: %w", err)
	}
	return nil
}

// show makes a fleet the present one.
func (w *Web) show(f *fleet.Fleet) {
	s := &snapshot{Fleet: f}
	w.trend.record(s.all(), f.At)
	w.replace(func(old *snapshot) *snapshot {
		if old != nil {
			s.away = old.away
		}
		return s
	})
}

// replace puts another snapshot in the place of the last, nil if there is none. A change that returns nil is none.
func (w *Web) replace(change func(old *snapshot) *snapshot) {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := change(w.current)
	if s == nil {
		return
	}
	s.trend, s.log, s.pages = w.trend, w.log, map[string]*rendered{}
	w.current = s
	close(w.changed)
	w.changed = make(chan struct{})
}

// again returns the snapshot's fleet as a new snapshot, after something beside the fleet has changed.
func (s *snapshot) again() *snapshot {
	if s == nil {
		return nil
	}
	same := &snapshot{Fleet: s.Fleet, away: s.away, units: s.all()}
	same.once.Do(func() {})
	return same
}

// now returns the fleet as it was read last, or nil before that, and what is closed at its next change.
func (w *Web) now() (*snapshot, <-chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.current, w.changed
}

// readChanges reads who changed what after each change of the fleet.
func (w *Web) readChanges(ctx context.Context, news wait.Signal) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-news.C():
		}
		if s, _ := w.now(); s != nil && w.log.load(ctx, w.c.Store, s.Fleet) {
			w.replace((*snapshot).again)
		}
	}
}

const (
	// probeEvery and probeWithin bound how long a store that no longer answers goes unnoticed. A watch notices after a
	// minute: until then it may just have nothing to tell.
	probeEvery  = 1500 * time.Millisecond
	probeWithin = 2 * time.Second
	// probeFor is how long after the last look at a page the store is asked.
	probeFor = time.Minute
)

// asked notes that somebody looks.
func (w *Web) asked() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.used = time.Now()
}

// probe checks that the store answers, while somebody looks.
func (w *Web) probe(ctx context.Context) {
	var since time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(probeEvery):
		}
		w.mu.Lock()
		idle := len(w.viewers) == 0 && time.Since(w.used) > probeFor
		w.mu.Unlock()
		s, _ := w.now()
		if idle || s == nil {
			continue
		}
		err := w.ask(ctx)
		why := ""
		switch {
		case err == nil:
			since = time.Time{}
		case since.IsZero():
			since = time.Now()
		}
		if err != nil {
			why = fmt.Sprintf("The store has not answered since %s: %v", since.UTC().Format("15:04:05 UTC"), err)
		}
		if ctx.Err() == nil && why != s.away {
			w.replace(func(old *snapshot) *snapshot {
				s := old.again()
				s.away = why
				return s
			})
		}
	}
}

// ask reads a key, and asks for the store's place until it is known.
func (w *Web) ask(ctx context.Context) error {
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

// source names the store for people: its datacenter and prefix.
func (w *Web) source() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	text := w.c.Store.String()
	if _, prefix, ok := strings.Cut(text, ", prefix "); ok {
		text = strings.TrimSpace(w.place + " " + prefix)
	}
	return fleet.Clean(text, 80)
}
