package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"

	"kedge/deployments"
	"kedge/sync/conns"
)

// Alive reports whether the agent's loop still runs, for the watchdog and /live. It takes up to 10 s to return
// false.
func (a *Agent) Alive() bool {
	t := time.NewTimer(10 * time.Second)
	defer t.Stop()
	select {
	case a.pulse <- struct{}{}:
		return true
	case <-t.C:
		return false
	}
}

// Retry makes a unit retry at once what failed on this node, and what waits for its next try. The zero UnitID means all
// units. Retry reports whether it found a unit.
func (a *Agent) Retry(id deployments.UnitID) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	found := false
	for _, u := range a.units {
		if id == (deployments.UnitID{}) || u.id == id {
			found = true
			u.log.Info("an operator asked on this node to retry the unit")
			u.mustForget, u.refused = true, nil
			u.retry.Reset()
			u.retryAt = time.Time{}
			u.wake.Set()
		}
	}
	a.changed.Set()
	return found
}

// maxSocketPath is the kernel's limit for the path of a socket.
const maxSocketPath = 107

// handler returns a handler of /ready, /converged and /live. If open is set, it also serves /status, and /metrics if
// there is a registry; otherwise it refuses both with 403.
func (a *Agent) handler(open bool) *http.ServeMux {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /ready", a.conditionHandler("ready", a.unready))
	mux.HandleFunc("GET /converged", a.conditionHandler("converged", a.unconverged))
	mux.HandleFunc("GET /live", func(w http.ResponseWriter, _ *http.Request) {
		if !a.Alive() {
			http.Error(w, "the agent hangs: its loop has not answered for 10s", http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	if !open {
		refuse := func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, "this address serves neither /status nor /metrics: ask at the address in listen_status, or run "+
				"kedge explain UNIT as root on the node", http.StatusForbidden)
		}
		mux.HandleFunc("GET /status", refuse)
		mux.HandleFunc("GET /metrics", refuse)
		return mux
	}
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, http.StatusOK, a.Status()) })
	if a.c.Metrics != nil {
		mux.Handle("GET /metrics", promhttp.HandlerFor(a.c.Metrics, promhttp.HandlerOpts{}))
	}
	return mux
}

// conditionHandler returns a handler for the condition called name. against returns the reasons why the condition
// doesn't hold. Without reasons the handler answers 200, otherwise 503 with the reasons.
func (a *Agent) conditionHandler(name string, against func() map[string]string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		a.mu.Lock()
		messages := against()
		a.mu.Unlock()
		if len(messages) > 0 {
			writeJSON(w, http.StatusServiceUnavailable, map[string]any{name: false, "messages": messages})
			return
		}
		writeJSON(w, http.StatusOK, map[string]any{name: true})
	}
}

func writeJSON(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(code)
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	_ = e.Encode(v) // an error means that the client has gone
}

// noSocket logs why the agent runs without its socket. It returns nil.
func (a *Agent) noSocket(path string, err error) error {
	a.c.Log.Warn("could not listen at the agent's socket: kedge explain UNIT does not work on this node", "path", path,
		"error", err)
	return nil
}

// serveSocket serves all that handler does, and POST /retry?unit=STAGE/ROLE/UNIT (without unit: all units), until ctx
// ends. It listens at a socket that only the agent's own user can open. If it can't listen there, for example because
// the path is too long, it returns nil, and the agent runs without the socket.
func (a *Agent) serveSocket(ctx context.Context, path string) error {
	if len(path) > maxSocketPath {
		return a.noSocket(path, fmt.Errorf("the path has %d bytes, at most %d are allowed: choose a shorter state directory",
			len(path), maxSocketPath))
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) { // left by a kill; this process has the lock
		return a.noSocket(path, err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return a.noSocket(path, err)
	}
	mux := a.handler(true)
	mux.HandleFunc("POST /retry", func(w http.ResponseWriter, r *http.Request) {
		var id deployments.UnitID
		if name := r.FormValue("unit"); name != "" {
			if err := id.UnmarshalText([]byte(name)); err != nil {
				http.Error(w, err.Error(), http.StatusBadRequest)
				return
			}
		}
		if !a.Retry(id) {
			none := "this node has no unit"
			if id != (deployments.UnitID{}) {
				none += " " + id.String()
			}
			http.Error(w, none, http.StatusNotFound)
			return
		}
		w.WriteHeader(http.StatusNoContent)
	})
	return serveOn(ctx, l, mux)
}

const (
	// maxConns bounds the connections to each address that the agent serves. A further connection closes the oldest
	// one, even if that is in use: see conns.Limit.
	maxConns = 100
	// An answer takes milliseconds, except that of /live, which waits up to 10 s for a loop that hangs.
	headerTimeout = 5 * time.Second
	readTimeout   = 10 * time.Second
	writeTimeout  = 20 * time.Second
	idleTimeout   = time.Minute
)

// onlyThisMachine reports whether an address can only be reached from this machine.
func onlyThisMachine(addr net.Addr) bool {
	if tcp, ok := addr.(*net.TCPAddr); ok {
		return tcp.IP.IsLoopback()
	}
	return addr.Network() == "unix"
}

// serve serves Config.Listen until ctx ends. /status and /metrics are served there only if no other machine can reach
// the address, as clients that ask for the node's health need not see them.
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

// serveOn serves l until ctx ends. Requests then get one more second.
func serveOn(ctx context.Context, l net.Listener, h http.Handler) error {
	limit := &conns.Limit{Max: maxConns}
	s := &http.Server{
		Handler: h, ReadHeaderTimeout: headerTimeout, ReadTimeout: readTimeout, WriteTimeout: writeTimeout,
		IdleTimeout: idleTimeout, MaxHeaderBytes: 16 << 10, ConnState: limit.Note,
	}
	return conns.Serve(ctx, s, l, time.Second)
}
