package fleet

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/deployments/fuzzlimit"
	"kedge/kv"
	"kedge/kv/kvtest"
)

func TestAssembleCounts(t *testing.T) {
	t.Parallel()
	f := Assemble(busyFleet(), noon)
	for _, c := range []struct {
		unit                        string
		converged, live, gone, have int
	}{
		{"prod/web/app", 2, 4, 1, 5},
		{"prod/web/base", 4, 4, 0, 4},   // held by a pin, and that is what they should do
		{"prod/web/worker", 0, 4, 0, 4}, // a record that doesn't parse
		{"staging/web/app", 0, 0, 0, 0}, // no node yet
	} {
		u := unitOf(t, f, c.unit)
		if u.Converged != c.converged || u.Live != c.live || u.Gone != c.gone || len(u.Nodes) != c.have {
			t.Errorf("%s: %d of %d converged, %d gone, %d nodes; want %d of %d, %d, %d",
				c.unit, u.Converged, u.Live, u.Gone, len(u.Nodes), c.converged, c.live, c.gone, c.have)
		}
	}
	if f.Errors["desired/prod/web/worker"] == "" || len(f.Errors) != 1 {
		t.Errorf("errors: %v", f.Errors)
	}
	if u := unitOf(t, f, "prod/web/worker"); !strings.Contains(u.Error, "sha256") {
		t.Errorf("the unit's error is %q", u.Error)
	}
}

// What a node says of itself isn't enough: it may not have seen the newest yet.
func TestConvergedIsSeenFromHere(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		entries []kv.Entry
		want    bool
	}{
		"it runs the target":           {[]kv.Entry{put(kv.DesiredKey(app), deployments.Record{Target: release("app", "1"), Generation: 2})}, true},
		"there is a newer target":      {[]kv.Entry{put(kv.DesiredKey(app), deployments.Record{Target: release("app", "2"), Generation: 3})}, false},
		"a pin wants another":          {[]kv.Entry{put(kv.DesiredKey(app), release("app", "1").String()), put(kv.PinKey(app), release("app", "2").String())}, false},
		"a pin of it wants another":    {[]kv.Entry{put(kv.DesiredKey(app), release("app", "1").String()), put(kv.NodePinKey(app, "web-1"), release("app", "2").String())}, false},
		"a pin of another node does":   {[]kv.Entry{put(kv.DesiredKey(app), release("app", "1").String()), put(kv.NodePinKey(app, "web-2"), release("app", "2").String())}, true},
		"a pin that is over":           {[]kv.Entry{put(kv.DesiredKey(app), release("app", "1").String()), put(kv.PinKey(app), "{release: "+release("app", "2").String()+", until: 2026-11-24T11:00:00Z}")}, true},
		"a pin that does not parse":    {[]kv.Entry{put(kv.DesiredKey(app), release("app", "1").String()), put(kv.PinKey(app), "hodl")}, false},
		"nothing is desired":           {nil, true},
		"it comes from another bucket": {[]kv.Entry{put(kv.DesiredKey(app), strings.Replace(release("app", "1").String(), "acme-releases", "acme-mirror", 1))}, true},
		"a hold that it has not seen":  {[]kv.Entry{put(kv.DesiredKey(app), release("app", "1").String()), put(kv.PinKey(app), "hold")}, false},
		"it is not admitted, and runs stable": {[]kv.Entry{put(kv.DesiredKey(app), deployments.Record{Target: release("app", "2"), Stable: release("app", "1"), Generation: 3,
			Rollout: &deployments.Progress{Phase: deployments.PhaseCanary}})}, true},
	} {
		entries := append(c.entries, says("web-1", map[string]deployments.UnitReport{"app": runs("app", "1")}))
		u := unitOf(t, Assemble(entries, noon), "prod/web/app")
		if u.Nodes[0].Converged != c.want || (u.Converged == 1) != c.want {
			t.Errorf("%s: converged %v, want %v (%s)", name, u.Nodes[0].Converged, c.want, u.Nodes[0].Message)
		}
	}
}

// A record applies to the nodes that had joined when it was written: of those, status tells what their agents decide.
func TestJoinedNodesAreSeenAsAdmitted(t *testing.T) {
	t.Parallel()
	record := deployments.Record{Target: release("app", "2"), Stable: release("app", "1"), Generation: 3, Joined: 7,
		Rollout: &deployments.Progress{Phase: deployments.PhaseRolling, Cutoff: ^uint64(0)}}
	plain := deployments.Record{Target: release("app", "2"), Generation: 3, Joined: 7}
	for name, c := range map[string]struct {
		record deployments.Record
		joined uint64
		want   deployments.Pointer
	}{
		"admitted":            {record, 7, release("app", "2")},
		"joined later":        {record, 8, release("app", "1")},
		"without a rollout":   {plain, 7, release("app", "2")},
		"later, without one":  {plain, 8, release("app", "1")},
		"not known to itself": {record, 0, release("app", "1")},
	} {
		report := deployments.Report{Node: "web-1", Joined: c.joined,
			Units: map[string]deployments.UnitReport{"app": runs("app", "1")}}
		e := put(kv.StatusKey("prod", "web", "web-1"), report)
		e.Session = "alive"
		n := unitOf(t, Assemble([]kv.Entry{put(kv.DesiredKey(app), c.record), e}, noon), "prod/web/app").Nodes[0]
		if n.Want != c.want || n.Converged != (c.want == release("app", "1")) {
			t.Errorf("%s: it wants %s (%s), converged %v", name, n.Want, n.Message, n.Converged)
		}
	}
}

// A node that holds an older record, as after the restore of a snapshot, stays where it is: on what nothing there
// names.
func TestWhoHoldsAnOldRecordHasNotConverged(t *testing.T) {
	t.Parallel()
	held := runs("app", "2")
	held.Reason = deployments.ReasonOldGeneration
	f := Assemble([]kv.Entry{
		put(kv.DesiredKey(app), deployments.Record{Target: release("app", "1"), Generation: 1, Joined: 1}),
		says("web-1", map[string]deployments.UnitReport{"app": held}),
	}, noon)
	if u := unitOf(t, f, "prod/web/app"); u.Converged != 0 || u.Nodes[0].Converged {
		t.Errorf("%d of %d converged", u.Converged, u.Live)
	}
}

// Nothing in a store may go unseen: what can't be read is an error at its key.
func TestAssembleNamesWhatDoesNotParse(t *testing.T) {
	t.Parallel()
	bad := map[string]string{
		"mirror/state":            "{",
		"desired/prod/web":        "hold",
		"desired/prod/web/app":    "",
		"pins/prod/web/app":       "hodl",
		"pins/prod/web/app/web-1": "hodl",
		"pins/prod":               "hold",
		"status/prod/web/web-1":   "{",
		"status/prod/web":         "{}",
	}
	var entries []kv.Entry
	for key, value := range bad {
		e := put(key, value)
		e.Session = "alive"
		entries = append(entries, e)
	}
	f := Assemble(entries, noon)
	for key := range bad {
		if f.Errors[key] == "" {
			t.Errorf("nothing is said of %s", key)
		}
	}
	// What is wrong with several is said once.
	twice := &Fleet{Errors: map[string]string{"pins/": "denied", "control/": "denied", "mirror/": "away"}}
	if said := twice.Faults(); len(said) != 2 || said[0].Says.Text != "control/, pins/: denied" || said[1].Says.Text != "mirror/: away" {
		t.Errorf("the faults are %v", said)
	}
	// Those of a unit stand with it; a key below it that no node would read has no other place than among the faults.
	if said := fmt.Sprint(Assemble([]kv.Entry{put("pins/prod/web/app/web-1/x", "hold"), put("pins/prod/web/app/web-1", "hodl")}, noon).Faults()); !strings.Contains(said, "web-1/x") || strings.Contains(said, "hodl") {
		t.Errorf("the faults are %s", said)
	}
	u := unitOf(t, f, "prod/web/app")
	if u.Live != 1 || u.Converged != 0 || u.Nodes[0].Name != "web-1" {
		t.Errorf("the live node whose report does not parse isn't there: %+v", u)
	}
}

func FuzzAssemble(f *testing.F) {
	for _, e := range busyFleet() {
		f.Add(e.Key, e.Value, e.Session)
	}
	f.Add("status/prod/web\r/web-1", []byte(`{"units":{"app":{}}}`), "alive")
	f.Fuzz(func(t *testing.T, key string, value []byte, session string) {
		var out strings.Builder
		fuzzlimit.Run(t, value, func() {
			fleet := Assemble([]kv.Entry{{Key: key, Value: value, Session: session, Version: 1},
				put(kv.DesiredKey(app), release("app", "1").String())}, noon)
			for _, width := range []int{0, 20, 80} {
				if err := WriteTable(&out, fleet, TableOptions{Width: width, AllNodes: true}); err != nil {
					t.Fatal(err)
				}
			}
		})
		if strings.ContainsAny(out.String(), "\x1b\r\a") {
			t.Errorf("control characters reach the terminal: %q", out.String())
		}
	})
}

func TestReadNarrowsDown(t *testing.T) {
	t.Parallel()
	s := openDir(t)
	store(t, s, busyFleet()...)
	for _, c := range []struct {
		filter Filter
		units  string
		errors int
	}{
		{Filter{}, "prod/web/app prod/web/base prod/web/worker staging/web/app", 1},
		{Filter{Stage: "prod"}, "prod/web/app prod/web/base prod/web/worker", 1},
		{Filter{Stage: "staging", Role: "web"}, "staging/web/app", 0},
		{Filter{Stage: "prod", Role: "web", Unit: "app"}, "prod/web/app", 0},
		{Filter{Stage: "prod", Role: "db"}, "", 0},
	} {
		f, err := Read(t.Context(), s, c.filter)
		if err != nil {
			t.Errorf("%+v: %v", c.filter, err)
			continue
		}
		var ids []string
		for _, u := range f.Units {
			ids = append(ids, u.ID.String())
		}
		if got := strings.Join(ids, " "); got != c.units || len(f.Errors) != c.errors || f.Mirror == nil {
			t.Errorf("%+v: units %s, want %s; errors %v, want %d", c.filter, got, c.units, f.Errors, c.errors)
		}
	}
}

// Without rights nothing looks like an empty fleet.
func TestReadIsDenied(t *testing.T) {
	t.Parallel()
	s := kvtest.Faulty(openDir(t))
	store(t, s, busyFleet()...)
	s.SetDown(kv.ErrDenied)
	if f, err := Read(t.Context(), s, Filter{}); !errors.Is(err, kv.ErrDenied) {
		t.Errorf("%+v, %v; want it denied", f, err)
	}
	if err := Pin(t.Context(), s, app, "", deployments.Pin{Hold: true}); !errors.Is(err, kv.ErrDenied) {
		t.Errorf("pin: %v, want it denied", err)
	}
	if _, err := Unpin(t.Context(), s, app, ""); !errors.Is(err, kv.ErrDenied) {
		t.Errorf("unpin: %v, want it denied", err)
	}
}

// fleets runs Watch until the test ends.
func fleets(t *testing.T, s kv.Store) <-chan *Fleet {
	t.Helper()
	seen := make(chan *Fleet)
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- Watch(ctx, s, Filter{}, func(f *Fleet) {
			select {
			case seen <- f:
			case <-ctx.Done():
			}
		})
	}()
	t.Cleanup(func() {
		stop()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("Watch ended with %v", err)
		}
	})
	return seen
}

// until waits for a fleet that ok takes.
func until(t *testing.T, seen <-chan *Fleet, what string, ok func(*Fleet) bool) {
	t.Helper()
	deadline := time.After(20 * time.Second)
	var last *Fleet
	for {
		select {
		case last = <-seen:
			if ok(last) {
				return
			}
		case <-deadline:
			t.Fatalf("%s: never seen; the last fleet is %+v", what, last)
		}
	}
}

func TestWatch(t *testing.T) {
	t.Parallel()
	s := kvtest.Faulty(openDir(t))
	seen := fleets(t, s)
	until(t, seen, "an empty store", func(f *Fleet) bool { return len(f.Units) == 0 && f.Mirror == nil })
	store(t, s, put(kv.DesiredKey(app), release("app", "1").String()), put(kv.MirrorKey, deployments.MirrorState{Head: "abc"}))
	until(t, seen, "a record", func(f *Fleet) bool { return len(f.Units) == 1 && f.Mirror != nil && f.Mirror.Head == "abc" })
	store(t, s, says("web-1", map[string]deployments.UnitReport{"app": runs("app", "1")}))
	until(t, seen, "a converged node", func(f *Fleet) bool { return f.Units[0].Converged == 1 })
	soon := deployments.Pin{Release: release("app", "2"), Until: time.Now().Add(2 * time.Second).Truncate(time.Second)}
	if err := Pin(t.Context(), s, app, "web-1", soon); err != nil {
		t.Fatal(err)
	}
	until(t, seen, "a pin of the node", func(f *Fleet) bool { return f.Units[0].Converged == 0 && len(f.Units[0].Pins) == 1 })
	until(t, seen, "the end of the pin, by the clock alone", func(f *Fleet) bool { return f.Units[0].Converged == 1 && len(f.Units[0].Pins) == 1 })
	s.SetDown(kv.ErrUnavailable)
	until(t, seen, "an outage that changes nothing", func(f *Fleet) bool { return f.Units[0].Converged == 1 && len(f.Errors) > 0 })
	s.SetDown(nil)
	until(t, seen, "the end of the outage", func(f *Fleet) bool { return len(f.Errors) == 0 })
}

// A node that makes up units is shown with a few of them, and named.
func TestAssembleBoundsUnitsWithoutARecord(t *testing.T) {
	t.Parallel()
	made := map[string]deployments.UnitReport{}
	for i := range deployments.MaxRoleUnits {
		made[fmt.Sprintf("u%02d", i)] = deployments.UnitReport{State: deployments.StateConverged}
	}
	f := Assemble([]kv.Entry{recordOf("1", 3), says("evil-1", made), says("web-1", map[string]deployments.UnitReport{"app": {}})}, noon)
	if n := len(f.Units); n != 1+maxReportOnly {
		t.Errorf("%d units are shown", n)
	}
	text := f.Errors["status/prod/web/*"]
	if !strings.Contains(text, "80 more units") || !strings.Contains(text, "evil-1") {
		t.Errorf("%v", f.Errors)
	}
}

// Pins and orders by the ten thousand, which an operator's token can write, leave the table as long as people read, and
// cost no more than their number.
func TestAssembleBoundsPinsAndOrders(t *testing.T) {
	t.Parallel()
	const junk = 5000
	broken := deployments.UnitID{Stage: "prod", Role: "web", Unit: "broken"}
	entries := []kv.Entry{
		put(kv.DesiredKey(app), deployments.Record{Target: release("app", "1"), Generation: 1}),
		says("web-1", map[string]deployments.UnitReport{"app": runs("app", "1")}),
		{Key: kv.NodePinKey(app, "web-1"), Value: []byte("hold")},
		{Key: kv.DesiredKey(broken), Value: []byte("nonsense")},
	}
	for i := range junk {
		add := func(key, value string) {
			entries = append(entries, kv.Entry{Key: fmt.Sprintf(key, i), Value: []byte(value + fmt.Sprintf(" # %d", i))})
		}
		add("pins/prod/web/junk-%d", "{release: hold}")
		add("pins/prod/web/odd-%d", "nonsense")
		add("pins/prod/web/app/a-%d", "{release: hold}")
		add("pins/prod/web/app/b-%d", "nonsense")
		add("control/prod/web/junk-%d", "nonsense")
		add("control/prod/web/app/%d", "nonsense")
	}
	f := Assemble(entries, noon)
	if len(f.Units) > 2+maxReportOnly {
		t.Errorf("%d units", len(f.Units))
	}
	if text := f.Errors["pins/prod/web/*"]; !strings.Contains(text, fmt.Sprint(2*junk-maxReportOnly)) {
		t.Errorf("of the pins that pin nothing is said %q", text)
	}
	if step, blocks := storeStep(f, app); blocks {
		t.Errorf("junk is explained as a store that can't be read: %+v", step)
	}
	var out bytes.Buffer
	if err := WriteTable(&out, f, TableOptions{}); err != nil {
		t.Fatal(err)
	}
	text := out.String()
	if n := strings.Count(text, "\n"); n > 200 || len(text) > 100<<10 {
		t.Errorf("the table has %d lines, %d bytes", n, len(text))
	}
	for _, want := range []string{
		"web-1 pinned", "broken", fmt.Sprintf("and %d more", junk+1-maxNodes), " more keys: kedge status --json lists all",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("the table does not say %q:\n%.4000s", want, text)
		}
	}
}

// An assembled unit has the versions of its releases in an index: a scan of all nodes for each node took 40 s of a
// table of 50,000.
func TestVersionsAreIndexed(t *testing.T) {
	t.Parallel()
	var entries []kv.Entry
	for i, version := range []string{"", "1.0", "other", "2.0"} {
		e := put(fmt.Sprintf("status/prod/web/n-%d", i), fmt.Sprintf(
			`{"node":"x","units":{"app":{"state":"failed","running":"s3://a/9/b@sha256:%064x","version":%q}}}`, i/3, version))
		e.Session = "alive"
		entries = append(entries, e)
	}
	u := unitOf(t, Assemble(append(entries, put(kv.DesiredKey(app), release("app", "1").String())), noon), "prod/web/app")
	if len(u.versions) != 2 {
		t.Errorf("the index is %v", u.versions)
	}
	byHand := &Unit{Nodes: u.Nodes}
	for i, want := range []string{"1.0", "1.0", "1.0", "2.0"} {
		p := u.Nodes[i].Report.Running
		if got, scanned := u.version(p), byHand.version(p); got != want || scanned != want {
			t.Errorf("%v is %q, and without the index %q; want %q", p, got, scanned, want)
		}
	}
}
