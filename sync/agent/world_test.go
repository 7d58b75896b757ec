package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"kedge/artifact"
	"kedge/artifact/object"
	"kedge/deployments"
	"kedge/deployments/logtest"
	"kedge/kv"
	"kedge/kv/open"
	"kedge/sync/agent/statedir"
)

// patience is how long a test waits for an event, on a busy machine.
const patience = 40 * time.Second

const node = "web-1"

var app = deployments.UnitID{Stage: "prod", Role: "web", Unit: "app"}

// world is one node with its store and storage, in its own directory.
type world struct {
	t     testing.TB
	dir   string
	store kv.Store
	log   *logtest.Buffer
}

func newWorld(t testing.TB) *world {
	t.Helper()
	w := newWorldAt(t, t.TempDir())
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the agents' log:\n%s", w.log)
		}
	})
	return w
}

func newWorldAt(t testing.TB, dir string) *world {
	t.Helper()
	store, err := open.Store(open.Config{URL: "file://" + dir + "/kv"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	return &world{t: t, dir: dir, store: store, log: new(logtest.Buffer)}
}

func (w *world) path(elem ...string) string {
	return filepath.Join(append([]string{w.dir}, elem...)...)
}

func (w *world) config() Config {
	log := slog.New(slog.NewTextHandler(w.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	return Config{
		Store: w.store, Node: node, Stage: "prod", Roles: []string{"web"}, StateDir: w.path("state"),
		Objects: object.New(object.Config{Log: log}), Version: "test", Log: log,
	}
}

// running is an agent that runs until stop, or the end of the test.
type running struct {
	*Agent
	t    testing.TB
	w    *world
	stop func()
}

func (w *world) start(change ...func(*Config)) *running {
	w.t.Helper()
	c := w.config()
	for _, f := range change {
		f(&c)
	}
	a, err := New(c)
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	stop := sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				w.t.Errorf("the agent ended: %v", err)
			}
		case <-time.After(patience):
			w.t.Error("the agent doesn't stop")
		}
	})
	w.t.Cleanup(stop)
	return &running{a, w.t, w, stop}
}

// publish makes a release of unit whose file VERSION contains version, live at srv/UNIT.
func (w *world) publish(unit, version string, change ...func(*deployments.Manifest)) deployments.Pointer {
	w.t.Helper()
	return w.publishTree(unit, version, map[string]string{"bin/run": "#!/bin/sh\necho " + version + "\n"}, change...)
}

func (w *world) publishTree(unit, version string, files map[string]string, change ...func(*deployments.Manifest)) deployments.Pointer {
	w.t.Helper()
	tree := w.t.TempDir()
	write(w.t, filepath.Join(tree, "VERSION"), version)
	for name, data := range files {
		write(w.t, filepath.Join(tree, name), data)
	}
	m := deployments.Manifest{
		Name: unit, Version: version, Dest: w.path("srv", unit), DestMode: 0o755, Strategy: deployments.StrategyRelease, Keep: 3,
	}
	for _, f := range change {
		f(&m)
	}
	if err := os.MkdirAll(w.path("srv"), 0o755); err != nil {
		w.t.Fatal(err)
	}
	p, err := artifact.Publish(w.t.Context(), object.New(object.Config{}), artifact.PublishOptions{
		Dir: tree, To: "file://" + w.path("releases"), Manifest: m,
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return p.Pointer
}

func post(run string) func(*deployments.Manifest) {
	return func(m *deployments.Manifest) {
		m.Commands.Post = append(m.Commands.Post, deployments.Command{Run: run, Timeout: time.Minute})
	}
}

func (w *world) put(key, value string) {
	w.t.Helper()
	if err := w.store.Commit(w.t.Context(), nil, kv.Put(key, []byte(value))); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) delete(key string) {
	w.t.Helper()
	if err := w.store.Commit(w.t.Context(), nil, kv.Delete(key)); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) desire(id deployments.UnitID, r deployments.Record) {
	w.t.Helper()
	data, err := json.Marshal(r)
	if err != nil {
		w.t.Fatal(err)
	}
	w.put(kv.DesiredKey(id), string(data))
}

// live returns the version that unit's dest resolves to.
func (w *world) live(unit string) string {
	data, err := os.ReadFile(w.path("srv", unit, "VERSION"))
	if err != nil {
		return err.Error()
	}
	return string(data)
}

func (a *running) unit(id deployments.UnitID) deployments.UnitReport {
	return a.Report()[id.Role].Units[id.Unit]
}

// awaitUnit waits until a unit's report satisfies ok.
func (a *running) awaitUnit(id deployments.UnitID, what string, ok func(deployments.UnitReport) bool) deployments.UnitReport {
	a.t.Helper()
	await(a.t, fmt.Sprintf("%s to be %s", id, what), func() (bool, string) {
		u := a.unit(id)
		return ok(u), fmt.Sprintf("%+v", u)
	})
	return a.unit(id)
}

func (a *running) awaitState(id deployments.UnitID, state deployments.State) deployments.UnitReport {
	a.t.Helper()
	return a.awaitUnit(id, string(state), func(u deployments.UnitReport) bool { return u.State == state })
}

// awaitRunning waits until a unit has converged to p, and checks what is live.
func (a *running) awaitRunning(id deployments.UnitID, p deployments.Pointer) deployments.UnitReport {
	a.t.Helper()
	u := a.awaitUnit(id, "converged on "+p.String(), func(u deployments.UnitReport) bool {
		return u.State == deployments.StateConverged && u.Running == p
	})
	if v := a.w.live(id.Unit); v != u.Version {
		a.t.Fatalf("%s reports %s and serves %s", id, u.Version, v)
	}
	return u
}

// awaitReady waits until /ready answers 200, which takes a moment after the first convergence.
func (a *running) awaitReady() {
	a.t.Helper()
	await(a.t, "/ready", func() (bool, string) { code, body := a.get("/ready"); return code == 200, body })
}

// get reads a path at the agent's address.
func (a *running) get(path string) (int, string) {
	a.t.Helper()
	resp, err := http.Get("http://" + a.Addr() + path)
	if err != nil {
		a.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		a.t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

// post posts to the agent's socket.
func (a *running) post(path string) int {
	a.t.Helper()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		socket := statedir.SocketPath(a.c.StateDir)
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}}
	resp, err := client.Post("http://agent"+path, "", nil)
	if err != nil {
		a.t.Fatal(err)
	}
	resp.Body.Close()
	return resp.StatusCode
}

// reported returns the status entry of a role, as others see it; zero if there is none.
func (w *world) reported(role string) (deployments.Report, kv.Entry) {
	e, err := w.store.Get(w.t.Context(), kv.StatusKey("prod", role, node))
	if err != nil {
		return deployments.Report{}, kv.Entry{}
	}
	var r deployments.Report
	if err := json.Unmarshal(e.Value, &r); err != nil {
		w.t.Fatal(err)
	}
	return r, e
}

func await(t testing.TB, what string, ok func() (bool, string)) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		good, now := ok()
		if good {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("waited %v for %s: %s", patience, what, now)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// steadily checks that something holds for a while, as there is no event to wait for when something must not
// happen.
func steadily(t testing.TB, what string, ok func() (bool, string)) {
	t.Helper()
	for end := time.Now().Add(150 * time.Millisecond); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if good, now := ok(); !good {
			t.Fatalf("%s: %s", what, now)
		}
	}
}

func write(t testing.TB, path, data string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(data), 0o644); err != nil {
		t.Fatal(err)
	}
}

// noise returns text that doesn't compress.
func noise(n int) string {
	r := rand.NewChaCha8([32]byte{1})
	b := make([]byte, n)
	r.Read(b)
	return string(b)
}

func withMetrics(c *Config) {
	c.Listen, c.Metrics = "127.0.0.1:0", prometheus.NewRegistry()
}
