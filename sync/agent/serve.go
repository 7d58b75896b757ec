package agent

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

const (
	// maxConns bounds the connections of each address: the oldest makes room for a new one.
	maxConns = 100
	// An answer takes milliseconds, but that of /live, which waits up to 10 s for a loop that hangs.
	headerTimeout = 5 * time.Second
	readTimeout   = 10 * time.Second
	writeTimeout  = 20 * time.Second
	idleTimeout   = time.Minute
)

// onlyThisMachine reports whether an address can be reached from this machine alone.
func onlyThisMachine(addr net.Addr) bool {
	if tcp, ok := addr.(*net.TCPAddr); ok {
		return tcp.IP.IsLoopback()
	}
	return addr.Network() == "unix"
}

// serve answers at Listen and ListenStatus until ctx ends. What the node runs and why is told at Listen only if it can
// be reached from this machine alone: whoever asks for the node's health need not know.
func (a *Agent) serve(ctx context.Context) error {
	if a.listener == nil {
		return nil
	}
	open := onlyThisMachine(a.listener.Addr())
	return serveOn(ctx, a.listener, a.handler(open))
}

func (a *Agent) serveStatus(ctx context.Context) error {
	if a.statusListener == nil {
		return nil
	}
	return serveOn(ctx, a.statusListener, a.handler(true))
}

// serveOn serves l until ctx ends.
func serveOn(ctx context.Context, l net.Listener, h http.Handler) error {
	conns := &connections{}
	s := &http.Server{
		Handler: h, ReadHeaderTimeout: headerTimeout, ReadTimeout: readTimeout, WriteTimeout: writeTimeout,
		IdleTimeout: idleTimeout, MaxHeaderBytes: 16 << 10, ConnState: conns.note,
	}
	stop := context.AfterFunc(ctx, func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		if s.Shutdown(ctx) != nil {
			s.Close()
		}
	})
	defer stop()
	if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serving %s: %w", l.Addr(), err)
	}
	return nil
}

// connections bounds a server's connections. Those that are held open for nothing are the oldest: closing one of
// them lets a load balancer in whatever others do.
type connections struct {
	mu   sync.Mutex
	open []net.Conn // the oldest first
}

func (c *connections) note(conn net.Conn, state http.ConnState) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch state {
	case http.StateNew:
		c.open = append(c.open, conn)
		if len(c.open) > maxConns {
			c.open[0].Close()
			c.open = slices.Delete(c.open, 0, 1)
		}
	case http.StateClosed, http.StateHijacked:
		if i := slices.Index(c.open, conn); i >= 0 {
			c.open = slices.Delete(c.open, i, i+1)
		}
	}
}
