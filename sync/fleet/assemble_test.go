package fleet

import (
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
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
}

// Of a role with more nodes than its units can list, nodes are left out, whose token may have invented the others. It
// is said, and such a unit never counts as converged.
func TestMoreNodesThanAreListed(t *testing.T) {
	t.Parallel()
	const units, most, nodes = 10, 100, 120
	record := reportsOf(t, 0)[0].Value
	var entries []kv.Entry
	for i := range units {
		id := deployments.UnitID{Stage: "prod", Role: "web", Unit: fmt.Sprintf("u%02d", i)}
		entries = append(entries, kv.Entry{Key: kv.DesiredKey(id), Version: 1, Value: record})
	}
	for i := range nodes {
		junk := kv.Entry{Key: kv.StatusKey("prod", "web", fmt.Sprintf("a%03d", i)), Version: 2, Session: "s",
			Value: []byte(`{}`)}
		if i%10 == 0 {
			junk.Value = []byte(`{`)
		}
		entries = append(entries, junk)
	}
	last := reportsOf(t, 1)[1]
	last.Value = []byte(strings.Replace(string(last.Value), `"app"`, `"u00"`, 1))
	entries = append(entries, last)
	m := &assembler{maxListed: units * most}
	f := m.assemble(entries, time.Unix(1e9, 0))
	listed := 0
	for _, u := range f.Units {
		listed += len(u.Nodes)
		if u.Live != nodes+1 || lacking(&u, time.Unix(1e9, 0)) == "" {
			t.Fatalf("%s has %d live nodes, want %d", u.ID, u.Live, nodes+1)
		}
	}
	if listed != units*most {
		t.Errorf("%d nodes are listed", listed)
	}
	if name := f.Units[0].Nodes[len(f.Units[0].Nodes)-1].Name; name != "node-00000" {
		t.Errorf("the last node is %s", name)
	}
	if said := f.Errors["status/prod/web/*"]; !strings.Contains(said, "21 of 121 nodes aren't listed") {
		t.Errorf("it is said: %q", said)
	}
	u := &Unit{Live: 2, Converged: 1, Nodes: []Node{{Name: "web-1", Converged: true}}}
	if said := lacking(u, time.Now()); !strings.Contains(said, "aren't listed") {
		t.Errorf("a unit whose listed nodes have converged is finished: %q", said)
	}
}

// Reports that were not read are told once for their role, and their nodes count as live and not converged.
func TestReportsThatAreNotRead(t *testing.T) {
	t.Parallel()
	var names []string
	for i := range deployments.MaxRoleUnits {
		names = append(names, fmt.Sprintf(`"u%d":{"drift":[%s""]}`, i, strings.Repeat(`"",`, 99)))
	}
	value := []byte(`{"units":{` + strings.Join(names, ",") + `}}`)
	entries := reportsOf(t, 1)
	for i := range 100 {
		entries = append(entries,
			kv.Entry{Key: kv.StatusKey("prod", "web", fmt.Sprintf("a%d", i)), Version: 2, Session: "s", Value: value})
	}
	f := Assemble(entries, time.Unix(1e9, 0))
	u := unitOf(t, f, "prod/web/app")
	if u.Live != 101 || u.Converged != 1 {
		t.Errorf("%d of %d converged", u.Converged, u.Live)
	}
	if said := f.Errors["status/prod/web/*"]; strings.Count(said, "not read") != 1 || len(f.Errors) != 1 {
		t.Errorf("it is said: %v", f.Errors)
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
