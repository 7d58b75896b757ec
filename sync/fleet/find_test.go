package fleet

import (
	"strings"
	"testing"

	"kedge/deployments"
	"kedge/kv"
)

// A version that several releases had is named once, in the order of the releases.
func TestUnknownVersionNamesEachKnownOnce(t *testing.T) {
	t.Parallel()
	s := openDir(t)
	again := release("app", "1.4")
	again.Digest = deployments.Digest{1}
	store(t, s, put(kv.DesiredKey(app), deployments.Record{Target: release("app", "1.4"), Stable: release("app", "1.4"),
		Generation: 3}), past("1.3", 2, ""),
		put(kv.HistoryKey(app, 1), deployments.History{Generation: 1, Release: again}))
	_, err := FindRelease(t.Context(), s, app, "1.5")
	if err == nil || !strings.Contains(err.Error(), "there are 1.4, 1.3;") {
		t.Errorf("an unknown version: %v", err)
	}
}

// A unit that a node has in several roles is named once.
func TestUnknownUnitNamesEachKnownOnce(t *testing.T) {
	t.Parallel()
	f := &Fleet{}
	for _, id := range []deployments.UnitID{{Stage: "prod", Role: "cron", Unit: "base"}, {Stage: "prod", Role: "web",
		Unit: "app"}, {Stage: "prod", Role: "web", Unit: "base"}} {
		f.Units = append(f.Units, Unit{ID: id, Nodes: []Node{{Name: "web-1"}}})
	}
	_, err := FindUnitOfNode(f, "web-1", "ap")
	if err == nil || !strings.HasSuffix(err.Error(), "there are base, app") {
		t.Errorf("an unknown unit: %v", err)
	}
}
