package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kedge/deployments"
	"kedge/deployments/wait"
	"kedge/kv"
	"kedge/sync/agent/cache"
	"kedge/sync/agent/drain"
	"kedge/sync/agent/statedir"
)

// written is a store's presence that keeps the values written to it.
type written struct {
	mu      sync.Mutex
	reports []deployments.Report
}

func (*written) Close(context.Context) error { return nil }
func (*written) KeepAtClose(string)          {}
func (w *written) Join(ctx context.Context, key string, value []byte) (uint64, <-chan struct{}, error) {
	return 1, nil, w.Put(ctx, key, value)
}

func (w *written) Put(_ context.Context, _ string, value []byte) error {
	var r deployments.Report
	err := json.Unmarshal(value, &r)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.reports = append(w.reports, r)
	return err
}

func (w *written) read() (n int, last deployments.Report) {
	w.mu.Lock()
	defer w.mu.Unlock()
	n = len(w.reports)
	return n, w.reports[n-1]
}

type presenceStore struct {
	kv.Store
	presence kv.Presence
}

func (s presenceStore) Presence(context.Context, string) (kv.Presence, error) { return s.presence, nil }

// A report that has to wait is replaced by newer ones: many changes result in one more report, with the last state.
func TestReportsAreBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := &written{}
		known, err := cache.Open(cache.Config{
			Node:  node,
			Stage: "prod",
			Roles: []string{"web"},
			File:  filepath.Join(t.TempDir(), statedir.LastKnownFile),
			Log:   quiet(),
		})
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range known.Role("web").Sources() {
			known.See(s, kv.View{Synced: true}, time.Now())
		}
		a := &Agent{
			c: Config{
				Store: presenceStore{presence: store},
				Node:  node,
				Stage: "prod",
				Log:   quiet(),
			},
			cache:        known,
			metrics:      newMetrics(nil),
			drainTracker: drain.New(nil, nil, quiet()),
			reportDue:    wait.NewSignal(),
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			a.report(ctx)
		}()
		synctest.Wait()
		for range 3 * reportBurst {
			a.mu.Lock()
			a.startingSince = a.startingSince.Add(time.Second)
			a.mu.Unlock()
			a.reportDue.Set()
			synctest.Wait()
		}
		if n, _ := store.read(); n != reportBurst {
			t.Errorf("it wrote %d reports at once, want %d", n, reportBurst)
		}
		time.Sleep(time.Second / reportsPerSecond)
		synctest.Wait()
		if n, last := store.read(); n != reportBurst+1 || !last.Started.Equal(a.startingSince) {
			t.Errorf("it wrote %d reports, want one more, of %v: %+v", n, a.startingSince, last)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if n, _ := store.read(); n != reportBurst+1 {
			t.Errorf("it wrote %d reports of what had not changed", n-reportBurst-1)
		}
		cancel()
		<-done
	})
}

// A node writes two reports in a rollout: that it switches, and that it has. That it knows a record without having
// to act, or has staged the next release, is no reason to write.
func TestReportsOfARollout(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	one, two := w.publish("app", "1"), w.publish("app", "2")
	w.desire(app, deployments.Record{Target: one, Generation: 1})
	var mu sync.Mutex
	var seen []string
	go func() {
		_ = w.store.Watch(t.Context(), kv.RolePrefix(kv.StatusPrefix, "prod", "web"), func(v kv.View) {
			mu.Lock()
			defer mu.Unlock()
			for _, e := range v.Entries {
				if n := len(seen); e.Session != "" && (n == 0 || seen[n-1] != string(e.Value)) {
					seen = append(seen, string(e.Value))
				}
			}
		})
	}()
	reports := func() []string {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(seen)
	}
	a := w.start()
	a.awaitRunning(app, one)
	await(t, "the report of that", func() (bool, string) {
		r, _ := w.reported("web")
		return r.Units["app"].State == deployments.StateConverged && r.Ready, fmt.Sprint(r)
	})
	time.Sleep(2 * progressEvery) // what it has left to say
	before := len(reports())
	record := deployments.Record{Target: two, Stable: one, Generation: 2,
		Rollout: &deployments.Progress{Phase: deployments.PhaseRolling, Since: time.Now()}}
	w.desire(app, record)
	a.awaitUnit(app, "staged", func(u deployments.UnitReport) bool { return u.Staged == two.Digest && u.Generation == 2 })
	time.Sleep(2 * progressEvery)
	if all := reports(); len(all) != before {
		t.Errorf("a node that waits for its turn writes %s", all[before:])
	}
	record.Rollout.Cutoff = 1<<64 - 1
	began := time.Now()
	w.desire(app, record)
	a.awaitRunning(app, two)
	await(t, "the report of that", func() (bool, string) {
		r, _ := w.reported("web")
		return r.Units["app"].State == deployments.StateConverged && r.Units["app"].Running == two, fmt.Sprint(r)
	})
	allowed := 2 + int(time.Since(began)/progressEvery) // a slow switch tells how it goes
	record.Rollout = nil
	record.Stable = deployments.Pointer{}
	w.desire(app, record)
	time.Sleep(2 * progressEvery)
	all := reports()[before:]
	if len(all) > allowed {
		t.Errorf("%d reports, want at most %d: %s", len(all), allowed, strings.Join(all, "\n"))
	}
	r, err := deployments.ParseReport([]byte(all[len(all)-1]))
	if u := r.Units["app"]; err != nil || u.State != deployments.StateConverged || u.Running != two || u.Generation != 2 ||
		!r.Ready {
		t.Errorf("the last one: %+v, %v", r, err)
	}
}

// A report that has to drop units keeps those in mid-switch, whose switches begin once the store holds them.
func TestFullReportsNameWhatSwitches(t *testing.T) {
	t.Parallel()
	r := deployments.Report{Units: map[string]deployments.UnitReport{}}
	for i := range deployments.MaxRoleUnits {
		r.Units[fmt.Sprintf("u%03d", i)] = deployments.UnitReport{Error: strings.Repeat("x", deployments.MaxReport/50)}
	}
	r.Units["zz"] = deployments.UnitReport{State: deployments.StateSwitching}
	left := fitReport(&r)
	if u := r.Units["zz"]; u.State != deployments.StateSwitching || left < 50 ||
		left+len(r.Units) != deployments.MaxRoleUnits+1 {
		t.Errorf("%d units are left out, %d are in, zz is %+v", left, len(r.Units), u)
	}
	if n := len(encoded(r)); n > deployments.MaxReport {
		t.Errorf("the report has %d bytes", n)
	}
}

// That a node fetches what it will switch to can wait for a second, as most switches have begun by then. What else a
// report says can't.
func TestFetchingIsReportedWithinASecond(t *testing.T) {
	t.Parallel()
	now := time.Now()
	want := deployments.Pointer{URL: "s3://releases/2.yaml", Digest: deployments.Digest{2}}
	was := deployments.UnitReport{State: deployments.StateConverged}
	was.Running.Digest = deployments.Digest{1}
	fetching := was
	fetching.State, fetching.Want, fetching.Since = deployments.StateFetching, want, now.Add(-switchWithin/4)
	for name, c := range map[string]struct {
		change func(u *deployments.UnitReport)
		first  bool
		wait   time.Duration
	}{
		"it fetches":         {func(*deployments.UnitReport) {}, false, switchWithin * 3 / 4},
		"it has fetched":     {func(u *deployments.UnitReport) { u.Staged = want.Digest }, false, switchWithin * 3 / 4},
		"a second ago":       {func(u *deployments.UnitReport) { u.Since = now.Add(-switchWithin) }, false, 0},
		"it switches":        {func(u *deployments.UnitReport) { u.State = deployments.StateSwitching }, false, 0},
		"it can't be had":    {func(u *deployments.UnitReport) { u.Error = "denied" }, false, 0},
		"nothing is wanted":  {func(u *deployments.UnitReport) { u.Want = deployments.Pointer{} }, false, 0},
		"the unit is new":    {func(*deployments.UnitReport) {}, true, 0},
		"it is no longer up": {func(u *deployments.UnitReport) { u.State = deployments.StateUnhealthy }, false, 0},
	} {
		last, u := map[string]deployments.UnitReport{"other": was, "app": was}, fetching
		if c.first {
			delete(last, "app")
		}
		c.change(&u)
		if wait := reportDelay(last, map[string]deployments.UnitReport{"other": was, "app": u}, now); wait != c.wait {
			t.Errorf("%s: it waits for %v, want %v", name, wait, c.wait)
		}
	}
}
