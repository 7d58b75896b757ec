// Package web is the dashboard: what kedge status, explain and history print, as pages that follow the store live.
//
// It is read-only: it has no form, takes no request but GET, and needs a token that may list keys and no more. It asks nobody who
// they are, so whoever reaches its port sees the fleet; Config.Hosts says why a web site that its users visit does not. All that it
// shows was written by others, and is escaped.
//
// A page is whole without scripts. With them it is told each change as HTML of its main part, by server-sent events.
package web

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"kedge/kv"
	"kedge/sync/fleet"
)

// Config is what a dashboard needs.
type Config struct {
	Store kv.Store
	// Listen is HOST:PORT; port 0: one of the system's choosing, see Addr.
	Listen string
	// Hosts are the names by which browsers reach it, beside localhost and every IP address. Others are refused: a web site whose name
	// its owner points at this server could else be made to read it by its visitors' browsers (DNS rebinding).
	Hosts []string
	Log   *slog.Logger // nil: none
}

// Web is a dashboard.
type Web struct {
	c        Config
	listener net.Listener
	// viewers bounds how many browsers are told of changes.
	viewers chan struct{}

	mu      sync.Mutex
	fleet   *fleet.Fleet  // nil: not yet read
	changed chan struct{} // closed when fleet was replaced
}

// maxViewers holds a connection, and draws a page at each change.
const maxViewers = 200

// New listens. An error is the listener's.
func New(c Config) (*Web, error) {
	c.Log = cmp.Or(c.Log, slog.New(slog.DiscardHandler))
	l, err := net.Listen("tcp", c.Listen)
	if err != nil {
		return nil, fmt.Errorf("dashboard: %w", err)
	}
	return &Web{c: c, listener: l, viewers: make(chan struct{}, maxViewers), changed: make(chan struct{})}, nil
}

// Addr is where it listens.
func (w *Web) Addr() string { return w.listener.Addr().String() }

// Run watches the store and answers until ctx ends; it returns nil then. An outage of the store does not end it: it is shown.
func (w *Web) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s := &http.Server{
		Handler: w.handler(), ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: writeWithin, IdleTimeout: time.Minute,
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
	watched := make(chan error, 1)
	go func() {
		defer cancel()
		watched <- fleet.Watch(ctx, w.c.Store, fleet.Filter{}, w.show)
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

func (w *Web) show(f *fleet.Fleet) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.fleet = f
	close(w.changed)
	w.changed = make(chan struct{})
}

// now gives the fleet as of now, or nil before it was read, and what is closed at its next change.
func (w *Web) now() (*fleet.Fleet, <-chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.fleet == nil {
		return nil, w.changed
	}
	f := *w.fleet
	f.At = time.Now() // what is shown of it is how long ago things were
	return &f, w.changed
}
