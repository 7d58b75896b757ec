package web

import (
	"bytes"
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/a-h/templ"
	"github.com/klauspost/compress/gzhttp"

	"kedge/deployments"
	"kedge/deployments/safetext"
	"kedge/kv"
	"kedge/sync/fleet"
)

const (
	// writeWithin bounds sending one answer, or one event of a stream, to a browser.
	writeWithin = 30 * time.Second
	// firstRead is how long a page waits for the first read of the store, or for a unit's history.
	firstRead = 5 * time.Second
	// awayWithin is how long a page waits for a newer history of a unit while the store is known to be unavailable.
	awayWithin = time.Second
)

//go:embed static
var static embed.FS

var assetTypes = map[string]string{
	"kedge.css": "text/css; charset=utf-8", "kedge.js": "text/javascript; charset=utf-8", "kedge.svg": "image/svg+xml",
}

// asset returns the URL of one of the dashboard's files. The URL contains a hash of the file's content, so browsers may
// cache the file for a year.
func asset(name string) templ.SafeURL {
	data, _ := static.ReadFile("static/" + name)
	sum := sha256.Sum256(data)
	return templ.SafeURL("/-/" + name + "?v=" + hex.EncodeToString(sum[:6]))
}

func (w *Web) handler() http.Handler {
	mux := http.NewServeMux()
	for name, kind := range assetTypes {
		mux.HandleFunc("GET /-/"+name, func(rw http.ResponseWriter, r *http.Request) {
			rw.Header().Set("Content-Type", kind)
			if r.URL.Query().Has("v") {
				rw.Header().Set("Cache-Control", "public, max-age=31536000, immutable")
			}
			http.ServeFileFS(rw, r, static, "static/"+name)
		})
	}
	mux.HandleFunc("GET /-/fleet.json", w.json)
	mux.HandleFunc("GET /-/nodes/{stage}/{role}/{unit}", w.nodes)
	mux.HandleFunc("GET /{path...}", w.page)
	streams := http.NewServeMux()
	streams.HandleFunc("GET /-/live/{path...}", w.live)
	streams.Handle("/", gzhttp.GzipHandler(mux)) // not for streams: their events are patches of a few hundred bytes
	return w.guarded(streams)
}

// guarded refuses unknown hosts, and sets headers that restrict what a page may do.
func (w *Web) guarded(next http.Handler) http.Handler {
	return http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		h := rw.Header()
		h.Set("Content-Security-Policy", "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "+
			"img-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'")
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cross-Origin-Opener-Policy", "same-origin")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Cache-Control", "private, no-cache")
		if !w.knownHost(r.Host) {
			http.Error(rw,
				fmt.Sprintf("This dashboard doesn't serve the host name %q. Start it with --host %[1]s if it should.",
					hostOf(r.Host)), http.StatusMisdirectedRequest)
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

// first returns the current snapshot. Right after the start it waits up to firstRead for the first
// read of the store; nil: there was none in that time.
func (w *Web) first(ctx context.Context) *snapshot {
	ctx, cancel := context.WithTimeout(ctx, firstRead)
	defer cancel()
	w.noteRequest()
	for {
		s, changed := w.latest()
		if s != nil {
			return s
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil
		}
	}
}

const notRead = "The store was not read yet: see the log of kedge web."

func (w *Web) json(rw http.ResponseWriter, r *http.Request) {
	s := w.first(r.Context())
	if s == nil {
		http.Error(rw, notRead, http.StatusServiceUnavailable)
		return
	}
	f := *s.Fleet
	f.At = time.Now()
	rw.Header().Set("Content-Type", "application/json")
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false) // URLs stay readable; the answer isn't HTML
	if err := e.Encode(&f); err != nil {
		w.c.Log.Error("could not encode the fleet as JSON", "error", err)
		http.Error(rw, "The fleet can't be encoded as JSON: see the log of kedge web.", http.StatusInternalServerError)
		return
	}
	_, _ = rw.Write(safetext.JSON([]byte(safetext.URLsInMarkup(b.String())))) // the client may be gone
}

// nodes answers with the name, the state and the release of each node of a unit's map, for
// tooltips. There are at most maxCells, in the order of the map's cells.
func (w *Web) nodes(rw http.ResponseWriter, r *http.Request) {
	s := w.first(r.Context())
	if s == nil {
		http.Error(rw, notRead, http.StatusServiceUnavailable)
		return
	}
	u := s.find(deployments.UnitID{Stage: r.PathValue("stage"), Role: r.PathValue("role"), Unit: r.PathValue("unit")})
	if u == nil {
		http.Error(rw, "There is no such unit.", http.StatusNotFound)
		return
	}
	nodes := u.Nodes[:min(len(u.Nodes), maxCells)]
	cells := make([][3]string, len(nodes))
	for i := range nodes {
		runs := "nothing"
		if !nodes[i].Report.Running.IsZero() {
			runs = u.name(nodes[i].Report.Running)
		}
		cells[i] = [3]string{fleet.Clean(nodes[i].Name, 63), stateOf(&nodes[i]), runs}
	}
	rw.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(rw).Encode(cells) // an error means that the client is gone
}

func (w *Web) page(rw http.ResponseWriter, r *http.Request) {
	s := w.first(r.Context())
	path := strings.Trim(r.PathValue("path"), "/")
	page := w.render(r.Context(), s, path, r.URL.Query())
	tag := `W/"` + page.tag + `"`
	rw.Header().Set("Content-Type", "text/html; charset=utf-8")
	rw.Header().Set("ETag", tag)
	if page.code == http.StatusOK && r.Header.Get("If-None-Match") == tag {
		rw.WriteHeader(http.StatusNotModified)
		return
	}
	rw.WriteHeader(page.code)
	_ = document(page).Render(r.Context(), rw) // an error means that the client is gone
}

// unitHistory is a unit's history, newest first, and the record's generation and retry when it was
// read. From expires on it may be out of date: the mirror rewrites the newest entry after pins and
// orders.
type unitHistory struct {
	generation, retry int64
	expires           time.Time
	entries           []deployments.History
	err               string
}

// maxHistories bounds the cached histories.
const maxHistories = 64

// history returns a unit's history, from the cache unless that has expired, or the record's
// Generation or Retry has changed. If the store can't be reached, an expired history serves on. If
// none is cached, or after any other error, the result has err. For a unit without a record the
// result is empty. away says that the store is known to be unavailable. With away set and an
// expired history in the cache, history waits only awayWithin for a newer one.
func (w *Web) history(ctx context.Context, u *fleet.Unit, away bool) *unitHistory {
	if u.Record == nil {
		return &unitHistory{}
	}
	w.mu.Lock()
	known := w.histories[u.ID]
	w.mu.Unlock()
	within := firstRead
	if known != nil && (known.generation != u.Record.Generation || known.retry != u.Record.Retry) {
		known = nil
	}
	if known != nil {
		if time.Now().Before(known.expires) {
			return known
		}
		if away {
			within = awayWithin
		}
	}
	reading, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	all, err := fleet.History(reading, w.c.Store, u.ID)
	read := &unitHistory{generation: u.Record.Generation, retry: u.Record.Retry, expires: time.Now().Add(refresh)}
	switch {
	case err == nil:
		read.entries = all[:min(len(all), deployments.HistoryKept)]
	case known != nil && ctx.Err() != nil: // the browser is gone
		return known
	case known != nil && (errors.Is(err, kv.ErrUnavailable) || reading.Err() != nil):
		read.entries = known.entries
	default:
		return &unitHistory{err: fleet.Clean(err.Error(), maxText)}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.histories) >= maxHistories {
		clear(w.histories)
	}
	w.histories[u.ID] = read
	return read
}

// checkCommitURL returns an error unless address is empty, or an http or https URL with {commit} in it.
func checkCommitURL(address string) error {
	if address == "" {
		return nil
	}
	u, err := url.Parse(address)
	if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || !strings.Contains(address, "{commit}") {
		return fmt.Errorf("the commit URL %q: want an address with {commit} in it, "+
			"as in https://git.example.org/acme/commit/{commit}", address)
	}
	return nil
}
