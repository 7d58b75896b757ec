package mirror

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/kv"
	"kedge/policy"
	"kedge/sync/git"
)

// BenchmarkRound measures what one report of a node costs the mirror, if no write follows.
func BenchmarkRound(b *testing.B) {
	for _, size := range []struct{ roles, nodes, units int }{{1, 1000, 5}, {1, 10_000, 5}, {1, 10_000, 20}, {100, 100, 20}, {100, 1, 200}} {
		b.Run(fmt.Sprintf("%d roles of %d nodes and %d units", size.roles, size.nodes, size.units), func(b *testing.B) {
			b.ReportAllocs()
			tree := &deployments.Tree{}
			fleet := kv.View{Synced: true}
			cells := map[deployments.UnitID]cell{}
			now := time.Now()
			for r := range size.roles {
				report := deployments.Report{Units: map[string]deployments.UnitReport{}}
				for u := range size.units {
					id := deployments.UnitID{Stage: "prod", Role: fmt.Sprintf("r%03d", r), Unit: fmt.Sprintf("u%02d", u)}
					tree.Units = append(tree.Units, deployments.Unit{ID: id, Release: pointer("a/1"), Rollout: &deployments.Rollout{MaxUnavailable: deployments.Amount{N: 10, Percent: true}}})
					rec := deployments.Record{Target: pointer("a/1"), Generation: 1, Commit: "c"}
					cells[id] = cell{present: true, version: 1, record: rec, value: encode(rec)}
					report.Units[id.Unit] = deployments.UnitReport{State: deployments.StateConverged, Running: pointer("a/1"), Want: pointer("a/1"), Generation: 1}
				}
				value, err := json.Marshal(report)
				if err != nil {
					b.Fatal(err)
				}
				for n := range size.nodes {
					fleet.Entries = append(fleet.Entries, kv.Entry{Key: kv.StatusKey("prod", fmt.Sprintf("r%03d", r), fmt.Sprintf("n%05d", n)), Value: value, Version: 1, Session: "s"})
				}
			}
			l := newLeader(&Mirror{c: Config{Log: slog.New(slog.DiscardHandler)}}, nil)
			commit := &git.Commit{Hash: "c", Tree: tree}
			version := uint64(1)
			l.ranks = map[deployments.UnitID]*policy.Ranks{}
			round := func() {
				version++
				fleet.Entries[0].Version = version
				l.observer.fleet(fleet)
				writes := reconcile(inputs{commit: commit, now: now, cells: cells, own: l.writer.records,
					fleet: l.observer.latest().fleet.roles, ranks: l.ranks}).changes
				if len(writes) > 0 {
					b.Fatal(writes[0].reason)
				}
			}
			round() // which parses all reports
			for b.Loop() {
				round()
			}
		})
	}
}
