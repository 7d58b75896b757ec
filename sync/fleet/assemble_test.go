package fleet

import (
	"encoding/json"
	"fmt"
	"reflect"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/kv"
)

// reportsOf makes the entries of a fleet whose nodes run one unit.
func reportsOf(tb testing.TB, nodes int) []kv.Entry {
	tb.Helper()
	id := deployments.UnitID{Stage: "prod", Role: "web", Unit: "app"}
	p, err := deployments.ParsePointer(fmt.Sprintf("s3://acme/app/1/manifest.yaml@sha256:%064x", 1))
	if err != nil {
		tb.Fatal(err)
	}
	encode := func(v any) []byte {
		data, err := json.Marshal(v)
		if err != nil {
			tb.Fatal(err)
		}
		return data
	}
	entries := []kv.Entry{
		{Key: kv.DesiredKey(id), Version: 1, Value: encode(deployments.Record{Target: p, Generation: 7})},
	}
	for i := range nodes {
		report := deployments.Report{Node: fmt.Sprintf("node-%05d", i), Agent: "1", Ready: true,
			Units: map[string]deployments.UnitReport{"app": {State: deployments.StateConverged, Running: p, Want: p,
				Generation: 7, Since: time.Unix(1e9, 0).UTC()}}}
		entries = append(entries, kv.Entry{Key: kv.StatusKey("prod", "web", report.Node), Version: 2, Session: "s",
			Value: encode(report)})
	}
	return entries
}

// What was parsed before is never told in the place of what is there now.
func TestAssemblerFollows(t *testing.T) {
	t.Parallel()
	all := reportsOf(t, 4)
	now := time.Unix(1e9, 0)
	changed := func(i int, value string, session string) kv.Entry {
		e := all[i]
		e.Value, e.Session = []byte(value), session
		return e
	}
	m := new(assembler)
	for what, entries := range [][]kv.Entry{
		all, all,
		{all[0], all[1], changed(2, "broken", "s"), all[3], all[4]},
		{all[0], all[1], all[3], all[4]}, // a node left
		all,
		// A restored store gives out the same version again.
		{all[0], all[1], changed(2, `{"units":{"app":{"state":"fetching"}}}`, "s"), changed(3, string(all[3].Value), ""), all[4]},
		all[:1],
	} {
		if got, want := m.assemble(entries, now), Assemble(entries, now); !reflect.DeepEqual(got, want) {
			t.Errorf("step %d: %+v, want %+v", what, got, want)
		}
	}
	if len(m.reports) > 0 {
		t.Errorf("%d reports of nodes that left are kept", len(m.reports))
	}
}

// BenchmarkAssemble is what one changed report of a large fleet costs whoever shows it.
func BenchmarkAssemble(b *testing.B) {
	entries := reportsOf(b, 10_000)
	m := new(assembler)
	m.assemble(entries, time.Now())
	for b.Loop() {
		m.assemble(entries, time.Now())
	}
}
