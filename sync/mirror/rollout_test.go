package mirror

import (
	"cmp"
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"

	"kedge/deployments"
	"kedge/kv"
	"kedge/policy"
	"kedge/sync/fleet/message"
	"kedge/sync/git/gittest"
	"kedge/sync/trace"
	"kedge/sync/trace/tracetest"
)

// herd is a simulated fleet: each agent does what policy.Resolve returns, and reports it.
type herd struct {
	t     *testing.T
	m     *running
	id    deployments.UnitID
	nodes map[string]kv.Presence
	runs  map[string]deployments.Pointer
}

// newHerd makes a fleet of n nodes, all of which run the first release.
func newHerd(t *testing.T, m *running, n int) *herd {
	t.Helper()
	h := &herd{
		t:     t,
		m:     m,
		id:    unitID(t, "prod/web/app"),
		nodes: map[string]kv.Presence{},
		runs:  map[string]deployments.Pointer{},
	}
	for i := range n {
		name := fmt.Sprint("web-", i)
		h.nodes[name] = newPresence(t, m.store, name)
	}
	h.until(deployments.Digest{}, n, func(r deployments.Record) bool { return r.Rollout == nil && len(h.runs) == n })
	return h
}

// turn moves each node to the release that the record gives it, and returns who moved. Nodes go back from a release
// that fails.
func (h *herd) turn(fails deployments.Digest) (moved []string) {
	h.t.Helper()
	r := h.m.record(h.id.String(), func(deployments.Record) bool { return true })
	for name, presence := range h.nodes {
		d := policy.Resolve(
			policy.ResolveInputs{
				Unit:    h.id,
				Node:    name,
				Record:  policy.Value[deployments.Record]{Present: true, Value: r},
				Running: h.runs[name],
				Joined:  1,
				AtDest:  policy.FoundNothing,
			},
		)
		u := deployments.UnitReport{State: deployments.StateConverged, Want: d.Target, Generation: r.Generation}
		switch {
		case d.Target == h.runs[name]:
		case d.Target.Digest == fails:
			u.State, u.Quarantined, u.Error = deployments.StateQuarantined, []deployments.Digest{fails}, "health check failed"
		default:
			h.runs[name] = d.Target
			moved = append(moved, name)
		}
		u.Running = h.runs[name]
		value, err := json.Marshal(deployments.Report{Node: name, Units: map[string]deployments.UnitReport{h.id.Unit: u}})
		if err != nil {
			h.t.Fatal(err)
		}
		if err := presence.Put(h.t.Context(), kv.StatusKey(h.id.Stage, h.id.Role, name), value); err != nil {
			h.t.Fatal(err)
		}
	}
	slices.Sort(moved)
	return moved
}

// until calls turn until the record satisfies ok, and fails if more than most nodes move in one turn.
func (h *herd) until(
	fails deployments.Digest,
	most int,
	ok func(deployments.Record) bool,
) (rec deployments.Record, moved []string) {
	h.t.Helper()
	h.m.await("the rollout", func() error {
		now := h.turn(fails)
		if len(now) > most {
			h.t.Fatalf("%v go at once, at most %d may", now, most)
		}
		moved = append(moved, now...)
		rec = h.m.record(h.id.String(), func(deployments.Record) bool { return true })
		if !ok(rec) {
			return fmt.Errorf("it is %+v, %+v", rec, cmp.Or(rec.Rollout, &deployments.Progress{}))
		}
		return nil
	})
	return rec, moved
}

const gradual = "rollout:\n  canary: 1\n  bake: 200ms\n  max_unavailable: 2\n"

func TestRollout(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	collector := tracetest.New(t)
	m := start(t, Config{Store: dirStore(t), Repo: o.Bare, Trace: collector.Sender(t)})
	m.at(o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1") + gradual}))
	h := newHerd(t, m, 6)

	head := o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2") + gradual})
	r := m.runs("prod/web/app", "app/2")
	if r.Rollout == nil || r.Rollout.Phase != deployments.PhaseCanary || r.Stable != pointer("app/1") {
		t.Fatalf("%+v", r)
	}
	if moved := h.turn(deployments.Digest{}); len(moved) != 1 {
		t.Fatalf("%v are canaries, want one", moved)
	}
	r, _ = h.until(deployments.Digest{}, 2, func(r deployments.Record) bool { return r.Rollout == nil })
	if r.Stable != pointer("app/2") || r.Generation != 2 {
		t.Errorf("%+v", r)
	}
	for name, p := range h.runs {
		if p != pointer("app/2") {
			t.Errorf("%s runs %v", name, p)
		}
	}
	push := trace.Of(h.id, head, deployments.Digest{})
	id := fmt.Sprintf("%x", push.Trace)
	of := func(all []tracetest.Span, name string) (spans []tracetest.Span) {
		return slices.DeleteFunc(tracetest.Named(all, name), func(s tracetest.Span) bool { return s.Trace != id })
	}
	spans := collector.Await(t, func(all []tracetest.Span) bool { return len(of(all, "rollout")) > 0 })
	roots, rollouts := of(spans, "push"), of(spans, "rollout")
	if len(roots) != 1 || roots[0].ID != fmt.Sprintf("%x", push.Span) || roots[0].Parent != "" ||
		roots[0].Attributes["kedge.commit"] != head {
		t.Errorf("the push has the root spans %+v", roots)
	}
	if len(rollouts) != 1 || rollouts[0].Parent != roots[0].ID || rollouts[0].Err != "" ||
		!rollouts[0].End.After(rollouts[0].Start) {
		t.Errorf("its rollouts are %+v", rollouts)
	}
}

// A unit pin, its end, and the return to an earlier stable release keep the budget, and wait for no canary.
func TestPinsAndReturnsKeepTheBudgetWithoutGates(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	m := start(t, Config{Store: dirStore(t), Repo: o.Bare})
	file := func(release string) map[string]string {
		return map[string]string{"prod/web/app.yaml": unitFile(release) + gradual}
	}
	m.at(o.Push(file("app/1")))
	h := newHerd(t, m, 6)
	done := func(release string) func(deployments.Record) bool {
		return func(r deployments.Record) bool {
			return r.Rollout == nil && r.Target == pointer(release) && len(h.runs) == 6
		}
	}
	ungated := func(release string) func(deployments.Record) bool {
		return func(r deployments.Record) bool {
			if r.Rollout != nil && r.Rollout.Phase == deployments.PhaseCanary {
				t.Fatalf("canaries go first: %+v", r.Rollout)
			}
			return done(release)(r)
		}
	}
	o.Push(file("app/2"))
	h.until(deployments.Digest{}, 2, done("app/2"))

	put(t, m.store, "pins/prod/web/app", `{"release": "`+pointer("app/0").String()+`", "by": "ada", "reason": "2 leaks"}`)
	m.runs("prod/web/app", "app/0")
	h.until(deployments.Digest{}, 2, ungated("app/0"))
	if err := m.store.Commit(t.Context(), nil, kv.Delete("pins/prod/web/app")); err != nil {
		t.Fatal(err)
	}
	m.runs("prod/web/app", "app/2")
	h.until(deployments.Digest{}, 2, ungated("app/2"))

	o.Push(file("app/1"))
	m.runs("prod/web/app", "app/1")
	r, _ := h.until(deployments.Digest{}, 2, ungated("app/1"))

	var notes []string
	entries, err := m.store.List(t.Context(), "history/prod/web/app/")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		past, err := deployments.ParseHistory(e.Value)
		if err != nil {
			t.Fatal(err)
		}
		if past.Note != "" {
			notes = append(notes, past.Note)
		}
	}
	if want := []string{"pinned by ada: 2 leaks", "the pin ended"}; !slices.Equal(notes, want) {
		t.Errorf("of %d generations the history says %q, want %q", r.Generation, notes, want)
	}
}

func TestFailureRollsBack(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	store := dirStore(t)
	m := start(t, Config{Store: store, Repo: o.Bare})
	m.at(o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1") + gradual}))
	h := newHerd(t, m, 4)

	o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2") + gradual})
	m.runs("prod/web/app", "app/2")
	bad := pointer("app/2").Digest
	halted := func(r deployments.Record) bool {
		return r.Rollout != nil && r.Rollout.Phase == deployments.PhaseRolledBack
	}
	r, moved := h.until(bad, 0, halted)
	if len(moved) != 0 || r.Rollout.Failed != bad || !strings.Contains(r.Rollout.Message, "health check failed") {
		t.Errorf("%v moved, %+v", moved, r.Rollout)
	}

	// The release stays out, also for another mirror.
	m.stop()
	h.m = start(t, Config{Store: store, Repo: o.Bare})
	head := o.Push(map[string]string{"README.md": "x"})
	h.m.at(head)
	h.m.record("prod/web/app", halted)

	// The next release is not affected.
	o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/3") + gradual})
	h.m.runs("prod/web/app", "app/3")
	h.until(bad, 2, func(r deployments.Record) bool { return r.Rollout == nil && r.Stable == pointer("app/3") })
}

// A unit that is removed, and restored by a revert, continues where it was: what was rolled back stays out, and
// what was under way keeps its budget. So does a unit whose record is lost while no mirror runs.
func TestRolloutsOutliveTheirRecords(t *testing.T) {
	t.Parallel()
	for name, lose := range map[string]func(o *gittest.Origin, h *herd){
		"removed and put back": func(o *gittest.Origin, h *herd) {
			removed := o.Push(map[string]string{"prod/web/app.yaml": ""})
			h.m.at(removed)
			o.Git(o.Work, "revert", "--no-edit", removed)
			h.m.at(o.Push(nil))
		},
		"lost": func(_ *gittest.Origin, h *herd) {
			h.m.stop()
			if err := h.m.store.Commit(t.Context(), nil, kv.Delete(kv.DesiredKey(h.id))); err != nil {
				t.Error(err)
			}
			h.m = start(h.t, h.m.c)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o := gittest.New(t)
			m := start(t, Config{Store: dirStore(t), Repo: o.Bare})
			m.at(
				o.Push(
					map[string]string{
						"prod/web/app.yaml":  unitFile("app/1") + gradual,
						"kedge.yaml":         "prune: true\nmax_removed: 50\n",
						"prod/web/base.yaml": unitFile("base/1"),
					},
				),
			)
			h := newHerd(t, m, 6)

			bad := pointer("app/2").Digest
			halted := func(r deployments.Record) bool {
				return r.Rollout != nil && r.Rollout.Phase == deployments.PhaseRolledBack
			}
			o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2") + gradual})
			h.m.runs("prod/web/app", "app/2")
			h.until(bad, 0, halted)
			lose(o, h)
			if r, moved := h.until(
				bad,
				0,
				halted,
			); len(moved) > 0 || r.Rollout.Failed != bad || r.Stable != pointer("app/1") ||
				!strings.Contains(r.Rollout.Message, "health check failed") {
				t.Errorf("%v moved, %+v, %+v", moved, r, r.Rollout)
			}

			o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/3") + gradual})
			h.m.runs("prod/web/app", "app/3")
			h.turn(bad)
			lose(o, h)
			h.until(bad, 2, func(r deployments.Record) bool { return r.Rollout == nil && r.Stable == pointer("app/3") })
		})
	}
}

// A unit is removed from Git, or renamed, while its rollout is under way: without prune its record stays, and says
// why nothing moves.
func TestRolloutOfAUnitThatIsRemoved(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	m := start(t, Config{Store: dirStore(t), Repo: o.Bare})
	m.at(o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1") + gradual, "kedge.yaml": "max_removed: 100\n"}))
	h := newHerd(t, m, 6)
	o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2") + gradual})
	m.runs("prod/web/app", "app/2")
	put(t, m.store, "control/prod/web/app", "pause")
	was := m.record(
		"prod/web/app",
		func(r deployments.Record) bool { return r.Rollout != nil && r.Rollout.Phase == deployments.PhasePaused },
	)

	m.at(o.Push(map[string]string{"prod/web/app.yaml": "", "prod/web/other.yaml": unitFile("app/2")}))
	r := m.record("prod/web/app", func(r deployments.Record) bool { return policy.IsOrphaned(r) })
	if next := message.RolloutHint(
		h.id,
		r,
	); !strings.Contains(next, "put prod/web/app.yaml back") ||
		!policy.IsOrphaned(r) {
		t.Errorf("%q, and it is orphaned: %v", next, policy.IsOrphaned(r))
	}
	m.at(o.Push(map[string]string{"README.md": "x"}))

	m.at(o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2") + gradual}))
	m.record("prod/web/app", func(r deployments.Record) bool { return reflect.DeepEqual(r, was) })
	put(t, m.store, "control/prod/web/app", "resume")
	h.until(deployments.Digest{}, 2, func(r deployments.Record) bool { return r.Rollout == nil })
}

// KV shows which freeze windows there are, also after a mirror takes over the state of an earlier version.
func TestTellsFreezeWindows(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	store := dirStore(t)
	head := o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1"),
		"kedge.yaml": "freeze: [{deny: 0 16 * * FRI, duration: 64h, zone: Europe/Berlin}]\n"})
	put(t, store, kv.MirrorKey, `{"holder":"before","head":"`+head+`","rules":{"max_removed":30}}`)
	m := start(t, Config{Store: store, Repo: o.Bare})
	s := m.status(func(s deployments.MirrorState) bool { return len(s.Freeze) > 0 })
	want := []deployments.FreezeWindow{{Deny: "0 16 * * FRI", Duration: "64h0m0s", Zone: "Europe/Berlin",
		Running: "finish"}}
	if s.Head != head || !reflect.DeepEqual(s.Freeze, want) {
		t.Errorf("%+v", s)
	}
	last := o.Push(map[string]string{"kedge.yaml": "prune: false\n"})
	if s := m.at(last); len(s.Freeze) > 0 {
		t.Errorf("%+v of a commit that has none", s.Freeze)
	}
}

func TestFreezeHolds(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	m := start(t, Config{Store: dirStore(t), Repo: o.Bare})
	m.at(o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")}))
	frozen := "freeze:\n- name: always\n  deny: \"0 * * * *\"\n  duration: 2h\n  reason: audit\n"
	m.at(o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2"), "kedge.yaml": frozen}))
	r := m.runs("prod/web/app", "app/2")
	if p := r.Rollout; p == nil || p.Phase != deployments.PhaseFrozen || p.Cutoff != 0 ||
		!strings.Contains(p.Message, "frozen by always") ||
		!strings.Contains(p.Message, "audit") {
		t.Fatalf("%+v, %+v", r, r.Rollout)
	}
	put(t, m.store, "control/prod/web/app", "promote")
	m.record("prod/web/app", func(r deployments.Record) bool { return r.Rollout == nil && r.Target == pointer("app/2") })

	m.at(o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/3")}))
	m.record("prod/web/app", func(r deployments.Record) bool { return r.Rollout != nil && r.Target == pointer("app/3") })
	o.Push(map[string]string{"kedge.yaml": "prune: false\n"})
	m.record("prod/web/app", func(r deployments.Record) bool { return r.Rollout == nil && r.Target == pointer("app/3") })
}

// A pin that doesn't parse keeps nodes where they are. The record of a new unit is written all the same, and parses.
func TestInvalidPinOfANewUnit(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	store := dirStore(t)
	put(t, store, "pins/prod/web/app", "hodl")
	put(t, store, "pins/prod/web/base", "hodl")
	m := start(t, Config{Store: store, Repo: o.Bare})
	m.at(
		o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1") + gradual, "prod/web/base.yaml": unitFile("base/1")}),
	)
	m.runs("prod/web/app", "app/1")
	m.runs("prod/web/base", "base/1")
}

// A push within a freeze leaves a rollback that is under way alone. The record never says that the new release was
// rolled back, and that release starts when the freeze ends.
func TestFreezeLeavesRollbackAlone(t *testing.T) {
	t.Parallel()
	const slow = "rollout:\n  max_unavailable: 1\n"
	o := gittest.New(t)
	m := start(t, Config{Store: dirStore(t), Repo: o.Bare})
	m.at(o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1") + slow}))
	h := newHerd(t, m, 6)
	o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2") + slow})
	m.runs("prod/web/app", "app/2")
	two := func() (n int) {
		for _, p := range h.runs {
			if p == pointer("app/2") {
				n++
			}
		}
		return n
	}
	h.until(deployments.Digest{}, 1, func(deployments.Record) bool { return two() >= 3 })
	bad := pointer("app/2").Digest
	h.until(bad, 1, func(r deployments.Record) bool { return r.Rollout.Phase == deployments.PhaseRollingBack })

	frozen := "freeze:\n- name: always\n  deny: \"0 * * * *\"\n  duration: 2h\n"
	m.at(o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/3") + slow, "kedge.yaml": frozen}))
	r := m.record("prod/web/app", func(deployments.Record) bool { return true })
	if p := r.Rollout; r.Target != pointer("app/2") || p.Phase != deployments.PhaseRollingBack ||
		p.Next != pointer("app/3") || !strings.Contains(p.Message, "health check failed") || two() == 0 {
		t.Fatalf("%d nodes run what failed, by %+v, %+v", two(), r, p)
	}
	r, _ = h.until(bad, 1, func(r deployments.Record) bool {
		if r.Target == pointer("app/2") && r.Rollout.Phase == deployments.PhaseRolledBack {
			t.Errorf("who waits for the last commit is told that it was rolled back: %+v", r)
		}
		return r.Target == pointer("app/3")
	})
	if r.Rollout.Phase != deployments.PhaseFrozen || r.Stable != pointer("app/1") || two() > 0 {
		t.Fatalf("%d nodes run what failed, by %+v, %+v", two(), r, r.Rollout)
	}
	m.at(o.Push(map[string]string{"kedge.yaml": "prune: false\n"}))
	h.until(bad, 1, func(r deployments.Record) bool { return r.Rollout == nil && r.Stable == pointer("app/3") })
}
