// Package conns bounds the connections of an HTTP server.
package conns

import (
	"net"
	"net/http"
	"slices"
	"sync"
)

// Limit bounds a server's connections: a new one beyond Max closes the oldest. Idle ones count as the oldest, so that a
// load balancer can always connect, whatever other clients do.
type Limit struct {
	Max int

	mu   sync.Mutex
	open []net.Conn // oldest first
}

// Note is for http.Server.ConnState: it keeps track of a connection's state.
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
