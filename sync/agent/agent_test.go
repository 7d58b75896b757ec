package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"kedge/artifact/treetest"
	"kedge/deployments"
	"kedge/deployments/tooltest"
	"kedge/kv"
	"kedge/kv/kvtest"
	"kedge/sync/agent/statedir"
	"kedge/sync/trace"
	"kedge/sync/trace/tracetest"
)

func TestConvergesAndReports(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	one, two := w.publish("app", "1"), w.publish("app", "2")
	collector := tracetest.New(t)
	a := w.start(withMetrics, allowEmpty, func(c *Config) { c.Trace = collector.Sender(t) })
	select {
	case <-a.Converged():
	case <-time.After(patience):
		t.Fatal("a role without units has nothing to converge to, and yet has not converged")
	}
	w.desire(app, deployments.Record{Target: one, Generation: 1})
	a.awaitRunning(app, one)
	w.desire(app, deployments.Record{Target: two, Generation: 2, Commit: "c2"})
	a.awaitRunning(app, two)
	traced(t, collector, trace.Of(app, "c2", deployments.Digest{}), two)

	await(t, "the report", func() (bool, string) {
		r, e := w.reported("web")
		u := r.Units["app"]
		return e.Session != "" && r.Node == node && r.Agent == "test" && r.Ready && u.State == deployments.StateConverged &&
			u.Running == two && u.Want == two && u.Version == "2" && u.Generation == 2 && u.Error == "", string(e.Value)
	})
	a.awaitReady()
	if code, _ := a.get("/live"); code != 200 {
		t.Errorf("/live: %d", code)
	}
	if code, body := a.get("/status"); code != 200 || !strings.Contains(body, two.Digest.String()) || !strings.Contains(body, `"from": "store"`) {
		t.Errorf("/status: %d %s", code, body)
	}
	if _, body := a.get("/metrics"); !strings.Contains(body, `kedge_agent_unit_info{digest="`+two.Digest.Short()+`",role="web",unit="app",version="2"} 1`) ||
		!strings.Contains(body, "kedge_agent_ready 1") ||
		!strings.Contains(body, `kedge_agent_store_up{prefix="desired/prod/web/"} 1`) {
		t.Errorf("/metrics: %s", body)
	}
	a.stop()
	if _, e := w.reported("web"); e.Value != nil {
		t.Errorf("a node that left in good order still reports %s", e.Value)
	}
}

// traced checks the spans of a deployment against the trace of its push.
func traced(t *testing.T, collector *tracetest.Collector, push trace.Context, release deployments.Pointer) {
	t.Helper()
	var deploy tracetest.Span
	spans := collector.Await(t, func(all []tracetest.Span) bool {
		for _, s := range tracetest.Named(all, "deploy") {
			if s.Trace == fmt.Sprintf("%x", push.Trace) {
				deploy = s
			}
		}
		return deploy.ID != ""
	})
	if deploy.Parent != fmt.Sprintf("%x", push.Span) || deploy.Attributes["kedge.release"] != release.String() ||
		deploy.Attributes["kedge.node"] != node || deploy.Attributes["kedge.unit"] != app.String() || deploy.Err != "" {
		t.Errorf("the deployment's span is %+v", deploy)
	}
	steps := map[string]bool{}
	for _, s := range spans {
		if s.Parent == deploy.ID {
			steps[s.Name] = true
			if s.Trace != deploy.Trace || s.Start.Before(deploy.Start) || s.End.After(deploy.End) {
				t.Errorf("%+v isn't within %+v", s, deploy)
			}
		}
	}
	if !steps["fetch"] || !steps["switch"] || !steps["health"] {
		t.Errorf("its steps are %v", steps)
	}
}

func TestReportsOnlyChanges(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	faulty := kvtest.Faulty(w.store)
	a := w.start(func(c *Config) { c.Store = faulty })
	w.put(kv.DesiredKey(app), w.publish("app", "1").String())
	key := kv.StatusKey("prod", "web", node)
	await(t, "the report", func() (bool, string) {
		r, e := w.reported("web")
		return r.Units["app"].State == deployments.StateConverged && r.Ready && r.Joined > 0, string(e.Value)
	})
	faulty.ResetWrites()
	// Wake-ups without changes, and other nodes' pins, cause no report.
	for i := range 10 {
		w.put(kv.NodePinKey(app, "web-9"), w.publish("app", fmt.Sprint("other-", i)).String())
		a.changed.Set()
	}
	steadily(t, "nothing happened", func() (bool, string) {
		return faulty.Writes()[key] == 0, fmt.Sprint(faulty.Writes())
	})

	// A report that failed is written later.
	faulty.FailWrites(func(write int, _ []string) kvtest.When {
		if write < 2 {
			return kvtest.Before
		}
		return 0
	})
	w.put(kv.PinKey(app), "hold")
	await(t, "the report after an outage", func() (bool, string) {
		r, e := w.reported("web")
		return r.Units["app"].State == deployments.StateHeld, string(e.Value)
	})
}

func TestNewRefuses(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for name, change := range map[string]func(*Config){
		"no store": func(c *Config) { c.Store = nil }, "no role": func(c *Config) { c.Roles = nil },
		"a stage with a slash": func(c *Config) { c.Stage = "a/b" }, "a node with a slash": func(c *Config) { c.Node = "a/b" },
		"an address that isn't ours": func(c *Config) { c.Listen = "192.0.2.1:1" },
	} {
		c := w.config()
		change(&c)
		if _, err := New(c); err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
	// The refused New has left no lock behind.
	a := w.start()
	_, err := New(w.config())
	if !errors.Is(err, statedir.ErrLocked) || !strings.Contains(err.Error(), strconv.Itoa(os.Getpid())) {
		t.Errorf("a second agent of the state directory: %v", err)
	}
	a.stop()
	w.start().stop()
}

func TestSeveralRoles(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	proxy := deployments.UnitID{Stage: "prod", Role: "edge", Unit: "proxy"}
	p, q := w.publish("app", "1"), w.publish("proxy", "7")
	w.put(kv.DesiredKey(app), p.String())
	w.put(kv.DesiredKey(proxy), q.String())
	a := w.start(withMetrics, func(c *Config) { c.Roles = []string{"web", "edge", "empty"} })
	a.awaitRunning(app, p)
	a.awaitRunning(proxy, q)
	await(t, "the reports", func() (bool, string) {
		web, _ := w.reported("web")
		edge, _ := w.reported("edge")
		empty, e := w.reported("empty")
		return web.Ready && edge.Ready && len(edge.Units) == 1 && len(web.Units) == 1 && e.Value != nil && len(empty.Units) == 0,
			fmt.Sprint(web, edge, empty)
	})
}

func TestAbsenceChangesNothing(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := w.publish("app", "1")
	w.desire(app, deployments.Record{Target: p, Generation: 1})
	a := w.start(withMetrics)
	a.awaitRunning(app, p)
	w.delete(kv.DesiredKey(app))
	u := a.awaitState(app, deployments.StateWaiting)
	if u.Running != p || w.live("app") != "1" {
		t.Errorf("without its record the unit runs %v, and serves %s", u.Running, w.live("app"))
	}
	a.awaitReady()
	// And it is still there after a restart.
	a.stop()
	a = w.start()
	a.awaitUnit(app, "remembered", func(u deployments.UnitReport) bool { return u.Running == p })
	w.desire(app, deployments.Record{Target: w.publish("app", "2"), Generation: 2})
	a.awaitUnit(app, "at 2", func(u deployments.UnitReport) bool { return u.State == deployments.StateConverged && u.Version == "2" })
}

func TestWhatDoesNotParseChangesNothing(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	one, two := w.publish("app", "1"), w.publish("app", "2")
	w.desire(app, deployments.Record{Target: one, Generation: 1})
	a := w.start(withMetrics)
	a.awaitRunning(app, one)
	a.awaitReady()
	for _, bad := range []string{"", "  \n", two.URL, "hodl", two.String()[:len(two.String())-1], `{"release": 7}`} {
		w.put(kv.PinKey(app), bad)
		u := a.awaitState(app, deployments.StateInvalid)
		if u.Error == "" || u.Running != one || w.live("app") != "1" {
			t.Errorf("with pin %q: %+v", bad, u)
		}
		if code, body := a.get("/ready"); code != 200 {
			t.Errorf("with pin %q a node that serves as before is not ready: %s", bad, body)
		}
		w.delete(kv.PinKey(app))
		a.awaitState(app, deployments.StateConverged)
	}
	w.put(kv.DesiredKey(app), "{")
	if u := a.awaitState(app, deployments.StateInvalid); u.Error == "" || u.Running != one || w.live("app") != "1" {
		t.Errorf("with a broken record: %+v", u)
	}
	// A pin works all the same.
	w.put(kv.PinKey(app), two.String()+"\r\n")
	a.awaitRunning(app, two)
}

func TestPins(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	one, two, three := w.publish("app", "1"), w.publish("app", "2"), w.publish("app", "3")
	w.desire(app, deployments.Record{Target: one, Generation: 1})
	a := w.start()
	a.awaitRunning(app, one)

	w.put(kv.PinKey(app), two.String())
	if u := a.awaitRunning(app, two); !u.Pinned {
		t.Errorf("the pin isn't reported: %+v", u)
	}
	w.put(kv.NodePinKey(app, node), three.String())
	a.awaitRunning(app, three)
	w.put(kv.NodePinKey(app, node), "hold")
	a.awaitState(app, deployments.StateHeld)
	w.put(kv.PinKey(app), one.String())
	steadily(t, "held", func() (bool, string) { return w.live("app") == "3", w.live("app") })
	w.delete(kv.NodePinKey(app, node))
	a.awaitRunning(app, one)

	// A pin that expires: it ends once it has been followed, however long that takes.
	w.put(kv.PinKey(app), two.String())
	a.awaitRunning(app, two)
	until := time.Now().Add(700 * time.Millisecond)
	w.put(kv.PinKey(app), fmt.Sprintf(`{"release": %q, "until": %q}`, two, until.UTC().Format(time.RFC3339Nano)))
	a.awaitRunning(app, one)
	if time.Now().Before(until) {
		t.Error("the pin ended before its time")
	}
}

func TestBootsWithoutTheStore(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	one, two := w.publish("app", "1"), w.publish("app", "2")
	faulty := kvtest.Faulty(w.store)
	withFaulty := func(c *Config) { c.Store = faulty }
	w.desire(app, deployments.Record{Target: one, Generation: 1})
	w.put(kv.PinKey(app), two.String())
	a := w.start(withFaulty)
	a.awaitRunning(app, two)
	a.stop()

	// The agent runs what it last knew, including the pin, though dest was lost meanwhile.
	if err := os.Remove(w.path("srv", "app")); err != nil {
		t.Fatal(err)
	}
	faulty.SetDown(kv.ErrUnavailable)
	a = w.start(withFaulty, withMetrics)
	a.awaitRunning(app, two)
	_, body := a.get("/status")
	if !strings.Contains(body, "last known state") || !strings.Contains(body, `"error_since"`) {
		t.Errorf("/status doesn't say that the store is away: %s", body)
	}
	if _, body := a.get("/metrics"); !strings.Contains(body, `kedge_agent_store_up{prefix="desired/prod/web/"} 0`) {
		t.Errorf("/metrics doesn't say that the store is away: %s", body)
	}
	a.awaitReady()

	// And it converges when the store is back.
	w.delete(kv.PinKey(app))
	steadily(t, "an outage changes nothing", func() (bool, string) { return w.live("app") == "2", w.live("app") })
	faulty.SetDown(nil)
	a.awaitRunning(app, one)
}

func TestFirstBootWithoutTheStore(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	one, two := w.publish("app", "1"), w.publish("app", "2")
	w.put(kv.DesiredKey(app), one.String())
	faulty := kvtest.Faulty(w.store)
	faulty.SetDown(kv.ErrUnavailable)
	withFaulty := func(c *Config) { c.Store = faulty }

	a := w.start(withFaulty, withMetrics)
	steadily(t, "nothing is known", func() (bool, string) {
		code, body := a.get("/ready")
		return code == 503 && len(a.Report()["web"].Units) == 0, body
	})
	a.stop()

	tries := 0
	a = w.start(withFaulty, func(c *Config) {
		c.Snapshot = func(context.Context) ([]kv.Entry, error) {
			if tries++; tries < 3 {
				return nil, errors.New("S3 is away, too")
			}
			return []kv.Entry{{Key: kv.DesiredKey(app), Value: []byte(two.String())}, {Key: "desired/prod/db/app", Value: []byte("x")}}, nil
		}
	})
	a.awaitRunning(app, two)
	faulty.SetDown(nil)
	a.awaitRunning(app, one) // a synced view always wins
}

func TestTransientTroubleIsTriedAgain(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	one, two := w.publish("app", "1"), w.publish("app", "2")
	w.put(kv.DesiredKey(app), one.String())
	a := w.start(withMetrics)
	a.awaitRunning(app, one)
	if err := os.Rename(w.path("releases"), w.path("away")); err != nil {
		t.Fatal(err)
	}
	w.put(kv.DesiredKey(app), two.String())
	u := a.awaitState(app, deployments.StateRetrying)
	if u.Error == "" || u.Running != one || len(u.Quarantined) > 0 {
		t.Errorf("while storage is away: %+v", u)
	}
	a.awaitReady()
	await(t, "more tries", func() (bool, string) {
		_, body := a.get("/metrics")
		return regexp.MustCompile(`kedge_agent_jobs_total{kind="deploy",result="retried",role="web",unit="app"} ([3-9]|\d\d)`).MatchString(body), body
	})
	if n := w.log.Count("the job failed: trying again"); n != 1 {
		t.Errorf("the failure was logged %d times", n)
	}
	if err := os.Rename(w.path("away"), w.path("releases")); err != nil {
		t.Fatal(err)
	}
	a.awaitRunning(app, two)
	await(t, "the recovery's line", func() (bool, string) { // after the report
		n := w.log.Count("a job succeeded after one that had failed")
		return n == 1, fmt.Sprintf("logged %d times", n)
	})
}

// Two units can't have their trees in one place, or one inside the other's: the first stays, and the other reports
// why.
func TestUnitsInEachOthersWay(t *testing.T) {
	t.Parallel()
	for name, dest := range map[string]string{"the same": "app", "below it": "app/plugins", "around it": ".", "among its releases": "app.releases/x"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			one := w.publish("app", "1")
			two := w.publish("base", "1", func(m *deployments.Manifest) { m.Dest = w.path("srv", dest) })
			w.put(kv.DesiredKey(app), one.String())
			a := w.start()
			a.awaitRunning(app, one)
			w.put(kv.DesiredKey(unitID("base")), two.String())
			u := a.awaitState(unitID("base"), deployments.StateInvalid)
			if !strings.Contains(u.Error, "in the way of prod/web/app") {
				t.Errorf("the error is %q", u.Error)
			}
			if u.Reason != deployments.ReasonDestInUse || u.Facts["unit"] != app.String() ||
				u.Facts["dest"] != w.path("srv", dest) {
				t.Errorf("the reason is %s with %v", u.Reason, u.Facts)
			}
			if u := a.Report()["web"].Units["app"]; u.Running != one || u.State != deployments.StateConverged {
				t.Errorf("the unit that was there: %+v", u)
			}
		})
	}
}

// A renamed unit continues where it was, once nothing names its old name.
func TestRenamedUnit(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	one := w.publish("app", "1")
	two := w.publish("base", "2", func(m *deployments.Manifest) { m.Dest = w.path("srv", "app") })
	w.put(kv.DesiredKey(app), one.String())
	a := w.start()
	a.awaitRunning(app, one)
	w.delete(kv.DesiredKey(app))
	await(t, "the record's end", func() (bool, string) {
		u := a.Report()["web"].Units["app"]
		return u.Want.IsZero(), fmt.Sprintf("%+v", u)
	})
	w.put(kv.DesiredKey(unitID("base")), two.String())
	a.awaitUnit(unitID("base"), "converged", func(u deployments.UnitReport) bool { return u.Running == two && u.State == deployments.StateConverged })
	if version, err := os.ReadFile(w.path("srv", "app", "VERSION")); err != nil || string(version) != "2" {
		t.Errorf("dest holds %q, %v", version, err)
	}
}

// A renamed unit's old name is no longer part of the node: after a reboot nobody waits for its health.
func TestRenamedUnitAndAReboot(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	one := w.publish("app", "1")
	two := w.publish("base", "2", func(m *deployments.Manifest) { m.Dest = w.path("srv", "app") })
	w.put(kv.DesiredKey(app), one.String())
	a := w.start()
	a.awaitRunning(app, one)
	w.put(kv.DesiredKey(unitID("base")), two.String())
	w.delete(kv.DesiredKey(app))
	a.awaitState(unitID("base"), deployments.StateConverged)
	a.stop()
	w.reboot(app)
	w.reboot(unitID("base"))
	a = w.start(withMetrics)
	a.awaitReady()
	if u, ok := a.Report()["web"].Units["app"]; ok {
		t.Errorf("it reports what it was: %+v", u)
	}
}

// A unit that is renamed during a deployment finishes it before the new name's begins, as both have one dest.
func TestRenamedUnitEndsWhatItBegan(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	one := w.publish("app", "1")
	two := w.publish("app", "2", post("touch "+w.path("in-post")+"; while ! test -e "+w.path("go")+"; do sleep 0.02; done; false"))
	three := w.publish("base", "3", func(m *deployments.Manifest) { m.Dest = w.path("srv", "app") })
	w.put(kv.DesiredKey(app), one.String())
	a := w.start()
	a.awaitRunning(app, one)
	w.put(kv.DesiredKey(app), two.String())
	await(t, "post", func() (bool, string) { _, err := os.Stat(w.path("in-post")); return err == nil, "not yet" })
	w.delete(kv.DesiredKey(app))
	w.put(kv.DesiredKey(unitID("base")), three.String())
	a.awaitUnit(unitID("base"), "known", func(u deployments.UnitReport) bool { return u.Want == three })
	steadily(t, "it ends first", func() (bool, string) { return w.live("app") == "2", w.live("app") })
	write(t, w.path("go"), "")
	a.awaitState(unitID("base"), deployments.StateConverged)
	steadily(t, "it stays", func() (bool, string) { return w.live("app") == "3", w.live("app") })
}

// While the state can't be written nothing is deployed, and the node reports why; then it continues by itself.
func TestReadOnlyState(t *testing.T) {
	t.Parallel()
	tooltest.NeedRoot(t)
	w := newWorld(t)
	one, two := w.publish("app", "1"), w.publish("app", "2")
	w.put(kv.DesiredKey(app), one.String())
	a := w.start()
	a.awaitRunning(app, one)
	state := w.path("state")
	if err := syscall.Mount(state, state, "", syscall.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	mounted := true
	unmount := func() {
		if mounted {
			mounted = false
			if err := syscall.Unmount(state, syscall.MNT_DETACH); err != nil {
				t.Error(err)
			}
		}
	}
	t.Cleanup(unmount)
	await(t, "no file there to be open for writing", func() (bool, string) {
		err := syscall.Mount("", state, "", syscall.MS_REMOUNT|syscall.MS_BIND|syscall.MS_RDONLY, "")
		return err == nil, fmt.Sprint(err)
	})
	w.put(kv.DesiredKey(app), two.String())
	await(t, "a report that says why", func() (bool, string) {
		u := a.Report()["web"].Units["app"]
		return strings.HasPrefix(u.Error, "keeping the manifest of "+two.Digest.Short()) && u.Running == one, fmt.Sprintf("%+v", u)
	})
	if live, err := os.Readlink(w.path("srv", "app")); err != nil || !strings.Contains(live, one.Digest.Short()) {
		t.Errorf("dest leads to %s, %v", live, err)
	}
	unmount()
	a.awaitRunning(app, two)
	await(t, "lines that say so once", func() (bool, string) {
		began := w.log.Count("could not save the last known state")
		ended := w.log.Count("the last known state can be saved again")
		return began == 1 && ended == 1, fmt.Sprintf("it was logged %d times, and %d times that it is over", began, ended)
	})
}

// On a full disk an agent starts all the same, and reports what runs and what is wrong.
func TestStartsOnAFullDisk(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	one := w.publish("app", "1")
	w.put(kv.DesiredKey(app), one.String())
	state := w.path("state")
	if err := os.Mkdir(state, 0o700); err != nil {
		t.Fatal(err)
	}
	treetest.MountTmpfs(t, state, "size=256k")
	a := w.start()
	a.awaitRunning(app, one)
	a.stop()

	full := w.path("state", "full")
	f, err := os.Create(full)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.ReadFrom(zeros{}); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("the disk isn't full: %v", err)
	}
	f.Close()
	if err := os.Truncate(w.path("state", "lock"), 0); err != nil { // and the rest of the disk is somebody else's
		t.Fatal(err)
	}
	if f, err = os.OpenFile(full, os.O_APPEND|os.O_WRONLY, 0); err != nil {
		t.Fatal(err)
	}
	f.ReadFrom(zeros{})
	f.Close()
	two := w.publish("app", "2")
	w.put(kv.DesiredKey(app), two.String())
	a = w.start()
	a.awaitUnit(app, "in trouble", func(u deployments.UnitReport) bool {
		return u.Running == one && u.Want == two && strings.Contains(u.Error, "no space left")
	})
	if err := os.Remove(full); err != nil {
		t.Fatal(err)
	}
	a.awaitRunning(app, two)
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }
