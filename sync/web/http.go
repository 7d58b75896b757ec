package web

import (
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"kedge/kv"
	"kedge/sync/fleet"
)

const (
	// writeWithin is how long a browser may take for one answer, or one event of a stream.
	writeWithin = 30 * time.Second
	// firstRead is how long a page waits for the first look at the store.
	firstRead = 5 * time.Second
	// eventPause is between two events of a stream. Without changes it is told the time that passed, every refresh: that also
	// finds out browsers that are gone.
	eventPause = 200 * time.Millisecond
	refresh    = 10 * time.Second
)

//go:embed static
var static embed.FS

func (w *Web) handler() http.Handler {
	mux := http.NewServeMux()
	for name, kind := range map[string]string{"kedge.css": "text/css; charset=utf-8", "kedge.js": "text/javascript; charset=utf-8", "kedge.svg": "image/svg+xml"} {
		mux.HandleFunc("GET /-/"+name, func(rw http.ResponseWriter, r *http.Request) {
			rw.Header().Set("Content-Type", kind)
			http.ServeFileFS(rw, r, static, "static/"+name)
		})
	}
	mux.HandleFunc("GET /-/fleet.json", w.json)
	mux.HandleFunc("GET /-/live/{path...}", w.live)
	mux.HandleFunc("GET /{path...}", w.page)
	return w.guarded(mux)
}

// guarded refuses strange hosts, and tells browsers to do no more with a page than it needs.
func (w *Web) guarded(next http.Handler) http.Handler {
	return http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		h := rw.Header()
		h.Set("Content-Security-Policy", "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cache-Control", "no-store")
		if !w.knownHost(r.Host) {
			http.Error(rw, fmt.Sprintf("This dashboard doesn't go by the name %q. Start it with --host %[1]s if it should.", hostOf(r.Host)), http.StatusMisdirectedRequest)
			return
		}
		next.ServeHTTP(rw, r)
	})
}

func hostOf(hostport string) string {
	if host, _, err := net.SplitHostPort(hostport); err == nil {
		return host
	}
	return strings.Trim(hostport, "[]")
}

func (w *Web) knownHost(hostport string) bool {
	host := strings.TrimSuffix(hostOf(hostport), ".")
	return strings.EqualFold(host, "localhost") || net.ParseIP(host) != nil ||
		slices.ContainsFunc(w.c.Hosts, func(name string) bool { return strings.EqualFold(name, host) })
}

// first gives the fleet, for which a server that has just been started may have to wait a moment.
func (w *Web) first(ctx context.Context) *fleet.Fleet {
	ctx, cancel := context.WithTimeout(ctx, firstRead)
	defer cancel()
	for {
		f, changed := w.now()
		if f != nil {
			return f
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil
		}
	}
}

func (w *Web) json(rw http.ResponseWriter, r *http.Request) {
	f := w.first(r.Context())
	if f == nil {
		http.Error(rw, notRead, http.StatusServiceUnavailable)
		return
	}
	rw.Header().Set("Content-Type", "application/json")
	e := json.NewEncoder(rw)
	e.SetIndent("", "  ")
	_ = e.Encode(f) // whoever asked has gone
}

const notRead = "The store was not read yet: see the log of kedge web."

func (w *Web) page(rw http.ResponseWriter, r *http.Request) {
	rw.Header().Set("Content-Type", "text/html; charset=utf-8")
	code, main := w.draw(r.Context(), r.PathValue("path"), w.first(r.Context()), &past{})
	rw.WriteHeader(code)
	_, _ = io.WriteString(rw, document(r.PathValue("path"), main))
}

// live streams a page's main part: at once, then whenever it changed.
func (w *Web) live(rw http.ResponseWriter, r *http.Request) {
	select {
	case w.viewers <- struct{}{}:
		defer func() { <-w.viewers }()
	default:
		http.Error(rw, "Too many watch it: reload by hand.", http.StatusServiceUnavailable)
		return
	}
	rw.Header().Set("Content-Type", "text/event-stream")
	rw.Header().Set("X-Accel-Buffering", "no") // nginx holds answers back otherwise
	out := http.NewResponseController(rw)
	_ = out.SetReadDeadline(time.Time{}) // the server's would end the stream
	path := r.PathValue("path")
	known := &past{}
	var last string
	w.first(r.Context())
	for {
		f, changed := w.now()
		_, main := w.draw(r.Context(), path, f, known)
		event := ": nothing new\n\n"
		if main != last {
			event = "data: " + strings.ReplaceAll(main, "\n", "\ndata: ") + "\n\n"
			last = main
		}
		err := out.SetWriteDeadline(time.Now().Add(writeWithin))
		if err == nil {
			_, err = io.WriteString(rw, event)
		}
		if errors.Join(err, out.Flush()) != nil || !pause(r.Context(), changed) {
			return
		}
	}
}

// pause returns some time after a change, or when it is time to refresh; false: ctx ended.
func pause(ctx context.Context, changed <-chan struct{}) bool {
	select {
	case <-ctx.Done():
		return false
	case <-changed:
	case <-time.After(refresh):
	}
	select {
	case <-ctx.Done():
		return false
	case <-time.After(eventPause):
		return true
	}
}

// past is a unit's history as it was read for a page, so that a stream reads it again only after a change.
type past struct {
	generation int64
	retry      int64
	read       bool
	rows       [][]fleet.Text
	err        error
}

// of reads u's history, newest first, where it can have changed.
func (p *past) of(ctx context.Context, store kv.Store, u *fleet.Unit) {
	if u.Record == nil || p.read && p.generation == u.Record.Generation && p.retry == u.Record.Retry {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, firstRead)
	defer cancel()
	all, err := fleet.History(ctx, store, u.ID)
	if p.err = err; err != nil {
		return
	}
	p.rows = nil
	for _, h := range all {
		p.rows = append(p.rows, append(fleet.HistoryRow(h), fleet.HistoryNote(h)))
	}
	p.read, p.generation, p.retry = true, u.Record.Generation, u.Record.Retry
}
