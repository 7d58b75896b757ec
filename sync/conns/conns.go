// Package conns bounds the connections of an HTTP server.
package conns

import (
	"net"
	"net/http"
	"slices"
	"sync"
)

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
