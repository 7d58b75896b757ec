package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"

	"github.com/prometheus/client_golang/prometheus/promhttp"

	"kedge/deployments"
	"kedge/policy"
	"kedge/sync/agent/statedir"
	"kedge/sync/fleet/message"
)

// maxSocketPath is the longest path of a socket, by the kernel's rule.
const maxSocketPath = 107

// SocketPath is where the agent of a state directory listens on this machine, for GET /status, /ready and /live,
// and for POST /retry?unit=STAGE/ROLE/UNIT (without unit: all).
func SocketPath(stateDir string) string { return filepath.Join(stateDir, statedir.SocketFile) }

// Status returns all that the agent knows of itself.
func (a *Agent) Status() policy.NodeStatus {
	roles := a.Report()
	a.mu.Lock()
	defer a.mu.Unlock()
	s := policy.NodeStatus{
		Node: a.c.Node, Stage: a.c.Stage, Agent: a.c.Version, Started: a.started.UTC(), Roles: roles,
		Decisions: map[string]policy.DecisionStatus{}, Why: a.unready(),
	}
	s.Ready = len(s.Why) == 0
	for _, r := range a.cache.Roles() {
		for _, src := range r.Sources() {
			st := policy.SourceStatus{Prefix: src.Prefix}
			st.From, st.Since = src.Origin()
			if err, since := src.Trouble(); err != nil {
				st.Trouble, st.TroubleSince = oneLine(err), since
			}
			s.Sources = append(s.Sources, st)
		}
	}
	for id, u := range a.units {
		if !u.decided || u.gone() {
			continue
		}
		d := u.decision
		s.Decisions[id.Role+"/"+id.Unit] = policy.DecisionStatus{
			Action: d.Action, Target: d.Target, Stage: d.Stage, Source: d.Source, Reason: d.Reason, Facts: d.Facts,
			Why: message.Decision(d.Reason, d.Facts), Invalid: text(d.Invalid),
			Recheck: d.Recheck, Waits: u.blocked.why, Trace: message.Trace(id, a.c.Node, d.Trace),
		}
	}
	return s
}

// handler answers for the node: whether it serves, and, if open, what it runs and why.
func (a *Agent) handler(open bool) *http.ServeMux {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /ready", func(w http.ResponseWriter, _ *http.Request) {
		a.mu.Lock()
		why := a.unready()
		a.mu.Unlock()
		if len(why) > 0 {
			answer(w, http.StatusServiceUnavailable, map[string]any{"ready": false, "why": why})
			return
		}
		answer(w, http.StatusOK, map[string]any{"ready": true})
	})
	mux.HandleFunc("GET /converged", func(w http.ResponseWriter, _ *http.Request) {
		a.mu.Lock()
		why := a.unconverged()
		a.mu.Unlock()
		if len(why) > 0 {
			answer(w, http.StatusServiceUnavailable, map[string]any{"converged": false, "why": why})
			return
		}
		answer(w, http.StatusOK, map[string]any{"converged": true})
	})
	mux.HandleFunc("GET /live", func(w http.ResponseWriter, _ *http.Request) {
		if !a.Alive() {
			http.Error(w, "the agent's loop does not turn", http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	if !open {
		refuse := func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, "not at this address: ask at listen_status, or on the node itself", http.StatusForbidden)
		}
		mux.HandleFunc("GET /status", refuse)
		mux.HandleFunc("GET /metrics", refuse)
		return mux
	}
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) { answer(w, http.StatusOK, a.Status()) })
	if a.c.Metrics != nil {
		mux.Handle("GET /metrics", promhttp.HandlerFor(a.c.Metrics, promhttp.HandlerOpts{}))
	}
	return mux
}

func answer(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(code)
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	_ = e.Encode(v) // whoever asked has gone
}

// serveSocket answers at agent.sock, which only the agent's own user can open, until ctx ends. An agent goes
// without where the path is too long.
func (a *Agent) serveSocket(ctx context.Context) error {
	path := SocketPath(a.c.StateDir)
	if len(path) > maxSocketPath {
		a.c.Log.Warn("no socket for kedge retry on this node: the state directory's path is too long", "path", path)
		return nil
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) { // what a kill left; the lock is ours
		a.c.Log.Warn("no socket for kedge retry on this node", "error", err)
		return nil
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		a.c.Log.Warn("no socket for kedge retry on this node", "error", err)
		return nil
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
			http.Error(w, fmt.Sprintf("this node has no unit %s", id), http.StatusNotFound)
			return
		}
		w.WriteHeader(http.StatusNoContent)
	})
	return serveOn(ctx, l, mux)
}
