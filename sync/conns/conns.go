// Package conns runs HTTP servers, and bounds their connections.
package conns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"
)

// Serve serves l until ctx ends, and then returns nil. Before it returns, requests under way have ended, or grace has
// passed and their connections are closed. Any other end of the server is an error.
func Serve(ctx context.Context, s *http.Server, l net.Listener, grace time.Duration) error {
	down := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(down)
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace)
		defer cancel()
		if s.Shutdown(ctx) != nil {
			s.Close()
		}
	})
	err := s.Serve(l)
	if !stop() {
		<-down
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	s.Close()
	return fmt.Errorf("serve %s: %w", l.Addr(), err)
}

// Limit bounds a server's connections: a new one beyond Max closes the one that has been open longest, even if it is in
// use. So a load balancer can always connect, whatever other clients do.
type Limit struct {
	Max int

	mu   sync.Mutex
	open []net.Conn // oldest first
}

// Note records a connection's new state, and closes the oldest connection if there are too many. It is for
// http.Server.ConnState.
func (l *Limit) Note(conn net.Conn, state http.ConnState) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch state {
	case http.StateNew:
		l.open = append(l.open, conn)
		if len(l.open) > l.Max {
			l.open[0].Close()
			l.open = slices.Delete(l.open, 0, 1)
		}
	case http.StateClosed, http.StateHijacked:
		if i := slices.Index(l.open, conn); i >= 0 {
			l.open = slices.Delete(l.open, i, i+1)
		}
	}
}
