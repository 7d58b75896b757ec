package notify

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	webhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"

	"kedge/deployments"
	"kedge/kv"
	"kedge/kv/dir"
)

var (
	app  = deployments.UnitID{Stage: "prod", Role: "web", Unit: "app"}
	noon = time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)
)

func release(version string) deployments.Pointer {
	return deployments.Pointer{URL: "s3://acme/web/" + version + "/manifest.yaml", Digest: sha256.Sum256([]byte(version))}
}

// world is a store, and what receivers were sent.
type world struct {
	t     *testing.T
	store kv.Store
	mu    sync.Mutex
	got   []received
}

// received is one request that a server took.
type received struct {
	path   string
	header http.Header
	body   []byte
}

func newWorld(t *testing.T) *world {
	t.Helper()
	store, err := dir.Open(t.TempDir(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	if err := store.EnsureFolders(t.Context(), kv.DesiredPrefix, kv.MirrorPrefix, kv.StatusPrefix, kv.HistoryPrefix); err != nil {
		t.Fatal(err)
	}
	return &world{t: t, store: store}
}

// serve returns a server that keeps what it takes. answer returns the status for the nth request, from 1.
func (w *world) serve(answer func(n int) int) *httptest.Server {
	n := 0
	s := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			w.t.Error(err)
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		n++
		status := answer(n)
		if status/100 == 2 {
			w.got = append(w.got, received{r.Method + " " + r.URL.EscapedPath(), r.Header, body})
		}
		rw.WriteHeader(status)
	}))
	w.t.Cleanup(s.Close)
	return s
}

func always(status int) func(int) int { return func(int) int { return status } }

func (w *world) requests() []received {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.got)
}

// await waits until as many requests were taken.
func (w *world) await(n int) []received {
	w.t.Helper()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if got := w.requests(); len(got) >= n {
			return got
		}
	}
	w.t.Fatalf("%d requests were taken, want %d", len(w.requests()), n)
	return nil
}

// awaitCursor waits until the store has a receiver's cursor as it is to be. A notifier that ends before
// it has saved what a receiver took sends that again.
func (w *world) awaitCursor(receiver string, is func(cursor) bool) {
	w.t.Helper()
	var last []byte
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		var c cursor
		e, err := w.store.Get(w.t.Context(), kv.MirrorPrefix+"notified/"+receiver)
		if err == nil && json.Unmarshal(e.Value, &c) == nil && is(c) {
			return
		}
		last = e.Value
	}
	w.t.Fatalf("the cursor of %s is not saved: %s", receiver, last)
}

// write puts a record, and the history's entry of its generation.
func (w *world) write(r deployments.Record, h *deployments.History) {
	w.t.Helper()
	value, err := json.Marshal(r)
	if err != nil {
		w.t.Fatal(err)
	}
	ops := []kv.Op{kv.Put(kv.DesiredKey(app), value)}
	if h != nil {
		entry, err := json.Marshal(h)
		if err != nil {
			w.t.Fatal(err)
		}
		ops = append(ops, kv.Put(kv.HistoryKey(app, h.Generation), entry))
	}
	if err := w.store.Commit(w.t.Context(), nil, ops...); err != nil {
		w.t.Fatal(err)
	}
}

// run runs a notifier until stop is called.
func (w *world) run(c Config) (stop func()) {
	w.t.Helper()
	if err := c.check(); err != nil {
		w.t.Fatal(err)
	}
	return w.runs(c)()
}

// runs makes a notifier. start runs it until stop is called.
func (w *world) runs(c Config) (start func() (stop func())) {
	n := New(c, w.store, nil, slog.New(slog.DiscardHandler))
	n.statusPause, n.healthPause, n.historyPause, n.healthHold = 10*time.Millisecond, 10*time.Millisecond,
		10*time.Millisecond, 0
	return func() (stop func()) {
		w.t.Helper()
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = n.Run(ctx, nil)
		}()
		stop = sync.OnceFunc(func() { cancel(); <-done })
		w.t.Cleanup(stop)
		for { // until the cursors are there, what is so already isn't told
			found := 0
			entries, err := w.store.List(w.t.Context(), kv.MirrorPrefix)
			if err != nil {
				w.t.Fatal(err)
			}
			for _, e := range entries {
				if strings.HasPrefix(e.Key, kv.MirrorPrefix+"notified/") {
					found++
				}
			}
			if found >= len(c.Receivers)+len(c.Statuses) {
				return stop
			}
			time.Sleep(5 * time.Millisecond)
		}
	}
}

func record(generation int64, p *deployments.Progress) deployments.Record {
	return deployments.Record{Target: release(fmt.Sprint(generation)), Stable: release("0"), Generation: generation,
		Commit: strings.Repeat(fmt.Sprint(generation%10), 40), Paced: true, Rollout: p}
}

func entry(r deployments.Record) *deployments.History {
	return &deployments.History{Generation: r.Generation, Release: r.Target, Stable: r.Stable, Commit: r.Commit,
		Author: "Alice", Subject: "release it", At: noon}
}

func kinds(t *testing.T, all []received) (kinds []string) {
	t.Helper()
	for _, r := range all {
		var e struct{ Type, Subject string }
		if err := json.Unmarshal(r.body, &e); err != nil {
			t.Fatal(err)
		}
		kinds = append(kinds, e.Type)
	}
	return kinds
}

// A rollout is told from its start to its end, signed, each step once, also over a change of mirrors; and what was so
// before the first one ran is not.
func TestRolloutIsTold(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	secret := "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
	file := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(file, []byte(secret+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c := Config{Link: "https://kedge.acme.example/unit/{unit}",
		Receivers: []Receiver{{Name: "ops", URL: w.serve(always(204)).URL, SecretFile: file}}}
	w.write(record(1, nil), entry(record(1, nil)))
	stop := w.run(c)

	r := record(2, &deployments.Progress{Phase: deployments.PhaseCanary, Since: noon})
	w.write(r, entry(r))
	w.await(1)
	r.Rollout = &deployments.Progress{Phase: deployments.PhasePendingApproval, Since: noon, Reason: deployments.ReasonAwaitingApproval}
	pinned := entry(r) // the mirror writes its entry anew for pins and orders: that is no news of the rollout
	pinned.Pins = []deployments.PastPin{{At: noon, Pin: deployments.Pin{Hold: true}}}
	w.write(r, pinned)
	w.await(2)
	w.awaitCursor("ops", func(c cursor) bool {
		return strings.HasPrefix(c.Units[app.String()].RolloutState, string(deployments.PhasePendingApproval))
	})
	pinned.Pins[0].Ended = noon.Add(time.Minute)
	w.write(r, pinned)
	stop()
	r.Rollout = &deployments.Progress{Phase: deployments.PhaseRolling, Since: noon}
	w.write(r, nil)
	stop = w.run(c)
	r.Rollout = nil
	w.write(r, nil)
	got := w.await(3)
	stop()

	want := []string{"kedge.started", "kedge.pending-approval", "kedge.completed"}
	if have := kinds(t, w.requests()); !slices.Equal(have, want) {
		t.Errorf("told %v, want %v", have, want)
	}
	verifier, err := webhooks.NewWebhook(secret)
	if err != nil {
		t.Fatal(err)
	}
	ids := map[string]bool{}
	for _, r := range got {
		if err := verifier.Verify(r.body, r.header); err != nil {
			t.Errorf("the signature doesn't verify: %v", err)
		}
		ids[r.header.Get("webhook-id")] = true
		var e struct {
			SpecVersion, ID, Source, Subject string
			Data                             Data
		}
		if err := json.Unmarshal(r.body, &e); err != nil {
			t.Fatal(err)
		}
		if e.SpecVersion != "1.0" || e.ID != r.header.Get("webhook-id") || e.Subject != "prod/web/app" || e.Data.Author != "Alice" ||
			e.Data.Link != "https://kedge.acme.example/unit/prod/web/app" || e.Data.Message == "" {
			t.Errorf("told %s", r.body)
		}
	}
	if len(ids) != 3 {
		t.Errorf("the events have the IDs %v", ids)
	}
}

// A receiver that fails is told when it is back, one that refuses an event loses that alone, and neither holds up
// others.
func TestReceiversInTrouble(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	down := true
	flaky := w.serve(func(int) int {
		if down {
			return 503
		}
		return 200
	})
	refusing := w.serve(func(n int) int {
		if n <= maxRefusals {
			return 400
		}
		return 200
	})
	healthy := w.serve(always(200))
	dead := httptest.NewServer(nil)
	dead.Close()
	stop := w.run(Config{Receivers: []Receiver{{Name: "flaky", URL: flaky.URL + "/flaky"}, {Name: "refusing", URL: refusing.URL + "/refusing"},
		{Name: "healthy", URL: healthy.URL + "/healthy"}, {Name: "dead", URL: dead.URL}}})
	r := record(1, &deployments.Progress{Phase: deployments.PhaseRolling, Since: noon})
	w.write(r, entry(r))
	r.Rollout = nil
	w.await(1)
	w.write(r, nil)
	w.await(2)
	w.mu.Lock()
	down = false
	w.mu.Unlock()
	w.await(5)
	stop()
	told := map[string]int{}
	for _, got := range w.requests() {
		told[got.path]++
	}
	// The refusing one is told of the end; of a start that it refused for good it isn't told again.
	if told["POST /healthy"] != 2 || told["POST /refusing"] != 1 || told["POST /flaky"] < 1 {
		t.Errorf("told %v", told)
	}
}

// What goes wrong is told: a refused commit, a rollout that goes back, nodes that become unhealthy and well again.
func TestTroubleIsTold(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	slack := w.serve(always(200))
	w.write(record(1, nil), entry(record(1, nil)))
	stop := w.run(Config{Receivers: []Receiver{{Name: "chat", URL: slack.URL, Format: FormatSlack, Text: "{kind}: {message}",
		Units: []string{"prod/*/*"}, Events: []Kind{KindRefused, KindRollingBack, KindRolledBack, KindUnhealthy, KindRecovered}}}})
	put := func(key string, v any) {
		t.Helper()
		value, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		if err := w.store.Commit(t.Context(), nil, kv.Put(key, value)); err != nil {
			t.Fatal(err)
		}
	}
	put(kv.MirrorKey, deployments.MirrorState{Head: "a", Refused: strings.Repeat("b", 40), Error: "prod/web/app.yaml:1:1: <!channel> & co"})
	w.await(1)

	back := record(2, &deployments.Progress{Phase: deployments.PhaseRollingBack, Since: noon, Reason: deployments.ReasonTooManyFailed,
		Facts: deployments.Facts{"failed": "1", "of": "3", "limit": "0", "node": "web-1", "error": "503"}})
	h := entry(back)
	h.Failed = back.Target.Digest
	w.write(back, h)
	w.await(2)
	back.Rollout.Phase = deployments.PhaseRolledBack
	w.write(back, nil)
	w.await(3)

	presence, err := w.store.Presence(t.Context(), "web-1")
	if err != nil {
		t.Fatal(err)
	}
	defer presence.Close(context.Background())
	report := func(state deployments.State) {
		t.Helper()
		value, err := json.Marshal(deployments.Report{Node: "web-1", Units: map[string]deployments.UnitReport{"app": {State: state}}})
		if err != nil {
			t.Fatal(err)
		}
		if err := presence.Put(t.Context(), kv.StatusKey("prod", "web", "web-1"), value); err != nil {
			t.Fatal(err)
		}
	}
	report(deployments.StateUnhealthy)
	w.await(4)
	report(deployments.StateConverged)
	w.await(5)
	stop()
	want := []string{
		"refused: commit bbbbbbbbbbbb is not taken: prod/web/app.yaml:1:1: &lt;!channel&gt; &amp; co",
		"rolling-back: prod/web/app: going back: 1 of 3 nodes failed (web-1: 503), at most 0 may",
		"rolled-back: prod/web/app: rolled-back: 1 of 3 nodes failed (web-1: 503), at most 0 may",
		"unhealthy: prod/web/app fails its health checks on web-1",
		"recovered: prod/web/app: its health checks fail on no live node any more",
	}
	var have []string
	for _, r := range w.requests() {
		var body struct{ Text string }
		if err := json.Unmarshal(r.body, &body); err != nil {
			t.Fatal(err)
		}
		have = append(have, body.Text)
	}
	if !slices.Equal(have, want) {
		t.Errorf("told\n%s\nwant\n%s", strings.Join(have, "\n"), strings.Join(want, "\n"))
	}
}

// Commit statuses are written as each server's API asks for, with the token of a file.
// A node whose health comes and goes, or that says so, tells nobody all day; what is so in the end is told.
func TestHealthThatComesAndGoes(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	synctest.Test(t, func(t *testing.T) {
		n := New(Config{}, w.store, nil, slog.New(slog.DiscardHandler))
		r := &Receiver{Name: "ops", Events: []Kind{KindRefused}}
		c := &cursor{Units: map[string]notified{}, healthAt: map[string]time.Time{}}
		at := func(sick ...string) notified {
			n.seen.units = map[deployments.UnitID]unitNow{
				app: {id: app, record: record(1, nil), unhealthy: sick, healthKnown: true},
			}
			c.nextCheck = time.Time{}
			if err := n.sendNew(t.Context(), r, c); err != nil {
				t.Fatal(err)
			}
			return c.Units[app.String()]
		}
		if now := at("web-1"); !now.Unhealthy {
			t.Errorf("at first: %+v", now)
		}
		for range 2 * int(time.Hour/n.healthPause) {
			at()
			at("web-1")
			time.Sleep(n.healthPause / 2)
			at()
			time.Sleep(n.healthPause / 2)
		}
		if now := c.Units[app.String()]; now.HealthChanges > int64(2*time.Hour/healthHold)+1 {
			t.Errorf("%d events in two hours", now.HealthChanges)
		}
		time.Sleep(healthHold)
		for range 2 { // once more than it may take
			at("web-1")
			if !c.nextCheck.IsZero() {
				time.Sleep(time.Until(c.nextCheck))
			}
		}
		if now := at("web-1"); !now.Unhealthy || !c.nextCheck.IsZero() {
			t.Errorf("in the end: %+v, again at %v", now, c.nextCheck)
		}
	})
}

// What nodes, operators and commits write, and what may be secret in a release's URL, reaches receivers as plain text.
func TestHostileTexts(t *testing.T) {
	t.Parallel()
	signed := release("1")
	signed.URL += "?X-Amz-Credential=x&X-Amz-Signature=s3cret"
	evil := "\u202eevil\x1b[2J " + signed.URL + " [click](https://evil.example)\n<!channel>" + strings.Repeat("x", 100_000)
	r := record(1, &deployments.Progress{Phase: deployments.PhaseRollingBack, Since: noon,
		Reason: deployments.ReasonTooManyFailed,
		Facts:  deployments.Facts{"failed": "1", "of": "3", "limit": "0", "node": "web-1", "error": evil}})
	r.Target, r.Stable = signed, signed
	h := entry(r)
	h.Author, h.Subject, h.Note = evil, evil, evil
	events, _ := eventsSince(notified{}, unitNow{id: app, record: r, history: []deployments.History{*h}})
	if len(events) != 2 {
		t.Fatalf("%d events", len(events))
	}
	for _, format := range []Format{FormatCloudEvents, FormatSlack, FormatTeams} {
		receiver := &Receiver{Format: format, Text: "{message} {author} {subject} {release}"}
		for _, e := range events {
			e.Data.sanitize()
			body, _, err := receiver.encode("kedge", e)
			if err != nil {
				t.Fatal(err)
			}
			var value any
			if err := json.Unmarshal(body, &value); err != nil {
				t.Fatal(err)
			}
			text := fmt.Sprint(value)
			if strings.ContainsAny(text, "\u202e\x1b\n") || strings.Contains(text, "s3cret") || len(text) > 8*maxShown {
				t.Errorf("%s, %s: %d bytes: %.300q", format, e.Kind, len(text), text)
			}
			if format == FormatSlack && strings.Contains(text, "<!") || format == FormatTeams && strings.Contains(text, "](") {
				t.Errorf("%s, %s: a link or a mention: %.300q", format, e.Kind, text)
			}
			if !strings.Contains(text, "evil") {
				t.Errorf("%s, %s: nothing of it is left: %.300q", format, e.Kind, text)
			}
		}
	}
	if s, ok := statusOf(unitNow{id: app, record: r}); !ok || strings.Contains(s.description, "s3cret") ||
		strings.ContainsAny(s.description, "\u202e\x1b") {
		t.Errorf("the commit's status: %+v", s)
	}
}

func TestCommitStatuses(t *testing.T) {
	t.Parallel()
	for provider, c := range map[Provider]struct {
		path, header, value string
		states              []string
		name                string
	}{
		GitHub: {"POST /repos/acme/deployments/statuses/" + strings.Repeat("2", 40), "Authorization", "Bearer s3cret",
			[]string{"pending", "success", "failure"}, "context"},
		Gitea: {"POST /repos/acme/deployments/statuses/" + strings.Repeat("2", 40), "Authorization", "token s3cret",
			[]string{"pending", "success", "failure"}, "context"},
		GitLab: {"POST /projects/acme%2Fdeployments/statuses/" + strings.Repeat("2", 40), "PRIVATE-TOKEN", "s3cret",
			[]string{"running", "success", "failed"}, "name"},
	} {
		t.Run(string(provider), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			token := filepath.Join(t.TempDir(), "token")
			if err := os.WriteFile(token, []byte("s3cret\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			w.write(record(1, nil), entry(record(1, nil)))
			stop := w.run(Config{Link: "https://kedge.acme.example/unit/{unit}", Statuses: []StatusTarget{{
				Name: "git", Provider: provider, API: w.serve(always(201)).URL, Project: "acme/deployments", TokenFile: token}}})
			r := record(2, &deployments.Progress{Phase: deployments.PhaseRolling, Since: noon, Reason: deployments.ReasonRolling,
				Facts: deployments.Facts{"admitted": "12", "of": "40"}})
			w.write(r, entry(r))
			w.await(1)
			r.Rollout = nil
			w.write(r, nil)
			w.await(2)
			r.Rollout = &deployments.Progress{Phase: deployments.PhaseRolledBack, Since: noon, Reason: deployments.ReasonAborted}
			w.write(r, nil)
			got := w.await(3)
			stop()
			for i, want := range []string{"12 of 40 nodes admitted", "the rollout of 2 ", "aborted by an operator"} {
				var body map[string]string
				if err := json.Unmarshal(got[i].body, &body); err != nil {
					t.Fatal(err)
				}
				if got[i].path != c.path || got[i].header.Get(c.header) != c.value || body["state"] != c.states[i] ||
					body[c.name] != "kedge/prod/web/app" || !strings.Contains(body["description"], want) ||
					body["target_url"] != "https://kedge.acme.example/unit/prod/web/app" {
					t.Errorf("%s with %s: %s; want %s, %s and %q", got[i].path, got[i].header.Get(c.header), got[i].body, c.path, c.states[i], want)
				}
			}
		})
	}
}

// The example of the manual is read, and the manual names every kind of event.
func TestManual(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("../../deployments/docs/notifications.md")
	if err != nil {
		t.Fatal(err)
	}
	_, example, _ := strings.Cut(string(page), "cat > /etc/kedge/notify.yaml <<'END'\n")
	example, _, _ = strings.Cut(example, "END\n")
	file := filepath.Join(t.TempDir(), "notify.yaml")
	if err := os.WriteFile(file, []byte(example), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := ReadConfig(file)
	if err != nil || len(c.Receivers) != 2 || len(c.Statuses) != 1 {
		t.Errorf("the example is read as %+v, %v", c, err)
	}
	for _, kind := range Kinds() {
		if !strings.Contains(string(page), "| `"+string(kind)+"` | ") {
			t.Errorf("the manual has no line for the event %s", kind)
		}
	}
}

// A configuration with a mistake is refused, and no error repeats a URL, which may be a secret.
func TestReadConfig(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"receivers: [{name: ops, url: https://a.example/x}]":                                                     "",
		"receivers: [{name: ops, url_file: /etc/kedge/url, format: slack, events: [paused], units: [prod/*/*]}]": "",
		"statuses: [{name: gh, provider: github, project: a/b, token_file: /t}]":                                 "",
		"receivers: [{name: ops, uri: https://a.example}]":                                                       "unknown field",
		"receivers: [{name: ops}]":                                              "url and url_file",
		"receivers: [{name: ops, url: http://a.example/s3cret}]":                "want https://",
		"receivers: [{name: ops, url: https://a, events: [pased]}]":             `event "pased": want one of started`,
		"receivers: [{name: ops, url: https://a, format: irc}]":                 `format "irc"`,
		"receivers: [{name: ops, url: https://a, units: [prod/web]}]":           "want STAGE/ROLE/UNIT",
		"receivers: [{name: Ops, url: https://a}]":                              "small letters",
		"statuses: [{name: x, provider: svn, project: a/b, token_file: /t}]":    `provider "svn"`,
		"statuses: [{name: x, provider: gitlab, project: a/b, token_file: /t}]": "api",
	} {
		file := filepath.Join(t.TempDir(), "notify.yaml")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := ReadConfig(file)
		if (err == nil) != (want == "") || err != nil && (!strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "s3cret")) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}

// A mirror that leads again after another did tells of nothing that the other has told of, or that was so before.
func TestLeadingAgain(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := Config{Receivers: []Receiver{{Name: "ops", URL: w.serve(always(204)).URL}}}
	if err := c.check(); err != nil {
		t.Fatal(err)
	}
	refuse := func(commit string) {
		t.Helper()
		value, err := json.Marshal(deployments.MirrorState{Head: "a", Refused: commit, Error: "no"})
		if err != nil {
			t.Fatal(err)
		}
		if err := w.store.Commit(t.Context(), nil, kv.Put(kv.MirrorKey, value)); err != nil {
			t.Fatal(err)
		}
	}
	r := record(1, &deployments.Progress{Phase: deployments.PhasePaused, Since: noon})
	w.write(r, entry(r))
	refuse("b")
	first := w.runs(c)
	stop := first()
	refuse("c")
	w.await(1)
	w.awaitCursor("ops", func(c cursor) bool { return c.Refused == "c" })
	stop()

	second := w.runs(c) // another process
	stop = second()
	r.Rollout = nil
	w.write(r, nil)
	w.await(2)
	refuse("")
	next := record(2, &deployments.Progress{Phase: deployments.PhaseRolling, Since: noon})
	w.write(next, entry(next))
	w.await(3)
	w.awaitCursor("ops", func(c cursor) bool { return c.Units[app.String()].Generation == 2 })
	stop()

	stop = first()
	next.Rollout = nil
	w.write(next, nil)
	w.await(4)
	stop()
	want := []string{"kedge.refused", "kedge.completed", "kedge.started", "kedge.completed"}
	if have := kinds(t, w.requests()); !slices.Equal(have, want) {
		t.Errorf("told %v, want %v", have, want)
	}
}

// A mirror that waited for a receiver while it lost its lease doesn't write over what the next one has written.
func TestLeaseLostWhileAReceiverAnswers(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	lease, err := w.store.Lease(t.Context(), kv.MirrorLease, "first", 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	asked, answer := make(chan struct{}), make(chan struct{})
	c := Config{Receivers: []Receiver{{Name: "ops", URL: w.serve(func(int) int {
		close(asked)
		<-answer
		return 204
	}).URL}}}
	if err := c.check(); err != nil {
		t.Fatal(err)
	}
	n := New(c, w.store, nil, slog.New(slog.DiscardHandler))
	ended := make(chan error, 1)
	go func() { ended <- n.Run(t.Context(), lease) }()
	w.awaitCursor("ops", func(cursor) bool { return true })
	r := record(1, &deployments.Progress{Phase: deployments.PhaseRolling, Since: noon})
	w.write(r, entry(r))
	<-asked
	if err := lease.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	next := []byte(`{"units":{},"refused":"by the next mirror"}`)
	if err := w.store.Commit(t.Context(), nil, kv.Put(kv.MirrorPrefix+"notified/ops", next)); err != nil {
		t.Fatal(err)
	}
	close(answer)
	select {
	case err := <-ended:
		if !errors.Is(err, kv.ErrLeaseLost) {
			t.Errorf("it ended with %v, want %v", err, kv.ErrLeaseLost)
		}
	case <-time.After(20 * time.Second):
		t.Error("it goes on without the lease")
	}
	if e, err := w.store.Get(t.Context(), kv.MirrorPrefix+"notified/ops"); err != nil || string(e.Value) != string(next) {
		t.Errorf("the cursor is %s, %v, want what the next mirror wrote", e.Value, err)
	}
}

// forgetfulStore can't read a history the first times.
type forgetfulStore struct {
	kv.Store
	fails *atomic.Int32
}

func (s forgetfulStore) List(ctx context.Context, prefix string) ([]kv.Entry, error) {
	if strings.HasPrefix(prefix, kv.HistoryPrefix) && s.fails.Add(-1) >= 0 {
		return nil, kv.ErrUnavailable
	}
	return s.Store.List(ctx, prefix)
}

// What a history says is told later if the store is away at that moment.
func TestHistoryIsReadAgain(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	fails := &atomic.Int32{}
	fails.Store(3)
	w.store = forgetfulStore{w.store, fails}
	stop := w.run(Config{Receivers: []Receiver{{Name: "ops", URL: w.serve(always(204)).URL}}})
	r := record(1, &deployments.Progress{Phase: deployments.PhaseRolling, Since: noon})
	w.write(r, entry(r))
	w.await(1)
	stop()
	if have := kinds(t, w.requests()); !slices.Equal(have, []string{"kedge.started"}) || fails.Load() >= 0 {
		t.Errorf("told %v, with %d failures left", have, fails.Load())
	}
}

// lateStore shows mirror/ only after a while.
type lateStore struct{ kv.Store }

func (s lateStore) Watch(ctx context.Context, prefix string, f func(kv.View)) error {
	if prefix != kv.MirrorPrefix {
		return s.Store.Watch(ctx, prefix, f)
	}
	return s.Store.Watch(ctx, prefix, func(v kv.View) {
		time.Sleep(100 * time.Millisecond)
		f(kv.View{Err: kv.ErrUnavailable})
		f(v)
	})
}

// A refusal that was told of is not forgotten while the mirror's state has yet to be read.
func TestStateIsReadWhole(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	value, err := json.Marshal(deployments.MirrorState{Head: "a", Refused: "b", Error: "no"})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.store.Commit(t.Context(), nil, kv.Put(kv.MirrorKey, value)); err != nil {
		t.Fatal(err)
	}
	w.store = lateStore{w.store}
	stop := w.run(Config{Receivers: []Receiver{{Name: "ops", URL: w.serve(always(204)).URL}}})
	r := record(1, &deployments.Progress{Phase: deployments.PhaseRolling, Since: noon})
	w.write(r, entry(r))
	w.await(1)
	stop()
	if have := kinds(t, w.requests()); !slices.Equal(have, []string{"kedge.started"}) {
		t.Errorf("told %v", have)
	}
}

// An orphaned unit that Git names again is as it was before: nothing was completed, unless a rollout was under way.
func TestBackInGit(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name    string
		rollout *deployments.Progress // when the unit is orphaned
		want    []Kind                // once it is back, and without a rollout
	}{
		{"without a rollout", nil, nil},
		{"in a rollout", &deployments.Progress{Phase: deployments.PhaseRolling, Since: noon}, []Kind{KindCompleted}},
	} {
		for _, paced := range []bool{false, true} {
			r := record(2, c.rollout)
			r.Paced = paced
			_, was := eventsSince(notified{Generation: 1}, unitNow{id: app, record: r})
			r.Orphaned = true
			// the cursor of an earlier version
			old := notified{Generation: r.Generation, RolloutState: string(KindOrphaned)}
			if again, _ := eventsSince(old, unitNow{id: app, record: r}); len(again) > 0 {
				t.Errorf("%s: after an upgrade: %+v", c.name, again)
			}
			events, was := eventsSince(was, unitNow{id: app, record: r})
			if len(events) != 1 || events[0].Kind != KindOrphaned {
				t.Fatalf("%s: orphaned: %+v", c.name, events)
			}
			r.Orphaned, r.Rollout = false, nil
			events, _ = eventsSince(was, unitNow{id: app, record: r})
			var have []Kind
			for _, e := range events {
				have = append(have, e.Kind)
			}
			if !slices.Equal(have, c.want) {
				t.Errorf("%s, paced %v: back in Git: %v, want %v", c.name, paced, have, c.want)
			}
		}
	}
}

// A server that limits the rate by a 403 is asked again later, and one that forbids is not. A file names no URL that
// the configuration may not.
func TestDelivery(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		status int
		header http.Header
		again  bool
		after  time.Duration
	}{
		{403, http.Header{}, false, 0},
		{403, http.Header{"Retry-After": {"60"}}, true, time.Minute},
		{403, http.Header{"X-Ratelimit-Remaining": {"0"}}, true, 0},
		{403, http.Header{"X-Ratelimit-Remaining": {"17"}}, false, 0},
		{429, http.Header{"Retry-After": {"99999999999999"}}, true, maxPause},
		{429, http.Header{"Retry-After": {"10000000000"}}, true, maxPause},
		{503, http.Header{"Retry-After": {"-10000000000"}}, true, 0},
		{404, http.Header{"Retry-After": {"60"}}, false, 0},
	} {
		s := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
			maps.Copy(rw.Header(), c.header)
			rw.WriteHeader(c.status)
		}))
		err := send(t.Context(), s.Client(), http.MethodPost, s.URL, http.Header{}, nil)
		s.Close()
		var again *retryAfterError
		if errors.As(err, &again) != c.again || errors.Is(err, errRefused) == c.again || c.again && again.after != c.after {
			t.Errorf("%d with %v: %v, %+v", c.status, c.header, err, again)
		}
	}

	file := filepath.Join(t.TempDir(), "url")
	if err := os.WriteFile(file, []byte("http://192.0.2.1/s3cret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	r := &Receiver{Name: "ops", URLFile: file}
	if err := r.deliver(t.Context(), http.DefaultClient, "kedge", Event{}); err == nil ||
		!strings.Contains(err.Error(), "want https://") || strings.Contains(err.Error(), "s3cret") {
		t.Errorf("got %v", err)
	}
}

// A unit that is gone leaves nothing in the cursor of commit statuses.
func TestStatusesForgetUnits(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	n := New(Config{}, w.store, nil, slog.New(slog.DiscardHandler))
	c := &cursor{Units: map[string]notified{app.String(): {Generation: 1}},
		statusAt: map[string]time.Time{app.String(): noon}}
	if err := n.writeStatuses(t.Context(), &StatusTarget{Name: "git"}, c); err != nil {
		t.Fatal(err)
	}
	if len(c.Units) > 0 || len(c.statusAt) > 0 {
		t.Errorf("left: %+v", c)
	}
}
