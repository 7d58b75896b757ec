package agent

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"kedge/artifact/object"
	"kedge/deployments"
	"kedge/kv"
)

func unitID(name string) deployments.UnitID {
	return deployments.UnitID{Stage: "prod", Role: "web", Unit: name}
}

func TestUnitsConvergeInOrder(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	logged := func(unit string) func(*deployments.Manifest) { return post("echo " + unit + " >> " + w.path("order")) }
	records := map[string]deployments.Record{
		"app":   {Target: w.publish("app", "1", logged("app")), After: []string{"base", "cache"}},
		"base":  {Target: w.publish("base", "1", logged("base"))},
		"cache": {Target: w.publish("cache", "1", logged("cache")), After: []string{"base"}},
	}
	a := w.start()
	w.desire(app, records["app"])
	u := a.awaitUnit(app, "waiting", func(u deployments.UnitReport) bool { return strings.Contains(u.Message, "base") })
	if u.State != deployments.StateWaiting || !u.Running.IsZero() {
		t.Errorf("a unit whose base has no record: %+v", u)
	}
	a.awaitUnit(app, "staged", func(u deployments.UnitReport) bool { return u.Staged == records["app"].Target.Digest })
	w.desire(unitID("cache"), records["cache"])
	w.desire(unitID("base"), records["base"])
	for name, r := range records {
		a.awaitRunning(unitID(name), r.Target)
	}
	order, err := os.ReadFile(w.path("order"))
	if err != nil || string(order) != "base\ncache\napp\n" {
		t.Errorf("converged in order %q, %v", order, err)
	}
}

func TestAFailedUnitHoldsUpThoseAfterIt(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	base := unitID("base")
	one, two := w.publish("app", "1"), w.publish("app", "2")
	good, bad := w.publish("base", "1"), w.publish("base", "2", post("exit 3"))
	w.desire(base, deployments.Record{Target: good, Generation: 1})
	w.desire(app, deployments.Record{Target: one, Generation: 1, After: []string{"base"}})
	a := w.start()
	a.awaitRunning(app, one)
	w.desire(base, deployments.Record{Target: bad, Generation: 2})
	a.awaitState(base, deployments.StateQuarantined)
	w.desire(app, deployments.Record{Target: two, Generation: 2, After: []string{"base"}})
	u := a.awaitState(app, deployments.StateWaiting)
	if !strings.Contains(u.Message, "base") || !strings.Contains(u.Message, "quarantined") {
		t.Errorf("it doesn't say why it waits: %+v", u)
	}
	steadily(t, "it waits", func() (bool, string) { return w.live("app") == "1", w.live("app") })
	w.desire(base, deployments.Record{Target: good, Generation: 3})
	a.awaitRunning(app, two)
}

func TestACircleOfUnitsIsReported(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := w.publish("app", "1")
	w.desire(app, deployments.Record{Target: p, After: []string{"b"}})
	b, lone := w.publish("b", "1"), w.publish("lone", "1")
	w.desire(unitID("b"), deployments.Record{Target: b, After: []string{"app"}})
	w.desire(unitID("lone"), deployments.Record{Target: lone})
	a := w.start()
	u := a.awaitState(app, deployments.StateInvalid)
	if !strings.Contains(u.Error, "app after b after app") {
		t.Errorf("the circle isn't named: %+v", u)
	}
	a.awaitRunning(unitID("lone"), lone)
	w.desire(unitID("b"), deployments.Record{Target: b})
	a.awaitRunning(app, p)
}

func TestSupersedes(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	one, three := w.publish("app", "1"), w.publish("app", "3")
	slow := w.publishTree("app", "2", map[string]string{"data": noise(8 << 20)})
	w.put(kv.DesiredKey(app), one.String())
	a := w.start(func(c *Config) { c.Objects = object.New(object.Config{MaxBandwidth: 256 << 10}) }) // 32 s for the slow one
	a.awaitRunning(app, one)
	w.put(kv.DesiredKey(app), slow.String())
	a.awaitUnit(app, "fetching", func(u deployments.UnitReport) bool { return u.State == deployments.StateFetching && u.Fetched > 0 })
	began := time.Now()
	w.put(kv.DesiredKey(app), three.String())
	a.awaitRunning(app, three)
	if took := time.Since(began); took > 15*time.Second {
		t.Errorf("the new target waited %v for the old one", took)
	}
	if u := a.unit(app); u.Error != "" || len(u.Quarantined) > 0 {
		t.Errorf("a deployment that was called off left %+v", u)
	}
}

func TestSupersedesAReleaseThatHangs(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	one, two := w.publish("app", "1"), w.publish("app", "2")
	hangs := w.publish("app", "bad", post("touch "+w.path("hangs")+"; sleep 300"))
	w.put(kv.DesiredKey(app), one.String())
	a := w.start()
	a.awaitRunning(app, one)
	w.put(kv.DesiredKey(app), hangs.String())
	await(t, "the command", func() (bool, string) { _, err := os.Stat(w.path("hangs")); return err == nil, "not yet" })
	if u := a.unit(app); u.State != deployments.StateSwitching {
		t.Errorf("while a command runs: %+v", u)
	}
	w.put(kv.PinKey(app), two.String())
	a.awaitRunning(app, two)
}

func TestQuarantineEndsWithAnotherClaim(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	count := post("echo x >> " + w.path("tries"))
	tries := func() int { data, _ := os.ReadFile(w.path("tries")); return strings.Count(string(data), "x") }
	good := w.publish("app", "1")
	bad := w.publish("app", "2", count, post("test -e "+w.path("mended")))
	w.desire(app, deployments.Record{Target: good, Generation: 1})
	a := w.start(withMetrics)
	a.awaitRunning(app, good)

	w.desire(app, deployments.Record{Target: bad, Generation: 2})
	failedTimes := func(n int) {
		t.Helper()
		u := a.awaitUnit(app, fmt.Sprintf("quarantined after %d tries", n), func(u deployments.UnitReport) bool {
			return u.State == deployments.StateQuarantined && tries() == n
		})
		if u.Running != good || !slices.Equal(u.Quarantined, []deployments.Digest{bad.Digest}) || u.Error == "" || w.live("app") != "1" {
			t.Errorf("after %d tries: %+v", n, u)
		}
		a.awaitReady() // it went back, and serves
	}
	failedTimes(1)
	// The same request doesn't get another try: neither by a new commit nor by a restart.
	w.desire(app, deployments.Record{Target: bad, Generation: 2, Commit: strings.Repeat("0", 40)})
	steadily(t, "one try", func() (bool, string) { return tries() == 1, fmt.Sprint(tries()) })
	a.stop()
	a = w.start(withMetrics)
	failedTimes(1)
	steadily(t, "one try", func() (bool, string) { return tries() == 1, fmt.Sprint(tries()) })

	w.desire(app, deployments.Record{Target: bad, Generation: 2, Retry: 1})
	failedTimes(2)
	w.desire(app, deployments.Record{Target: bad, Generation: 3, Retry: 1})
	failedTimes(3)
	w.put(kv.PinKey(app), bad.String())
	failedTimes(4)
	if code := a.post("/retry?unit=prod/web/app"); code != 204 {
		t.Errorf("POST /retry: %d", code)
	}
	failedTimes(5)
	if code := a.post("/retry?unit=prod/web/none"); code != 404 {
		t.Errorf("POST /retry of a unit that isn't here: %d", code)
	}
	write(t, w.path("mended"), "")
	if code := a.post("/retry"); code != 204 {
		t.Errorf("POST /retry: %d", code)
	}
	u := a.awaitRunning(app, bad)
	if len(u.Quarantined) > 0 || u.Error != "" {
		t.Errorf("after it succeeded: %+v", u)
	}
}

func TestStagesBeforeItIsAdmitted(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	one, two := w.publish("app", "1"), w.publish("app", "2")
	w.desire(app, deployments.Record{Target: one, Stable: one, Generation: 1})
	a := w.start()
	a.awaitRunning(app, one)
	r := deployments.Record{
		Target: two, Stable: one, Generation: 2, Rollout: &deployments.Progress{Phase: deployments.PhaseRolling, Since: time.Now()},
	}
	w.desire(app, r)
	a.awaitUnit(app, "staged", func(u deployments.UnitReport) bool {
		return u.State == deployments.StateConverged && u.Staged == two.Digest && u.Running == one
	})
	// Once admitted, the unit doesn't need storage.
	if err := os.RemoveAll(w.path("releases")); err != nil {
		t.Fatal(err)
	}
	r.Rollout.Cutoff = math.MaxUint64
	w.desire(app, r)
	a.awaitRunning(app, two)
}

func TestReadyFollowsTheSwitch(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	one := w.publish("app", "1")
	two := w.publish("app", "2", post("touch "+w.path("in-post")+"; while ! test -e "+w.path("go")+"; do sleep 0.02; done"))
	w.put(kv.DesiredKey(app), one.String())
	a := w.start(withMetrics)
	a.awaitRunning(app, one)
	a.awaitReady()
	w.put(kv.DesiredKey(app), two.String())
	await(t, "post", func() (bool, string) { _, err := os.Stat(w.path("in-post")); return err == nil, "not yet" })
	if code, body := a.get("/ready"); code != 503 || !strings.Contains(body, "drained") {
		t.Errorf("between switch and health, /ready says %d %s", code, body)
	}
	// After a kill now, the unit is still drained.
	a.stop()
	a = w.start(withMetrics)
	if code, _ := a.get("/ready"); code != 503 {
		t.Error("after a restart in mid-switch the node is ready")
	}
	write(t, w.path("go"), "")
	a.awaitRunning(app, two)
	a.awaitReady()
}

func TestDriftIsSeenAndHealed(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := w.publish("app", "1")
	other := w.path("elsewhere")
	write(t, other+"/VERSION", "hacked")
	dest := w.path("srv", "app")
	remove := func() {
		t.Helper()
		if err := os.Remove(dest); err != nil {
			t.Fatal(err)
		}
	}
	w.desire(app, deployments.Record{Target: p})
	a := w.start(func(c *Config) { c.VerifyEvery = 20 * time.Millisecond })
	a.awaitRunning(app, p)

	remove()
	a.awaitUnit(app, "drifted", func(u deployments.UnitReport) bool { return slices.Contains(u.Drift, dest) })
	steadily(t, "not asked to heal", func() (bool, string) { return w.live("app") != "1", w.live("app") })
	w.desire(app, deployments.Record{Target: p, Drift: deployments.DriftHeal})
	healed := func() {
		t.Helper()
		a.awaitUnit(app, "healed", func(u deployments.UnitReport) bool { return len(u.Drift) == 0 && w.live("app") == "1" })
	}
	healed()
	remove()
	if err := os.Symlink(other, dest); err != nil {
		t.Fatal(err)
	}
	healed()
	// The periodic check sees a change inside the tree.
	w.desire(app, deployments.Record{Target: p})
	if err := os.Remove(w.path("srv", "app", "bin", "run")); err != nil {
		t.Fatal(err)
	}
	a.awaitUnit(app, "drifted", func(u deployments.UnitReport) bool { return slices.Contains(u.Drift, "bin/run") })
	w.desire(app, deployments.Record{Target: p, Drift: deployments.DriftHeal})
	healed()
	if _, err := os.Stat(w.path("srv", "app", "bin", "run")); err != nil {
		t.Error(err)
	}
}

// What a release's commands made is neither reported as drift nor removed by healing. If it is lost, it stays in
// the report, as only the commands can restore it, and the rest is healed.
func TestMadeByCommandsIsNoDrift(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := w.publish("app", "1", post(`cd "$KEDGE_DEST" && ln -sfn ../log log && mkdir -p cache && touch cache/x`))
	w.desire(app, deployments.Record{Target: p, Drift: deployments.DriftHeal})
	a := w.start(func(c *Config) { c.VerifyEvery = 20 * time.Millisecond })
	a.awaitRunning(app, p)
	in := func(name string) string { return w.path("srv", "app", name) }
	there := func() (bool, string) {
		_, link := os.Readlink(in("log"))
		_, file := os.Stat(in("cache/x"))
		drift := a.unit(app).Drift
		return link == nil && file == nil && len(drift) == 0, fmt.Sprint(link, file, drift)
	}
	steadily(t, "what the commands made stays", there)
	if err := errors.Join(os.Remove(in("bin/run")), os.Remove(in("log"))); err != nil {
		t.Fatal(err)
	}
	a.awaitUnit(app, "healed", func(u deployments.UnitReport) bool {
		_, err := os.Stat(in("bin/run"))
		ok, _ := there()
		return err == nil && ok
	})
	if err := os.RemoveAll(in("cache")); err != nil {
		t.Fatal(err)
	}
	lost := func(u deployments.UnitReport) bool { return slices.Equal(u.Drift, []string{"cache"}) }
	a.awaitUnit(app, "told", lost)
	live, err := filepath.EvalSymlinks(w.path("srv", "app"))
	if err != nil {
		t.Fatal(err)
	}
	before, err := os.Stat(live)
	if err != nil {
		t.Fatal(err)
	}
	steadily(t, "told all the while, and not healed again and again", func() (bool, string) {
		now, err := os.Stat(live)
		u := a.unit(app)
		return err == nil && os.SameFile(before, now) && lost(u), fmt.Sprint(err, u.Drift)
	})
}

func TestRefusedByThisNode(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	one := w.publish("app", "1")
	two := w.publish("app", "2", post("true"))
	w.put(kv.DesiredKey(app), one.String())
	a := w.start(func(c *Config) { c.Bounds.NoCommands = true })
	a.awaitRunning(app, one)
	w.put(kv.DesiredKey(app), two.String())
	u := a.awaitState(app, deployments.StateInvalid)
	if u.Running != one || u.Error == "" {
		t.Errorf("a release that this node's bounds forbid: %+v", u)
	}
	w.put(kv.DesiredKey(app), one.String())
	a.awaitRunning(app, one)
}

// A manifest that can't be parsed on this node is refused, not read again and again: its bytes are
// pinned. An agent that was restarted, with other variables perhaps, reads it once more.
func TestManifestThatIsNotValidHere(t *testing.T) { // not parallel, as it changes the environment
	w := newWorld(t)
	one, two := w.publish("app", "1"), w.publish("app", "2")
	text, err := os.ReadFile(strings.TrimPrefix(two.URL, "file://"))
	if err != nil {
		t.Fatal(err)
	}
	text = append(text, "\ncommands: {env: {COLOR: '{{ must_env `KEDGETEST_COLOR` }}'}}\n"...)
	write(t, strings.TrimPrefix(two.URL, "file://"), string(text))
	two.Digest = sha256.Sum256(text)

	w.desire(app, deployments.Record{Target: one, Generation: 1})
	a := w.start()
	a.awaitRunning(app, one)
	w.desire(app, deployments.Record{Target: two, Stable: one, Generation: 2})
	u := a.awaitState(app, deployments.StateInvalid)
	if u.Running != one || !strings.Contains(u.Error, "KEDGETEST_COLOR") || !strings.Contains(u.Error, "manifest.yaml") {
		t.Errorf("the report: %+v", u)
	}
	a.stop()
	t.Setenv("KEDGETEST_COLOR", "blue")
	a = w.start()
	a.awaitRunning(app, two)
}
