package mirror

import (
	"math"
	"reflect"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"kedge/deployments"
	"kedge/kv"
	"kedge/policy"
	"kedge/sync/git"
)

func unit(tb testing.TB, id, release string) deployments.Unit {
	return deployments.Unit{ID: unitID(tb, id), Release: pointer(release)}
}

func tree(units ...deployments.Unit) *deployments.Tree {
	return &deployments.Tree{Settings: deployments.Settings{MaxRemoved: 30}, Units: units}
}

func commitOf(t *deployments.Tree) *git.Commit {
	return &git.Commit{Hash: strings.Repeat("c", 40), Author: "Ada <ada@example.com>", Tree: t}
}

func TestPlan(t *testing.T) {
	t.Parallel()
	const id = "prod/web/app"
	was := deployments.Record{Target: pointer("1"), Stable: pointer("0"), Generation: 4, Commit: "old"}
	back := deployments.Record{Target: pointer("1"), Stable: pointer("2"), Generation: 5, Commit: "old",
		Rollout: &deployments.Progress{Phase: deployments.PhaseRollingBack, Failed: pointer("2").Digest}}
	rolling := unit(t, id, "2")
	rolling.Rollout = &deployments.Rollout{Canary: deployments.Amount{N: 1}, MaxUnavailable: deployments.Amount{N: 10, Percent: true}}
	gated := unit(t, id, "1")
	gated.Rollout = rolling.Rollout
	paced := was
	paced.Paced = true
	after := unit(t, id, "1")
	after.After = []string{"base"}
	for _, c := range []struct {
		name  string
		units []deployments.Unit
		prune bool
		now   map[string]deployments.Record
		kind  string // empty: no change
		want  deployments.Record
	}{
		{"a first release", []deployments.Unit{unit(t, id, "1")}, false, nil,
			"create", deployments.Record{Target: pointer("1"), Generation: 1, Commit: "new"}},
		{"the same release", []deployments.Unit{unit(t, id, "1")}, false, map[string]deployments.Record{id: was}, "", was},
		{"another release", []deployments.Unit{unit(t, id, "2")}, false, map[string]deployments.Record{id: was},
			"update", deployments.Record{Target: pointer("2"), Stable: pointer("1"), Generation: 5, Commit: "new"}},
		{"other fields of the file begin no generation", []deployments.Unit{after}, false, map[string]deployments.Record{id: was},
			"update", deployments.Record{Target: pointer("1"), Stable: pointer("0"), Generation: 4, Commit: "old", After: []string{"base"}}},
		{"another release, by a rollout", []deployments.Unit{rolling}, false, map[string]deployments.Record{id: was},
			"update", deployments.Record{Target: pointer("2"), Stable: pointer("1"), Generation: 5, Commit: "new", Paced: true,
				Rollout: &deployments.Progress{Phase: deployments.PhaseCanary}}},
		{"a rollout alone", []deployments.Unit{gated}, false, map[string]deployments.Record{id: was}, "update", paced},
		{"the same release and rollout", []deployments.Unit{gated}, false, map[string]deployments.Record{id: paced},
			"", paced},
		{"a rollout that is taken out", []deployments.Unit{unit(t, id, "1")}, false, map[string]deployments.Record{id: paced},
			"update", was},
		{"a bare pointer becomes a record", []deployments.Unit{unit(t, id, "1")}, false, map[string]deployments.Record{id: {Target: pointer("1")}},
			"update", deployments.Record{Target: pointer("1"), Stable: pointer("1"), Generation: 1, Commit: "new"}},
		{"what was rolled back stays out", []deployments.Unit{unit(t, id, "2")}, false, map[string]deployments.Record{id: back}, "", back},
		{"a removed unit's record stays", nil, false, map[string]deployments.Record{id: was}, "keep", was},
		{"a removed unit's record goes with prune", nil, true, map[string]deployments.Record{id: was}, "remove", deployments.Record{}},
		{"prune leaves what people wrote", nil, true, map[string]deployments.Record{id: {Target: pointer("1")}}, "keep", deployments.Record{Target: pointer("1")}},
	} {
		t.Run(c.name, func(t *testing.T) {
			in := tree(c.units...)
			in.Settings.Prune = c.prune
			now := map[deployments.UnitID]deployments.Record{}
			for name, r := range c.now {
				now[unitID(t, name)] = r
			}
			changes := Plan(in, "new", now, time.Date(2026, 11, 20, 12, 0, 0, 0, time.UTC))
			if c.kind == "" {
				if len(changes) != 0 {
					t.Fatalf("changes %+v", changes)
				}
				return
			}
			if len(changes) != 1 || changes[0].Kind != c.kind || changes[0].Unit != unitID(t, id) {
				t.Fatalf("changes %+v, want one, %s", changes, c.kind)
			}
			if c.kind != "remove" && string(encode(*changes[0].After)) != string(encode(c.want)) {
				t.Errorf("after %s\nwant  %s", encode(*changes[0].After), encode(c.want))
			}
		})
	}
}

func TestRefuse(t *testing.T) {
	t.Parallel()
	units := func(names ...string) (ids []deployments.UnitID, us []deployments.Unit) {
		for _, n := range names {
			us = append(us, unit(t, "prod/web/"+n, "1"))
			ids = append(ids, unitID(t, "prod/web/"+n))
		}
		return ids, us
	}
	ten, _ := units("a", "b", "c", "d", "e", "f", "g", "h", "i", "j")
	_, seven := units("a", "b", "c", "d", "e", "f", "g")
	_, six := units("a", "b", "c", "d", "e", "f")
	normal := deployments.MirrorRules{MaxRemoved: 30}
	for _, c := range []struct {
		name string
		candidate
		units []deployments.Unit
		keep  bool   // prune is off
		want  string // empty: taken
	}{
		{"the first commit", candidate{rules: normal}, seven, false, ""},
		{"the next commit", candidate{from: "f0", rules: normal, descends: true, had: ten}, seven, false, ""},
		{"a rewritten history", candidate{from: "f0", rules: normal, had: ten}, seven, false, "does not descend from f0"},
		{"a rewritten history, allowed", candidate{from: "f0", rules: deployments.MirrorRules{AllowRewind: true, MaxRemoved: 30}, had: ten}, seven, false, ""},
		{"too many removed", candidate{from: "f0", rules: normal, descends: true, had: ten}, six, false, "removes 4 of 10 units (prod/web/g, prod/web/h, prod/web/i, prod/web/j), more than max_removed, which is 30 %"},
		{"too many removed, by the first commit over old records", candidate{rules: normal, had: ten}, six, false, "removes 4 of 10"},
		{"none may be removed", candidate{from: "f0", rules: deployments.MirrorRules{MaxRemoved: 0}, descends: true, had: ten}, seven, false, "removes 3 of 10"},
		{"all removed", candidate{from: "f0", rules: deployments.MirrorRules{MaxRemoved: 99}, descends: true, had: ten}, nil, false, "has no unit at all"},
		{"all removed, allowed", candidate{from: "f0", rules: deployments.MirrorRules{MaxRemoved: 100}, descends: true, had: ten}, nil, false, ""},
		{"nothing was there", candidate{rules: normal}, nil, false, ""},
		{"a unit moved counts as removed", candidate{from: "f0", rules: normal, descends: true, had: ten[:2]}, []deployments.Unit{unit(t, "dev/web/a", "1")}, false, "removes 2 of 2"},
		{"one of one", candidate{from: "f0", rules: normal, descends: true, had: ten[:1]}, []deployments.Unit{unit(t, "dev/web/a", "1")}, false, ""},
		{"one of two", candidate{from: "f0", rules: normal, descends: true, had: ten[:2]}, six[:1], false, ""},
		{"nothing goes as prune is off", candidate{from: "f0", rules: normal, descends: true, had: ten}, nil, true, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.to = commitOf(tree(c.units...))
			c.to.Tree.Settings.Prune = !c.keep
			err := refuse(c.candidate)
			switch {
			case c.want == "" && err != nil:
				t.Errorf("refused: %v", err)
			case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
				t.Errorf("error %v, want one with %q", err, c.want)
			}
		})
	}
}

// A stage that becomes a submodule removes no record, however few units it has.
func TestRefuseASubmoduleOverUnits(t *testing.T) {
	t.Parallel()
	c := candidate{from: "f0", rules: deployments.MirrorRules{MaxRemoved: 100}, descends: true,
		to: commitOf(tree(unit(t, "dev/web/app", "1"))), had: []deployments.UnitID{unitID(t, "dev/web/app")}}
	c.to.Tree.Settings.Prune, c.to.Tree.Submodules = true, []string{"prod"}
	if err := refuse(c); err != nil {
		t.Errorf("a submodule that had no units: %v", err)
	}
	c.had = append(c.had, unitID(t, "prod/web/app"))
	if err := refuse(c); err == nil || !strings.Contains(err.Error(), "prod is a submodule") ||
		!strings.Contains(err.Error(), "so prod/web/app would be removed") {
		t.Errorf("a submodule in place of a unit: %v", err)
	}
	c.to.Tree.Settings.Prune = false
	if err := refuse(c); err != nil {
		t.Errorf("without prune: %v", err)
	}
}

func TestReconcile(t *testing.T) {
	t.Parallel()
	id := unitID(t, "prod/web/app")
	now := time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)
	good := deployments.Record{Target: pointer("1"), Generation: 3, Commit: "old"}
	shown := func(r deployments.Record, version uint64) cell {
		return cell{present: true, version: version, value: encode(r), record: r}
	}
	mine := func(r deployments.Record, over, version uint64, ago time.Duration) *writtenRecord {
		return &writtenRecord{record: r, value: encode(r), base: over, version: version, at: now.Add(-ago)}
	}
	byHand := deployments.Record{Target: pointer("9"), Generation: 7}
	for _, c := range []struct {
		name       string
		cell       cell
		own        *writtenRecord
		past       deployments.History
		acted      int64 // a node says that it has acted on that generation
		git        string
		generation int64 // 0: nothing is written
		stable     string
		ops        string
		wait       bool
	}{
		{name: "nothing there", git: "1", generation: 1, ops: "create put"},
		{name: "all in order", cell: shown(good, 5), git: "1"},
		{name: "all in order, written by this mirror", cell: shown(good, 5), own: mine(good, 4, 5, time.Hour), git: "1"},
		{name: "restored from a snapshot, and a node knows of a later one", cell: shown(good, 5), acted: 9, git: "1", generation: 10, ops: "replace put"},
		{name: "gone with the history, and a node knows of it", acted: 9, git: "1", generation: 10, ops: "create put"},
		{name: "a node that makes an absurd generation up", cell: shown(good, 5), acted: policy.AbsurdGeneration, git: "1"},
		{name: "a new release", cell: shown(good, 5), git: "2", generation: 4, stable: "1", ops: "replace put"},
		{name: "a write that has yet to show", cell: shown(good, 5), own: mine(deployments.Record{Target: pointer("2"), Generation: 4}, 5, 0, time.Second), git: "2"},
		{name: "a newer release, while a write has yet to show", cell: shown(good, 5), own: mine(deployments.Record{Target: pointer("2"), Generation: 4}, 5, 0, time.Second), git: "3", wait: true},
		{name: "a first write that has yet to show", own: mine(good, 0, 0, time.Second), git: "1"},
		{name: "a write that never showed", cell: shown(good, 5), own: mine(deployments.Record{Target: pointer("2"), Stable: pointer("1"), Generation: 4}, 5, 0, time.Minute), git: "2",
			generation: 4, stable: "1", ops: "replace"},
		{name: "changed by hand", cell: shown(byHand, 8), own: mine(good, 4, 5, time.Hour), git: "1", generation: 8, ops: "replace put"},
		{name: "changed by hand to a bare pointer", cell: shown(deployments.Record{Target: pointer("9")}, 8), own: mine(good, 4, 5, time.Hour), git: "1", generation: 3, ops: "replace"},
		{name: "changed by hand to nonsense", cell: cell{present: true, version: 8, value: []byte("x"), err: kv.ErrNotFound}, own: mine(good, 4, 5, time.Hour), git: "1", generation: 3, ops: "replace"},
		{name: "removed by hand", own: mine(good, 4, 5, time.Hour), git: "1", generation: 3, ops: "create"},
		{name: "changed by hand, to an absurd generation", cell: shown(deployments.Record{Target: pointer("9"), Generation: 1 << 60}, 8), own: mine(good, 4, 5, time.Hour), git: "1",
			generation: 3, ops: "replace"},
		{name: "nonsense, and nothing known", cell: cell{present: true, version: 8, value: []byte("x"), err: kv.ErrNotFound}, git: "1", generation: 1, ops: "replace put"},
		{name: "a bare pointer, and nothing known", cell: shown(deployments.Record{Target: pointer("9")}, 8), git: "1", generation: 1, stable: "9", ops: "replace put"},
		{name: "an absurd generation, and nothing known", cell: shown(deployments.Record{Target: pointer("9"), Generation: math.MaxInt64, Commit: "x"}, 8),
			past: deployments.History{Generation: 7}, git: "1", generation: 8, stable: "9", ops: "replace put"},
		{name: "a bare pointer over an old record", cell: shown(deployments.Record{Target: pointer("9")}, 8), past: deployments.History{Generation: 60, Release: pointer("1")}, git: "1",
			generation: 61, stable: "9", ops: "replace put delete"},
		{name: "removed while no mirror ran", past: deployments.History{Generation: 6, Release: pointer("1"), Stable: pointer("0"), Commit: "old"}, git: "1", generation: 6, stable: "0", ops: "create"},
		{name: "removed while no mirror ran, and a new release", past: deployments.History{Generation: 6, Release: pointer("1"), Commit: "old"}, git: "2", generation: 7, stable: "1", ops: "create put"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := inputs{commit: commitOf(tree(unit(t, id.String(), c.git))), now: now,
				cells: map[deployments.UnitID]cell{}, own: map[deployments.UnitID]writtenRecord{}, history: map[deployments.UnitID]deployments.History{}}
			if c.cell.present {
				f.cells[id] = c.cell
			}
			if c.own != nil {
				f.own[id] = *c.own
			}
			if c.past.Generation > 0 {
				f.history[id] = c.past
			}
			if c.acted > 0 {
				report := deployments.Report{Units: map[string]deployments.UnitReport{id.Unit: {Generation: c.acted}}}
				f.fleet = map[deployments.RoleID][]reported{id.RoleID(): {{node: "n1", report: report}}}
			}
			p := reconcile(f)
			writes, all := p.changes, p.whole
			if all == c.wait {
				t.Errorf("all is %v", all)
			}
			if c.generation == 0 {
				if len(writes) != 0 {
					t.Fatalf("writes %+v", writes)
				}
				return
			}
			if len(writes) != 1 {
				t.Fatalf("%d writes, want one", len(writes))
			}
			w := writes[0]
			if w.after.Target != pointer(c.git) || w.after.Generation != c.generation {
				t.Errorf("record %s, want release %s, generation %d", w.value, c.git, c.generation)
			}
			if want := c.stable; want != "" && w.after.Stable != pointer(want) || want == "" && !w.after.Stable.IsZero() {
				t.Errorf("stable %q, want %q", w.after.Stable, want)
			}
			var kinds []string
			for _, op := range w.ops {
				kinds = append(kinds, map[kv.OpKind]string{kv.OpPut: "put", kv.OpCreate: "create", kv.OpReplace: "replace", kv.OpDelete: "delete"}[op.Kind])
			}
			if got := strings.Join(kinds, " "); got != c.ops {
				t.Errorf("operations %s, want %s", got, c.ops)
			}
			if op := w.ops[0]; op.Kind == kv.OpReplace && op.Version != c.cell.version {
				t.Errorf("replaces version %d, want %d", op.Version, c.cell.version)
			}
		})
	}
}

// All that is known of a node is part of the decision about each of its role's units.
func TestInputsOfNodes(t *testing.T) {
	t.Parallel()
	id := unitID(t, "prod/web/app")
	started := time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)
	said := deployments.UnitReport{State: deployments.StateConverged, Running: pointer("1"), Generation: 3}
	f := inputs{fleet: map[deployments.RoleID][]reported{
		{Stage: "prod", Role: "web"}: {{node: "n1", gone: true, report: deployments.Report{Started: started, Units: map[string]deployments.UnitReport{"app": said}}}, {node: "n2"}},
		{Stage: "prod", Role: "db"}:  {{node: "n3"}},
	}}
	want := []policy.Node{{Name: "n1", Gone: true, Started: started, Report: said}, {Name: "n2"}}
	if got := f.nodes(id); !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, want %+v", got, want)
	}
}

// Whatever the store shows, reconcile returns what Git asks for; once the store shows that, it returns nothing.
func TestReconcileEnds(t *testing.T) {
	t.Parallel()
	ids := []deployments.UnitID{unitID(t, "prod/web/a"), unitID(t, "prod/web/b"), unitID(t, "prod/db/a")}
	now := time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)
	rapid.Check(t, func(rt *rapid.T) {
		release := func(label string) deployments.Pointer {
			return pointer(string(rune('0' + rapid.IntRange(0, 3).Draw(rt, label))))
		}
		record := func() deployments.Record {
			return deployments.Record{Target: release("target"), Generation: int64(rapid.IntRange(0, 4).Draw(rt, "generation")), Commit: "old"}
		}
		f := inputs{now: now, cells: map[deployments.UnitID]cell{}, own: map[deployments.UnitID]writtenRecord{}, history: map[deployments.UnitID]deployments.History{}}
		var units []deployments.Unit
		for i, id := range ids {
			if rapid.Bool().Draw(rt, "in git") {
				units = append(units, deployments.Unit{ID: id, Release: release("git")})
			}
			switch rapid.IntRange(0, 2).Draw(rt, "in the store") {
			case 1:
				r := record()
				f.cells[id] = cell{present: true, version: uint64(i + 1), value: encode(r), record: r}
			case 2:
				f.cells[id] = cell{present: true, version: uint64(i + 1), value: []byte("?"), err: kv.ErrNotFound}
			}
			if rapid.Bool().Draw(rt, "owned") {
				r := record()
				r.Generation++
				f.own[id] = writtenRecord{record: r, value: encode(r), base: uint64(rapid.IntRange(0, 4).Draw(rt, "over")), at: now.Add(-time.Minute)}
			}
		}
		git := tree(units...)
		git.Settings.Prune = rapid.Bool().Draw(rt, "prune")
		f.commit = commitOf(git)
		writes := reconcile(f).changes
		for _, w := range writes {
			before := f.cells[w.unit]
			if w.value == nil {
				delete(f.cells, w.unit)
				f.own[w.unit] = writtenRecord{base: w.base, at: now}
				continue
			}
			if before.err == nil && w.after.Generation < before.record.Generation {
				rt.Fatalf("the generation of %s goes from %d to %d", w.unit, before.record.Generation, w.after.Generation)
			}
			f.cells[w.unit] = cell{present: true, version: w.base + 100, value: w.value, record: w.after}
			f.own[w.unit] = writtenRecord{record: w.after, value: w.value, base: w.base, at: now}
		}
		for _, u := range units {
			if got := f.cells[u.ID].record.Target; got != u.Release {
				rt.Fatalf("%s is %v, Git says %v", u.ID, got, u.Release)
			}
		}
		if p := reconcile(f); len(p.changes) != 0 || !p.whole {
			rt.Fatalf("there is something left to do: %+v", p.changes)
		}
	})
}

// A mirror that has just read the fleet gives nodes time to report before it moves them.
func TestRecordsWaitForReports(t *testing.T) {
	t.Parallel()
	now := time.Now()
	paced, plain := unit(t, "prod/web/app", "1"), unit(t, "prod/web/base", "1")
	paced.Rollout = &deployments.Rollout{MaxUnavailable: deployments.Amount{N: 1}, Deadline: time.Minute}
	in := inputs{commit: commitOf(tree(paced, plain)), now: now, fleetSince: now, rebuildWait: 5 * time.Second,
		cells: map[deployments.UnitID]cell{}, own: map[deployments.UnitID]writtenRecord{}}
	p := reconcile(in)
	if len(p.changes) != 1 || p.changes[0].unit != plain.ID || p.waitingForReports != 1 || p.whole ||
		p.again.Sub(now).Round(time.Second) != in.rebuildWait {
		t.Errorf("at first it writes %+v, %d units wait, until %v", p.changes, p.waitingForReports, p.again)
	}
	in.now = now.Add(in.rebuildWait)
	if p := reconcile(in); len(p.changes) != 2 || p.waitingForReports != 0 || !p.whole {
		t.Errorf("then it writes %+v, %d units wait", p.changes, p.waitingForReports)
	}
}

func TestBatches(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		var writes []change
		total := 0
		for range rapid.IntRange(0, 100).Draw(rt, "writes") {
			w := change{kind: "update"}
			for range rapid.IntRange(1, 3).Draw(rt, "operations") {
				w.ops = append(w.ops, kv.Put("k", make([]byte, rapid.SampledFrom([]int{100, 900, 20000}).Draw(rt, "size"))))
			}
			if rapid.Bool().Draw(rt, "a key goes") {
				w.ops = append(w.ops, kv.DeleteIf("k", 1))
			}
			total += len(w.ops)
			writes = append(writes, w)
		}
		next := 0
		for _, batch := range batches(writes) {
			ops, cost, size := 0, 0, 0
			for _, w := range batch {
				if &w.ops[0] != &writes[next].ops[0] {
					rt.Fatal("the order was changed")
				}
				next++
				ops += len(w.ops)
				for _, op := range w.ops {
					cost += op.Cost()
					size += len(op.Key) + len(op.Value)
				}
			}
			if ops == 0 || cost > kv.MaxOps || size > maxBatch {
				rt.Fatalf("a transaction of %d operations that cost %d, and %d bytes", ops, cost, size)
			}
			total -= ops
		}
		if total != 0 {
			rt.Fatalf("%d operations were left out", total)
		}
	})
}

func TestWorthWriting(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)
	fine := deployments.MirrorState{Head: "a"}
	away := deployments.MirrorState{Head: "a", Error: "dial 127.0.0.1:1: refused"}
	awayToo := deployments.MirrorState{Head: "a", Error: "dial 127.0.0.1:2: refused"}
	refused := deployments.MirrorState{Head: "a", Refused: "b", Error: "bad"}
	freeze := func() deployments.MirrorState {
		return deployments.MirrorState{Head: "a", Freeze: []deployments.FreezeWindow{{Deny: "0 0 * * *", Duration: "1h"}}}
	}
	for _, c := range []struct {
		was, next deployments.MirrorState
		ago       time.Duration
		want      bool
	}{
		{fine, freeze(), 0, true}, {freeze(), freeze(), time.Hour, false},
		{fine, fine, 0, false}, {fine, away, 0, true}, {away, fine, 0, true},
		{away, awayToo, time.Second, false}, {away, awayToo, time.Hour, true},
		{away, refused, time.Second, true}, {refused, fine, time.Second, true}, {away, deployments.MirrorState{Head: "b", Error: "x"}, time.Second, true},
	} {
		if got := worthWriting(c.was, c.next, now.Add(-c.ago), now); got != c.want {
			t.Errorf("from %+v to %+v after %v: %v", c.was, c.next, c.ago, got)
		}
	}
}

func TestClip(t *testing.T) {
	t.Parallel()
	for s, want := range map[string]string{
		"ééééé":          "ééééé",
		"xéééééé":        "xéééé...", // the tenth byte is half of a character
		"123456\nébcdef": "123456\n...",
		"12\n4567890123": "12\n4567890...",
	} {
		if got := clip(s, 10); got != want {
			t.Errorf("%q: %q, want %q", s, got, want)
		}
	}
}
