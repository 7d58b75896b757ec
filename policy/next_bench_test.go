package policy

import (
	"cmp"
	"fmt"
	"slices"
	"testing"

	"kedge/deployments"
)

// fleet is a rollout over that many nodes, half way, with half of the budget in flight.
func fleet(size int) Situation {
	s := step(0, deployments.PhaseRolling)
	s.Unit.Rollout.MaxUnavailable = deployments.Amount{N: 10, Percent: true}
	report := s.Nodes[0].Report
	s.Nodes = make([]Node, size)
	ranks := make([]uint64, size)
	for i := range s.Nodes {
		s.Nodes[i] = Node{Name: fmt.Sprintf("ip-10-1-%d-%d", i/250, i%250), Report: report}
		ranks[i] = Rank(s.Nodes[i].Name, s.Unit.Release.Digest)
	}
	slices.Sort(ranks)
	s.Record.Rollout.Cutoff = ranks[size/2]
	for i := range s.Nodes {
		if rank := Rank(s.Nodes[i].Name, s.Unit.Release.Digest); rank < ranks[size/2-size/20] {
			s.Nodes[i].Report.Running, s.Nodes[i].Report.Want = s.Unit.Release, s.Unit.Release
		}
	}
	slices.SortFunc(s.Nodes, func(a, b Node) int { return cmp.Compare(a.Name, b.Name) }) // as the mirror has them
	return s
}

func BenchmarkNext(b *testing.B) {
	for _, size := range []int{100, 1000, 10000} {
		s := fleet(size)
		b.Run(fmt.Sprint(size, "/cold"), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				Next(s)
			}
		})
		b.Run(fmt.Sprint(size, "/warm"), func(b *testing.B) {
			b.ReportAllocs()
			s.Ranks = new(Ranks)
			for b.Loop() {
				Next(s)
			}
		})
		b.Run(fmt.Sprint(size, "/join"), func(b *testing.B) {
			b.ReportAllocs()
			s.Ranks = new(Ranks)
			all := s.Nodes
			for i := 0; b.Loop(); i++ {
				s.Nodes = all[i%2:]
				Next(s)
			}
		})
	}
}

func BenchmarkResolve(b *testing.B) {
	s := fleet(100)
	f := ResolveInputs{Unit: app, Node: "ip-10-1-7-7", Now: noon, Record: good(s.Record), Running: release("v1")}
	b.ReportAllocs()
	for b.Loop() {
		Resolve(f)
	}
}
