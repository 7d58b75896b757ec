package fleet

import (
	"maps"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/kv"
)

// How far Git has moved past a pin is told where it is known, and only there.
func TestGitAhead(t *testing.T) {
	t.Parallel()
	record := put(kv.DesiredKey(app), deployments.Record{Target: release("app", "4"), Stable: release("app", "3"), Generation: 6})
	pinned := put(kv.DesiredKey(app), deployments.Record{
		Target: release("app", "2"), Generation: 7, Pinned: &deployments.Pinned{Target: release("app", "4")},
	})
	history := []kv.Entry{past("4", 6, "3"), past("4", 5, "3"), past("3", 4, "2"), past("2", 3, "1"), past("3", 2, "1"), past("1", 1, "")}
	pin := func(key, value string) kv.Entry { return put(key, value) }
	at := func(version string) string { return release("app", version).String() }
	node := func(name, version string) kv.Entry { return reportOf(name, runs("app", version)) }
	for name, c := range map[string]struct {
		entries []kv.Entry
		want    map[string]int // by version
	}{
		"what Git names":                    {[]kv.Entry{record, pin(kv.PinKey(app), at("4"))}, map[string]int{"4": 0}},
		"the one before":                    {[]kv.Entry{record, pin(kv.PinKey(app), at("3"))}, map[string]int{"3": 1}},
		"a retry names nothing new":         {[]kv.Entry{record, pin(kv.PinKey(app), at("2"))}, map[string]int{"2": 2}},
		"what came back counts from then":   {[]kv.Entry{record, pin(kv.PinKey(app), at("1"))}, map[string]int{"1": 4}},
		"a pin that is rolled out":          {[]kv.Entry{pinned, pin(kv.PinKey(app), at("2"))}, map[string]int{"2": 2}},
		"what Git never named":              {[]kv.Entry{record, pin(kv.PinKey(app), at("9"))}, nil},
		"a pin of a node":                   {[]kv.Entry{record, pin(kv.NodePinKey(app, "web-1"), at("2"))}, map[string]int{"2": 2}},
		"a hold keeps what runs":            {[]kv.Entry{record, pin(kv.PinKey(app), "hold"), node("web-1", "3"), node("web-2", "2")}, map[string]int{"3": 1, "2": 2}},
		"a node's own pin goes first":       {[]kv.Entry{record, pin(kv.PinKey(app), "hold"), node("web-1", "3"), pin(kv.NodePinKey(app, "web-1"), at("4"))}, map[string]int{"4": 0}},
		"a hold of a node that is gone":     {[]kv.Entry{record, pin(kv.PinKey(app), "hold"), gone(node("web-1", "3"))}, nil},
		"a pin that is over":                {[]kv.Entry{record, pin(kv.PinKey(app), "{release: "+at("2")+", until: 2026-11-24T11:00:00Z}")}, nil},
		"a pin of what Git says nothing of": {[]kv.Entry{pin(kv.PinKey(app), at("2"))}, nil},
		"no pin":                            {[]kv.Entry{record, node("web-1", "3")}, nil},
		"a node's own pin that is over": {[]kv.Entry{record, pin(kv.PinKey(app), "hold"), node("web-1", "3"),
			pin(kv.NodePinKey(app, "web-1"), "{release: "+at("4")+", until: 2026-11-24T11:00:00Z}")}, map[string]int{"3": 1}},
	} {
		want := map[deployments.Pointer]int{}
		for version, n := range c.want {
			want[release("app", version)] = n
		}
		if got := unitOf(t, Assemble(append(c.entries, history...), noon), "prod/web/app").GitAhead; !maps.Equal(got, want) {
			t.Errorf("%s: %v, want %v", name, got, want)
		}
	}
}

// Histories are read of pinned units, once a record; and follow the record while it is watched.
func TestReadTellsHowFarGitHasMoved(t *testing.T) {
	t.Parallel()
	s := openDir(t)
	store(t, s, recordOf("2", 2), past("1", 1, ""), past("2", 2, "1"), put(kv.PinKey(app), release("app", "1").String()))
	f, err := Read(t.Context(), s, Filter{})
	if err != nil {
		t.Fatal(err)
	}
	moved := func(f *Fleet) int { return unitOf(t, f, "prod/web/app").GitAhead[release("app", "1")] }
	if got := moved(f); got != 1 {
		t.Errorf("Git has moved by %d, want 1", got)
	}
	seen := fleets(t, s)
	until(t, seen, "one release further", func(f *Fleet) bool { return len(f.Units) == 1 && moved(f) == 1 })
	store(t, s, past("3", 3, "2"), recordOf("3", 3))
	until(t, seen, "two releases further", func(f *Fleet) bool { return moved(f) == 2 })
}

func TestOrdersThatWait(t *testing.T) {
	t.Parallel()
	f := Assemble([]kv.Entry{
		recordOf("1", 2), put(kv.ControlKey(app), "\ufeff Retry\r\n"),
		put("control/prod/web/base", "retry"),
		put("control/prod/web/worker", "retyr"), put("desired/prod/web/worker", release("worker", "1").String()),
		put("control/prod", "retry"),
		put("control/prod/web/cache", "order: abort\nby: alice\n"), put("desired/prod/web/cache", release("cache", "1").String()),
	}, noon)
	if u := unitOf(t, f, "prod/web/cache"); u.Order != "abort" {
		t.Errorf("the order with a name is %q", u.Order)
	}
	if u := unitOf(t, f, "prod/web/app"); u.Order != "retry" {
		t.Errorf("the order is %q", u.Order)
	}
	if u := unitOf(t, f, "prod/web/worker"); u.Order != "" {
		t.Errorf("an order that is none: %q", u.Order)
	}
	for _, key := range []string{"control/prod/web/base", "control/prod/web/worker", "control/prod"} {
		if f.Errors[key] == "" {
			t.Errorf("nothing is said of %s", key)
		}
	}
}

// What a node or a rollout says from before a retry says nothing of how the retry ends.
func TestWaitAfterARetry(t *testing.T) {
	t.Parallel()
	record := deployments.Record{Target: release("app", "2"), Stable: release("app", "1"), Generation: 3}
	failed := runs("app", "1")
	failed.State, failed.Want, failed.Generation = deployments.StateQuarantined, release("app", "2"), 3
	failed.Quarantined, failed.Error = []deployments.Digest{release("app", "2").Digest}, "health: 503"
	again := failed
	again.Since = failed.Since.Add(time.Minute)
	good := runs("app", "2")
	good.Generation = 3
	for name, c := range map[string]struct {
		then deployments.UnitReport
		good bool
	}{
		"it works now":   {good, true},
		"it fails again": {again, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := openDir(t)
			store(t, s, put(kv.DesiredKey(app), record), reportOf("web-1", failed))
			if err := order(t, s, "retry"); err != nil {
				t.Fatal(err)
			}
			ended := waiting(t, s, "")
			goesOn(t, s, ended)
			tried := record
			tried.Retry++
			value := put("", tried).Value
			if err := s.Commit(t.Context(), nil, kv.Delete(kv.ControlKey(app)), kv.Put(kv.DesiredKey(app), value)); err != nil {
				t.Fatal(err)
			}
			select {
			case err := <-ended:
				t.Fatalf("Wait ended by what was before the retry: %v", err)
			case <-time.After(3 * watchPause):
			}
			store(t, s, reportOf("web-1", c.then))
			if err := ends(t, ended); (err == nil) != c.good {
				t.Error(err)
			}
		})
	}
}
