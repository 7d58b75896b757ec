package mirror

import (
	"fmt"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/policy"
)

// Each write of a record wakes all nodes of its role. The nodes of a large fleet get ready one by one, and with one
// write for each, the number of wake-ups would be the square of the number of nodes.
func TestWritesOfALargeRollout(t *testing.T) {
	t.Parallel()
	const size, tick = 1000, 10 * time.Millisecond
	id := unitID(t, "prod/web/app")
	u := unit(t, id.String(), "2")
	u.Rollout = &deployments.Rollout{MaxUnavailable: deployments.Amount{N: 10, Percent: true}}
	nodes := make([]reported, size)
	ranks := make([]uint64, size)
	done := make([]time.Time, size) // when a node that was admitted has converged
	for i := range nodes {
		ranks[i] = policy.Rank(fmt.Sprintf("web-%d", i), u.Release.Digest)
		nodes[i] = reported{node: fmt.Sprintf("web-%d", i), report: deployments.Report{Units: map[string]deployments.UnitReport{
			"app": {State: deployments.StateConverged, Running: pointer("1"), Want: pointer("1"), Generation: 1}}}}
	}
	was := deployments.Record{Target: pointer("1"), Generation: 1, Commit: "old"}
	f := inputs{commit: commitOf(tree(u)), now: time.Unix(1e9, 0), own: map[deployments.UnitID]writtenRecord{}, ranks: map[deployments.UnitID]*policy.Ranks{},
		cells: map[deployments.UnitID]cell{id: {present: true, version: 1, value: encode(was), record: was}},
		fleet: map[deployments.RoleID][]reported{{Stage: "prod", Role: "web"}: nodes}}
	began, writes, again := f.now, 0, f.now
	for record := was; record.Rollout != nil || record.Target != u.Release; f.now = f.now.Add(tick) {
		news := !f.now.Before(again)
		inflight := 0
		for i := range nodes {
			switch {
			case done[i].IsZero() && record.Rollout != nil && ranks[i] <= record.Rollout.Cutoff:
				done[i] = f.now.Add(4*time.Second + time.Duration(i*7919%4000)*time.Millisecond)
			case !done[i].IsZero() && done[i].After(f.now):
				inflight++
			case !done[i].IsZero() && nodes[i].report.Units["app"].Running != record.Target:
				nodes[i].report.Units["app"] = deployments.UnitReport{State: deployments.StateConverged, Running: record.Target, Want: record.Target, Generation: record.Generation}
				news = true
			}
		}
		if inflight > size/10 {
			t.Fatalf("%d nodes in flight", inflight)
		}
		if !news {
			continue
		}
		p := reconcile(f)
		at := p.again
		for _, w := range p.changes {
			writes++
			record = w.after
			f.cells[id] = cell{present: true, version: w.base + 1, value: w.value, record: w.after}
			f.own[id] = writtenRecord{record: w.after, value: w.value, base: w.base, version: w.base + 1, at: f.now}
			at = f.now // a write shows in the watch
		}
		if again = at; at.IsZero() {
			again = f.now.Add(time.Hour)
		}
		if f.now.Sub(began) > 10*time.Minute {
			t.Fatalf("no end: %+v", record.Rollout)
		}
	}
	took := f.now.Sub(began)
	t.Logf("%d writes in %v", writes, took)
	if most := int(took/pace(size)) + 20; writes > most {
		t.Errorf("%d writes in %v, want at most %d", writes, took, most)
	}
}
