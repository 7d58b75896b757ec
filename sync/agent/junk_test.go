package agent

import (
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"kedge/deployments"
	"kedge/kv"
	"kedge/kv/kvtest"
	"kedge/sync/agent/statedir"
)

// fill writes n values next to each other.
func (w *world) fill(n int, key func(i int) string, value string) {
	w.t.Helper()
	var g errgroup.Group
	g.SetLimit(8)
	for batch := range slices.Chunk(slices.Collect(func(yield func(int) bool) {
		for i := range n {
			if !yield(i) {
				return
			}
		}
	}), 60) {
		g.Go(func() error {
			var ops []kv.Op
			for _, i := range batch {
				ops = append(ops, kv.Put(key(i), []byte(value)))
			}
			return w.store.Commit(w.t.Context(), nil, ops...)
		})
	}
	if err := g.Wait(); err != nil {
		w.t.Fatal(err)
	}
}

func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// Pins of units without a record cost a node no directories, workers or reports and little memory, and a restart
// with them is quick. The test isn't parallel, as it measures memory.
func TestJunkPins(t *testing.T) {
	w := newWorld(t)
	consul := kvtest.StartConsul(t, kvtest.ConsulOptions{ACL: true})
	w.store = consul.Open(consul.RootToken)
	w.folders()
	one, two := w.publish("app", "1"), w.publish("app", "2")
	w.desire(app, deployments.Record{Target: one, Generation: 1})
	const junk = 20_000 // 50,000 took 21 MiB, and 2.1 s at a start
	token := consul.Token(agentRules)
	own := func(c *Config) { c.Store = consul.Open(token) }
	a := w.start(own)
	a.awaitRunning(app, one)
	before, workers := heap(), runtime.NumGoroutine()
	w.fill(junk, func(i int) string { return fmt.Sprintf("pins/prod/web/junk-%d", i) }, two.String())
	seen := func() int {
		a.mu.Lock()
		defer a.mu.Unlock()
		return a.cache.Roles()[0].PassedOver
	}
	await(t, "the junk to be seen", func() (bool, string) { return seen() == junk, fmt.Sprint(seen()) })
	if grown, more := (int64(heap())-int64(before))>>20, runtime.NumGoroutine()-workers; grown > 32 || more > 50 {
		t.Errorf("%d junk pins take %d MiB and %d goroutines", junk, grown, more)
	} else {
		t.Logf("%d junk pins take %d MiB and %d goroutines", junk, grown, more)
	}
	if n := len(a.Report()["web"].Units); n != 1 {
		t.Errorf("the report has %d units", n)
	}
	w.put(kv.PinKey(app), two.String()) // a real one among them
	a.awaitRunning(app, two)
	a.stop()

	entries, err := os.ReadDir(w.path("state", "units", "prod", "web"))
	if err != nil || len(entries) != 1 {
		t.Errorf("%d directories, %v", len(entries), err)
	}
	if info, err := os.Stat(w.path("state", statedir.LastKnownFile)); err != nil || info.Size() > 4096 {
		t.Errorf("the last known state: %v, %v", info.Size(), err)
	}
	for i := range 2000 { // as an earlier version left them
		if err := os.Mkdir(w.path("state", "units", "prod", "web", fmt.Sprintf("junk-%d", i)), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	began := time.Now()
	a = w.start(own)
	a.awaitRunning(app, two)
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("a start among junk took %v", took)
	} else {
		t.Logf("a start among junk took %v", took)
	}
	if entries, err := os.ReadDir(w.path("state", "units", "prod", "web")); err != nil || len(entries) != 1 {
		t.Errorf("%d directories after a restart, %v", len(entries), err)
	}
	// A unit that gets a record later follows its pin.
	late := unitID("junk-7")
	w.put(kv.PinKey(late), w.publish("junk-7", "pinned").String())
	w.desire(late, deployments.Record{Target: w.publish("junk-7", "git"), Generation: 1})
	a.awaitUnit(late, "pinned", func(u deployments.UnitReport) bool {
		return u.State == deployments.StateConverged && u.Version == "pinned"
	})
}

// A node takes a bounded number of a role's units, first those that it has, and reports how many it leaves out.
// Units that are gone leave nothing behind.
func TestTooManyUnits(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	last := unitID("zz")
	w.desire(last, deployments.Record{Target: w.publish("zz", "1"), Generation: 1})
	a := w.start(withMetrics)
	a.awaitState(last, deployments.StateConverged)
	record := fmt.Sprintf("file:///nowhere/%s@sha256:%s", strings.Repeat("x", 2000-100), strings.Repeat("0", 64))
	const junk = 300
	name := func(i int) string { return fmt.Sprintf("desired/prod/web/junk-%04d", i) }
	w.fill(junk, name, record)
	await(t, "the report of what is left out", func() (bool, string) {
		r := a.Report()["web"]
		return r.Reason == deployments.ReasonTooManyUnits && r.Facts["left_out"] != "", fmt.Sprint(r.Reason, r.Facts, len(r.Units))
	})
	await(t, "the report in the store", func() (bool, string) {
		e, err := w.store.Get(t.Context(), kv.StatusKey("prod", "web", node))
		if err != nil {
			return false, err.Error()
		}
		r, err := deployments.ParseReport(e.Value)
		return err == nil && r.Reason == deployments.ReasonTooManyUnits, fmt.Sprint(err, len(e.Value), r.Reason)
	})
	if u := a.unit(last); u.State != deployments.StateConverged {
		t.Errorf("the unit that was there is %+v", u)
	}
	if code, body := a.get("/converged"); code != 503 || !strings.Contains(body, "left out") {
		t.Errorf("/converged: %d, %s", code, body)
	}
	for i := range junk {
		w.delete(name(i))
	}
	await(t, "the junk to be gone", func() (bool, string) {
		entries, err := os.ReadDir(w.path("state", "units", "prod", "web"))
		a.mu.Lock()
		defer a.mu.Unlock()
		return err == nil && len(entries) == 1 && len(a.units) == 1, fmt.Sprint(len(entries), err, len(a.units))
	})
	await(t, "/converged", func() (bool, string) { code, body := a.get("/converged"); return code == 200, body })
}
