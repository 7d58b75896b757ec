package fleet

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/kv"
	"kedge/kv/open"
)

// noon is when the tests that look at no clock take place.
var noon = time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)

var app = deployments.UnitID{Stage: "prod", Role: "web", Unit: "app"}

// release is a release of a unit, by version.
func release(unit, version string) deployments.Pointer {
	return deployments.Pointer{
		URL:    fmt.Sprintf("s3://acme-releases/%s/%s/manifest.yaml", unit, version),
		Digest: sha256.Sum256([]byte(unit + version)),
	}
}

// put makes an entry of a value: text as it is, all else as JSON.
func put(key string, value any) kv.Entry {
	text, ok := value.(string)
	if !ok {
		data, err := json.Marshal(value)
		if err != nil {
			panic(err)
		}
		text = string(data)
	}
	return kv.Entry{Key: key, Value: []byte(text), Version: 1}
}

// says makes a live node's report in prod/web.
func says(node string, units map[string]deployments.UnitReport) kv.Entry {
	e := put(kv.StatusKey("prod", "web", node), deployments.Report{Node: node, Started: noon.Add(-time.Hour), Units: units})
	e.Session = "session-of-" + node
	return e
}

// lease is that of a mirror that runs.
func lease() kv.Entry {
	e := put(kv.MirrorLease, `{"holder":"mirror-1"}`)
	e.Session = "session-of-mirror-1"
	return e
}

func gone(e kv.Entry) kv.Entry {
	e.Session = ""
	return e
}

// runs is the report of a unit that runs what it wants.
func runs(unit, version string) deployments.UnitReport {
	p := release(unit, version)
	return deployments.UnitReport{State: deployments.StateConverged, Running: p, Version: version, Want: p, Generation: 2, Since: noon.Add(-2 * time.Hour)}
}

// busyFleet has one of everything.
func busyFleet() []kv.Entry {
	old, next := release("app", "1.4.1"), release("app", "1.4.2")
	fetching := runs("app", "1.4.1")
	fetching.State, fetching.Want, fetching.Fetched, fetching.Total, fetching.Since = deployments.StateFetching, next, 42, 100, noon.Add(-9*time.Second)
	failed := runs("app", "1.4.1")
	failed.State, failed.Want, failed.Quarantined, failed.Since = deployments.StateQuarantined, next, []deployments.Digest{next.Digest}, noon.Add(-3*time.Minute)
	failed.Error = "health: http http://127.0.0.1:8080/healthz: 503 Service Unavailable, 12 times in 30s; went back to 1.4.1"
	drifted := runs("base", "2026.11.1")
	drifted.Drift = []string{"etc/base.conf"}
	return []kv.Entry{
		put(kv.MirrorKey, deployments.MirrorState{
			Holder: "mirror-1", Head: "4f2c91ab77d0c0ffee00c0ffee00c0ffee00c0ff", Author: "Alice <alice@example.com>", At: noon.Add(-4 * time.Minute),
			Refused: "9d8e7f6a5b4c3d2e1f00c0ffee00c0ffee00c0ff", Error: "prod/web/app.yaml:2:1: unknown field \"relaese\"\nprod/web/base.yaml:1:10: the pointer is empty",
		}),
		lease(),
		put(kv.DesiredKey(app), deployments.Record{Target: next, Stable: old, Generation: 2, Commit: "4f2c91ab77d0c0ffee00c0ffee00c0ffee00c0ff"}),
		put("desired/prod/web/base", deployments.Record{Target: release("base", "2026.11.1"), Generation: 2, Commit: "4f2c91ab77d0c0ffee00c0ffee00c0ffee00c0ff"}),
		put("desired/prod/web/worker", "s3://acme-releases/worker"),
		put("desired/staging/web/app", next.String()+"\n"),
		put("pins/prod/web/app/web-4", old.String()),
		put("pins/prod/web/base", "{release: hold, by: alice, reason: incident 812, until: 2026-11-24T14:00:00Z}"),
		says("web-1", map[string]deployments.UnitReport{"app": runs("app", "1.4.2"), "base": held(runs("base", "2026.11.1"))}),
		says("web-2", map[string]deployments.UnitReport{"app": fetching, "base": held(drifted)}),
		says("web-3", map[string]deployments.UnitReport{"app": failed, "base": held(runs("base", "2026.11.1"))}),
		says("web-4", map[string]deployments.UnitReport{"app": runs("app", "1.4.1"), "base": held(runs("base", "2026.11.1"))}),
		gone(says("web-9", map[string]deployments.UnitReport{"app": runs("app", "1.4.1")})),
		past("1.4.1", 1, ""),
		put("history/prod/web/app/0000000002", "{"),
		put("control/staging/web/app", "Promote\n"),
	}
}

// expired makes a pin that was over years before tests run, at a time that they can name.
func expired(release string) string { return "{release: " + release + ", until: 2025-11-24T12:00:00Z}" }

func held(r deployments.UnitReport) deployments.UnitReport {
	r.State = deployments.StateHeld
	return r
}

func unitOf(t *testing.T, f *Fleet, id string) Unit {
	t.Helper()
	for _, u := range f.Units {
		if u.ID.String() == id {
			return u
		}
	}
	t.Fatalf("no unit %s in %+v", id, f.Units)
	return Unit{}
}

func openDir(t *testing.T) kv.Store {
	t.Helper()
	s, err := open.Store(open.Config{URL: "file://" + t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// store puts entries; those that a session holds are held by a presence of the test's.
func store(t *testing.T, s kv.Store, entries ...kv.Entry) {
	t.Helper()
	for _, e := range entries {
		if e.Session == "" {
			if err := s.Commit(t.Context(), nil, kv.Put(e.Key, e.Value)); err != nil {
				t.Fatal(err)
			}
			continue
		}
		p, err := s.Presence(t.Context(), e.Session)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { p.Close(context.Background()) })
		if err := p.Put(t.Context(), e.Key, e.Value); err != nil {
			t.Fatal(err)
		}
	}
}
