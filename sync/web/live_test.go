package web

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kedge/deployments"
	"kedge/kv"
)

// timedWriter is a browser's end of a stream: it notes when it is sent something.
type timedWriter struct {
	header http.Header
	mu     sync.Mutex
	sent   []time.Duration
	began  time.Time
}

func (w *timedWriter) Header() http.Header              { return w.header }
func (w *timedWriter) WriteHeader(int)                  {}
func (w *timedWriter) Flush()                           {}
func (w *timedWriter) SetReadDeadline(time.Time) error  { return nil }
func (w *timedWriter) SetWriteDeadline(time.Time) error { return nil }
func (w *timedWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.sent = append(w.sent, time.Since(w.began))
	return len(p), nil
}

// While the fleet keeps changing, a stream pauses after a large event, but not without heartbeats.
func TestHeartbeatsInAPause(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := appScene(200, deployments.PhaseRolling)
		w := offline(t, s)
		ctx, cancel := context.WithCancel(t.Context())
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://localhost/-/live/prod/web/app", nil)
		if err != nil {
			t.Fatal(err)
		}
		r.SetPathValue("path", "prod/web/app")
		browser := &timedWriter{header: http.Header{}, began: time.Now()}
		var stream sync.WaitGroup
		stream.Go(func() { w.live(browser, r) })
		for range 12 {
			synctest.Wait()
			w.show(s.assemble())
			time.Sleep(time.Second / 2)
		}
		cancel()
		stream.Wait()
		last := time.Duration(0)
		for _, at := range append(browser.sent, 6*time.Second) {
			if at-last > beat {
				t.Errorf("nothing is sent from %v to %v: %v", last, at, browser.sent)
			}
			last = at
		}
	})
}

// The mirror adds pins and orders to the newest entry of the history, after the fleet has shown them: a unit's page has
// them soon, though the record's generation stays.
func TestAnEntryOfTheHistoryThatGrows(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := emptyStore(t)
		key := kv.HistoryKey(app, 1)
		put(t, store, kv.Put(key, encode(deployments.History{Generation: 1, Release: release("1"), Note: "the first text"})))
		w := offlineWith(t, scene{entries: []kv.Entry{entry(kv.DesiredKey(app),
			deployments.Record{Target: release("1"), Generation: 1})}}, store)
		shows := func() string {
			now, _ := w.latest()
			page := w.render(t.Context(), now, "prod/web/app", nil)
			return strings.Join(slices.Collect(maps.Values(page.html)), " ")
		}
		if page := shows(); !strings.Contains(page, "the first text") {
			t.Fatalf("the page has %s", page)
		}
		put(t, store, kv.Put(key, encode(deployments.History{Generation: 1, Release: release("1"), Note: "the second text"})))
		time.Sleep(refresh)
		if page := shows(); !strings.Contains(page, "the second text") {
			t.Errorf("the page has %s", page)
		}
	})
}

// awayStore is a store that can't be read once away is closed.
type awayStore struct {
	kv.Store
	away chan struct{}
}

func (s awayStore) List(ctx context.Context, prefix string) ([]kv.Entry, error) {
	select {
	case <-s.away:
		<-ctx.Done()
		return nil, fmt.Errorf("%w: %w", kv.ErrUnavailable, ctx.Err())
	default:
		return s.Store.List(ctx, prefix)
	}
}

// While the store is away, the page of a unit goes on showing the history that it has, and doesn't wait long for it.
func TestHistoryInAnOutage(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := awayStore{emptyStore(t), make(chan struct{})}
		put(t, store, kv.Put(kv.HistoryKey(app, 1),
			encode(deployments.History{Generation: 1, Release: release("1"), Note: "the first text"})))
		w := offlineWith(t, scene{entries: []kv.Entry{entry(kv.DesiredKey(app),
			deployments.Record{Target: release("1"), Generation: 1})}}, store)
		for i := range 3 {
			began := time.Now()
			now, _ := w.latest()
			page := w.render(t.Context(), now, "prod/web/app", nil)
			if html := strings.Join(slices.Collect(maps.Values(page.html)), " "); !strings.Contains(html, "the first text") {
				t.Errorf("%d: the page has %s", i, html)
			}
			if took := time.Since(began); took > awayWithin && i != 1 {
				t.Errorf("%d: it took %v", i, took)
			}
			switch i {
			case 0:
				close(store.away)
			case 1: // the outage is noticed
				now.storeError = "the store is away"
			}
			time.Sleep(refresh)
		}
	})
}

// Releases that share a colour aren't taken for nodes that run nothing, in any sample of a chart. What no node runs any
// more keeps the colour that it had.
func TestColoursOfPastReleases(t *testing.T) {
	t.Parallel()
	record := deployments.Record{Target: release("2"), Stable: release("1"), Generation: 3}
	entries := []kv.Entry{entry(kv.DesiredKey(app), record)}
	for _, version := range []string{"1", "2", "3", "4", "5", "6", "7", "8"} {
		entries = append(entries, report("web-"+version, runs(version)))
	}
	w := offlineWith(t, scene{entries: entries}, emptyStore(t))
	samples := w.trend.of(app)
	if len(samples) != 1 || samples[0].counts[deployments.Digest{}] != 0 {
		t.Errorf("the trend is %+v", samples)
	}
	now, _ := w.latest()
	u := now.find(app)
	for d := range samples[0].counts {
		if class := u.pastClass(d); class == "vn" {
			t.Errorf("%v has the class %q", d, class)
		}
	}

	record.Rollout = &deployments.Progress{Phase: deployments.PhaseRolledBack, Failed: release("3").Digest}
	w.show(scene{entries: []kv.Entry{entry(kv.DesiredKey(app), record), report("web-4", runs("1"))}}.assemble())
	now, _ = w.latest()
	u = now.find(app)
	for version, want := range map[string]string{"1": "v1", "2": "v0", "3": "v2", "4": "vx"} {
		if class := u.pastClass(release(version).Digest); class != want {
			t.Errorf("release %s has the class %q, want %q", version, class, want)
		}
	}
}
