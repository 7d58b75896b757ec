package mirror

import (
	"encoding/json"
	"strings"
	"testing"

	"kedge/deployments"
	"kedge/kv"
	"kedge/sync/git/gittest"
)

// --accept takes a repository that was replaced, with another history, once: a later force push to that commit is
// not taken.
func TestRepositoryThatWasReplaced(t *testing.T) {
	t.Parallel()
	store := dirStore(t)
	old := gittest.New(t)
	m := start(t, Config{Store: store, Repo: old.Bare})
	before := old.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1"), "prod/web/base.yaml": unitFile("base/1")})
	m.at(before)
	m.stop()

	o := gittest.New(t)
	first := o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2")}) // without half of the units
	m = start(t, Config{Store: store, Repo: o.Bare})
	m.refuses(first, "does not descend", "mirrored last, from "+old.Bare, "--prefix", "--accept "+first)
	m.stop()
	c := Config{Store: store, Repo: o.Bare, Accept: first}
	m = start(t, c)
	m.at(first)
	rec := m.runs("prod/web/app", "app/2")
	entry, err := store.Get(t.Context(), kv.HistoryKey(unitID(t, "prod/web/app"), rec.Generation))
	if err != nil {
		t.Fatal(err)
	}
	var h deployments.History
	if err := json.Unmarshal(entry.Value, &h); err != nil || !strings.Contains(h.Note, "--accept") {
		t.Errorf("the history is %s, %v", entry.Value, err)
	}
	next := o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/3")})
	m.at(next)
	m.stop()

	o.Git(o.Work, "push", "-q", "-f", "origin", first+":refs/heads/main")
	m = start(t, c) // the flag was forgotten
	m.refuses(first, "does not descend")
	m.runs("prod/web/app", "app/3")

	for _, wrong := range []string{"main", first[:12]} {
		if _, err := New(Config{Store: store, Repo: o.Bare, Accept: wrong}); err == nil ||
			!strings.Contains(err.Error(), "full hash") {
			t.Errorf("accept %s: %v", wrong, err)
		}
	}
}
