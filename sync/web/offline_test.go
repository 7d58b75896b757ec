package web

import (
	"cmp"
	"slices"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/kv"
	"kedge/kv/open"
)

// offline is a dashboard of a scene, with a store that holds its histories.
func offline(t *testing.T, s scene) *Web {
	t.Helper()
	return offlineWith(t, s, emptyStore(t))
}

func emptyStore(t testing.TB) kv.Store {
	t.Helper()
	store, err := open.Store(open.Config{URL: "file://" + t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	return store
}

// offlineWith is offline with a store that several scenes share.
func offlineWith(t *testing.T, s scene, store kv.Store) *Web {
	t.Helper()
	w := &Web{
		c:       Config{Store: store, CommitURL: "https://git.example.org/acme/deployments/commit/{commit}"},
		viewers: make(chan struct{}, maxViewers), changed: make(chan struct{}),
		histories:     map[deployments.UnitID]*unitHistory{},
		latestChanges: &changeCache{known: map[deployments.UnitID]change{}},
		trend:         &trends{units: map[deployments.UnitID][]sample{}},
	}
	for _, e := range s.entries {
		if key, err := kv.ParseKey(e.Key); err == nil && key.Kind == kv.HistoryPrefix {
			h, err := deployments.ParseHistory(e.Value)
			if err != nil {
				t.Fatal(err)
			}
			if newest := changeOf(h); newest.generation > w.latestChanges.known[key.UnitID()].generation {
				w.latestChanges.known[key.UnitID()] = newest
			}
			p := w.histories[key.UnitID()]
			if p == nil {
				p = &unitHistory{expires: time.Now().Add(24 * time.Hour)}
				w.histories[key.UnitID()] = p
			}
			p.generation = max(p.generation, h.Generation)
			p.entries = append(p.entries, h)
			slices.SortFunc(p.entries, func(a, b deployments.History) int { return cmp.Compare(b.Generation, a.Generation) })
		}
	}
	for _, f := range s.before {
		w.show(f)
	}
	w.show(s.assemble())
	return w
}
