package web

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

	"kedge/deployments/wait"
)

const (
	// eventPause is the least time between two patches of a stream: people read no faster, and a rollout's changes
	// come in bursts.
	eventPause = time.Second
	// maxRate is how many bytes a second a stream may average, unless that needs pauses beyond longestPause.
	maxRate      = 4500
	longestPause = 4 * time.Second
	// beat is the longest time for which a stream sends nothing, except while a page is rendered.
	// After that it sends a heartbeat. A page that hears nothing for 4.5 s shows that it may be out
	// of date.
	beat = 2 * time.Second
	// refresh is the time after which a followed page is rendered again without a change, and a
	// unit's history is read again. Pages may show elapsed times.
	refresh = 10 * time.Second
	// maxRecent is how many renderings are kept, so that a page that reconnects gets only what it lacks.
	maxRecent = 64
)

// patch is the difference between the browser's page and the current one.
type patch struct {
	// HTML has the elements that are new or changed, by ID.
	HTML map[string]string `json:"html,omitempty"`
	// Lists has the IDs of each list that changed, in order.
	Lists map[string][]string `json:"lists,omitempty"`
	Title string              `json:"title,omitempty"`
	// Reload is set if the browser has to load the page again.
	Reload bool `json:"reload,omitempty"`
}

// patchOf returns the patch that turns the rendering before into after. If before is nil, the patch
// has the whole page. If the renderings differ in code or in fixed elements, it only tells the
// browser to reload.
func patchOf(before, after *rendered) patch {
	p := patch{HTML: map[string]string{}, Lists: map[string][]string{}}
	if before == nil {
		return patch{HTML: after.html, Lists: after.lists, Title: after.title}
	}
	if before.code != after.code || !slices.Equal(before.fixed, after.fixed) {
		return patch{Reload: true}
	}
	for id, html := range after.html {
		if before.html[id] != html {
			p.HTML[id] = html
		}
	}
	for list, ids := range after.lists {
		if !slices.Equal(before.lists[list], ids) {
			p.Lists[list] = ids
		}
	}
	if before.title != after.title {
		p.Title = after.title
	}
	return p
}

// encodePatch encodes a patch as JSON without escaping HTML, as it isn't embedded in HTML.
func encodePatch(p patch) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	err := e.Encode(p)
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), err
}

// pauseAfter returns how long a stream pauses after an event, so that one node that keeps changing costs less than
// 5 kB/s.
func pauseAfter(event string) time.Duration {
	return min(max(eventPause, time.Duration(len(event))*time.Second/maxRate), longestPause)
}

// remember keeps a rendering that a browser may show, so that later only the difference is sent.
// The newest maxRecent stay.
func (w *Web) remember(r *rendered) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, known := range w.recent {
		if known.key == r.key && known.tag == r.tag {
			return
		}
	}
	w.recent = append(w.recent, r)
	w.recent = w.recent[max(0, len(w.recent)-maxRecent):]
}

// remembered returns the rendering of a page that has the given tag; nil: it is no longer kept.
func (w *Web) remembered(key, tag string) *rendered {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, r := range w.recent {
		if r.key == key && r.tag == tag {
			return r
		}
	}
	return nil
}

// live streams a page's changes and heartbeats, to at most maxViewers browsers.
func (w *Web) live(rw http.ResponseWriter, r *http.Request) {
	select {
	case w.viewers <- struct{}{}:
		defer func() { <-w.viewers }()
	default:
		http.Error(rw, "Too many browsers follow changes now: reload this page to see them.", http.StatusServiceUnavailable)
		return
	}
	rw.Header().Set("Content-Type", "text/event-stream")
	rw.Header().Set("Cache-Control", "no-store")
	rw.Header().Set("X-Accel-Buffering", "no") // otherwise nginx would buffer the stream
	out := http.NewResponseController(rw)
	_ = out.SetReadDeadline(time.Time{}) // the server's deadline would end the stream
	send := func(event string) error {
		err := out.SetWriteDeadline(time.Now().Add(writeWithin))
		if err == nil {
			_, err = io.WriteString(rw, event)
		}
		return errors.Join(err, out.Flush())
	}
	path, query := strings.Trim(r.PathValue("path"), "/"), r.URL.Query()
	tag := r.Header.Get("Last-Event-ID")
	if tag == "" {
		tag = query.Get("have")
	}
	w.first(r.Context())
	known := w.remembered(filterOf(query).address("/"+path), tag)
	drawn := time.Time{}
	for {
		s, changed := w.latest()
		began := time.Now()
		event := "event: beat\ndata:\n\n"
		if page := w.render(r.Context(), s, path, query); page.tag != tag {
			data, err := encodePatch(patchOf(known, page))
			if err != nil {
				return
			}
			event = fmt.Sprintf("id: %s\ndata: %s\n\n", page.tag, data)
			known, tag = page, page.tag
		} else {
			known = page
		}
		drawn = time.Now()
		pause := max(pauseAfter(event), wait.Rest(drawn.Sub(began), longestPause))
		if send(event) != nil {
			return
		}
		for waiting := true; waiting; {
			select {
			case <-r.Context().Done():
				return
			case <-changed:
				waiting = false
			case <-time.After(beat):
				if send("event: beat\ndata:\n\n") != nil {
					return
				}
				waiting = time.Since(drawn) < refresh
			}
		}
		for left := time.Until(drawn.Add(pause)); left > 0; left = time.Until(drawn.Add(pause)) {
			select {
			case <-r.Context().Done():
				return
			case <-time.After(min(left, beat)):
			}
			if left > beat && send("event: beat\ndata:\n\n") != nil {
				return
			}
		}
	}
}
