package web

import (
	"bufio"
	"context"
	"encoding/json"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/kv"
	"kedge/kv/kvtest"
	"kedge/kv/open"
	"kedge/sync/conns/connstest"
	"kedge/sync/fleet"
)

// start runs a dashboard until the test ends, and gives its URL.
func start(t *testing.T, store kv.Store, hosts ...string) string {
	t.Helper()
	w, err := New(Config{Store: store, Listen: "127.0.0.1:0", Hosts: hosts})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return "http://" + w.Addr()
}

// get fetches a page; its host, if given, is what a browser believes that it talks to.
func get(t *testing.T, method, url, host string) (*http.Response, string) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Host = host
	response, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	var b strings.Builder
	if _, err := bufio.NewReader(response.Body).WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	return response, b.String()
}

// stream reads the patches of a page, whole ones at first.
func stream(t *testing.T, url string) <-chan string {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	response, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { response.Body.Close() })
	if kind := response.Header.Get("Content-Type"); kind != "text/event-stream" {
		t.Fatalf("%s: %s", response.Status, kind)
	}
	events := make(chan string, 100)
	go func() {
		defer close(events)
		lines := bufio.NewScanner(response.Body)
		lines.Buffer(nil, 1<<20)
		var event []string
		for lines.Scan() {
			if data, ok := strings.CutPrefix(lines.Text(), "data: "); ok { // a beat's is empty
				event = append(event, data)
			} else if lines.Text() == "" && event != nil {
				var p patch
				if err := json.Unmarshal([]byte(strings.Join(event, "\n")), &p); err != nil {
					t.Errorf("%v: %q", err, event)
				}
				events <- strings.Join(slices.Collect(maps.Values(p.HTML)), "\n")
				event = nil
			}
		}
	}()
	return events
}

// await returns the first event that says something.
func await(t *testing.T, events <-chan string, says string) {
	t.Helper()
	over := time.After(30 * time.Second)
	last := ""
	for {
		select {
		case e, ok := <-events:
			if !ok {
				t.Fatalf("the stream ended before %q; its last event: %s", says, last)
			}
			if last = e; strings.Contains(e, says) {
				return
			}
		case <-over:
			t.Fatalf("no event says %q; the last: %s", says, last)
		}
	}
}

func fill(t *testing.T, store kv.Store) {
	t.Helper()
	if err := store.EnsureFolders(t.Context(), kv.ControlPrefix, kv.MirrorPrefix, kv.DesiredPrefix, kv.PinsPrefix,
		kv.StatusPrefix, kv.HistoryPrefix); err != nil {
		t.Fatal(err)
	}
	put(t, store, kv.Put(kv.DesiredKey(app), encode(deployments.Record{Target: release("1"), Generation: 1})),
		kv.Put(kv.HistoryPrefix+app.String()+"/0000000001", []byte(`{"generation":1,"subject":"the first"}`)))
}

// filled is a store of one unit.
func filled(t *testing.T) kv.Store {
	t.Helper()
	dir, err := open.Store(open.Config{URL: "file://" + t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dir.Close() })
	fill(t, dir)
	return dir
}

func put(t *testing.T, store kv.Store, ops ...kv.Op) {
	t.Helper()
	if err := store.Commit(t.Context(), nil, ops...); err != nil {
		t.Fatal(err)
	}
}

// With a token that may only look, each kind of page follows the store.
func TestFollowsConsul(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{ACL: true})
	operator := c.Open(c.RootToken)
	fill(t, operator)
	url := start(t, c.Open(c.Token(`key_prefix "kedge/" { policy = "list" }`)))

	all, unit := stream(t, url+"/-/live/"), stream(t, url+"/-/live/prod/web/app")
	await(t, all, "prod/web/app")
	await(t, unit, "the first")
	p, err := operator.Presence(t.Context(), "web-1")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close(context.WithoutCancel(t.Context())) })
	r := deployments.Report{Node: "web-1", Started: time.Now(), Units: map[string]deployments.UnitReport{"app": runs("1")}}
	if err := p.Put(t.Context(), kv.StatusKey("prod", "web", "web-1"), encode(r)); err != nil {
		t.Fatal(err)
	}
	await(t, all, "1 of 1 converged")
	await(t, unit, "web-1")
	node := stream(t, url+"/-/live/prod/web/app/web-1")
	await(t, node, "as it should")
	put(t, operator, kv.Put(kv.DesiredKey(app), encode(deployments.Record{Target: release("2"), Generation: 2})),
		kv.Put(kv.HistoryPrefix+app.String()+"/0000000002", []byte(`{"generation":2,"subject":"the second"}`)),
		kv.Put(kv.PinKey(app)+"/web-1", []byte(`{"hold": true, "reason": "look at <it>"}`)))
	await(t, unit, "the second")
	await(t, node, "look at &lt;it&gt;")
	await(t, all, "1 node pinned")

	response, page := get(t, http.MethodGet, url+"/prod/web/app", "")
	if response.StatusCode != http.StatusOK || !strings.Contains(page, "the second") || !strings.Contains(page,
		`<script src="/-/kedge.js?v=`) {
		t.Errorf("%s\n%s", response.Status, page)
	}
	if !strings.Contains(page, "dc1 kedge/</title>") {
		t.Errorf("the title doesn't name the datacenter and the prefix: %.400s", page)
	}
	var f fleet.Fleet
	if _, body := get(t, http.MethodGet, url+"/-/fleet.json", ""); json.Unmarshal([]byte(body), &f) != nil ||
		len(f.Units) != 1 || f.Units[0].Live != 1 {
		t.Errorf("the fleet as JSON: %s", body)
	}
}

// What was known stays, with the trouble, and goes on when the store is back.
func TestStoreAway(t *testing.T) {
	t.Parallel()
	dir := filled(t)
	store := kvtest.Faulty(dir)
	url := start(t, store)
	all := stream(t, url+"/-/live/")
	await(t, all, "prod/web/app")
	store.SetDown(kv.ErrUnavailable)
	await(t, all, "Not up to date.")
	if response, page := get(t, http.MethodGet, url+"/", ""); response.StatusCode != http.StatusOK ||
		!strings.Contains(page, "prod/web/app") {
		t.Errorf("%s\n%s", response.Status, page)
	}
	if response, page := get(t, http.MethodGet, url+"/prod/web/none",
		""); response.StatusCode != http.StatusNotFound || !strings.Contains(page, "Not up to date.") {
		t.Errorf("%s\n%s", response.Status, page)
	}
	store.SetDown(nil)
	put(t, dir, kv.Put(kv.PinKey(app), []byte("hold")))
	await(t, all, "hold")
}

func TestRefuses(t *testing.T) {
	t.Parallel()
	dir := filled(t)
	url := start(t, dir, "kedge.acme.example")
	addr := strings.TrimPrefix(url, "http://")
	for host, want := range map[string]int{
		addr: 200, "localhost:8080": 200, "LOCALHOST": 200, "[::1]:80": 200, "[::1]": 200, "10.0.0.7": 200,
		"kedge.acme.example": 200, "KEDGE.acme.example.:443": 200,
		"evil.example": 421, "evil.example:7080": 421, "localhost.evil.example": 421, "127.0.0.1.evil.example": 421,
		"acme.example": 421,
	} {
		for _, path := range []string{"/", "/prod/web/app", "/-/fleet.json", "/-/kedge.js"} {
			if response, page := get(t, http.MethodGet, url+path, host); response.StatusCode != want || want == 421 &&
				strings.Contains(page, "prod/web/app") {
				t.Errorf("%s as %s: %s", path, host, response.Status)
			}
		}
	}
	for _, method := range []string{http.MethodPost, http.MethodPut, http.MethodDelete} {
		if response, _ := get(t, method, url+"/prod/web/app", ""); response.StatusCode != http.StatusMethodNotAllowed {
			t.Errorf("%s: %s", method, response.Status)
		}
	}
	response, _ := get(t, http.MethodGet, url+"/", "")
	if csp := response.Header.Get("Content-Security-Policy"); !strings.Contains(csp, "default-src 'none'") ||
		strings.Contains(csp, "unsafe") {
		t.Errorf("the policy is %q", csp)
	}
	for _, name := range []string{"css", "js", "svg"} {
		if response, body := get(t, http.MethodGet, url+"/-/kedge."+name, ""); response.StatusCode != http.StatusOK ||
			body == "" {
			t.Errorf("kedge.%s: %s", name, response.Status)
		}
	}
	for _, path := range []string{"/-/page.go", "/-/../web.go", "/-/static/kedge.js"} {
		if response, _ := get(t, http.MethodGet, url+path, ""); response.StatusCode != http.StatusNotFound {
			t.Errorf("%s: %s", path, response.Status)
		}
	}
}

func TestTooManyViewers(t *testing.T) {
	t.Parallel()
	dir := filled(t)
	url := start(t, dir)
	for range maxViewers {
		<-stream(t, url+"/-/live/")
	}
	if response, _ := get(t, http.MethodGet, url+"/-/live/", ""); response.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("one more: %s", response.Status)
	}
	if response, _ := get(t, http.MethodGet, url+"/", ""); response.StatusCode != http.StatusOK {
		t.Errorf("a page: %s", response.Status)
	}
	connstest.Bounded(t, strings.TrimPrefix(url, "http://"), maxConns, func() bool {
		response, _ := get(t, http.MethodGet, url+"/", "")
		return response.StatusCode == http.StatusOK
	})
}
