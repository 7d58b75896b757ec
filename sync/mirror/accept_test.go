package mirror

import (
	"context"
	"encoding/json"
	"errors"
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

// While the histories can't be compared, --accept takes nothing: the commit may be an old one of the branch.
func TestAcceptWaitsForTheHistory(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	first := o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	second := o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2")})
	l, _ := led(t, o)
	l.acceptor.override = first
	git := l.branch.readBranch(t.Context(), gitState{})
	if git.head != second {
		t.Fatalf("the head is %s", git.head)
	}
	c := l.acceptor.candidate(git.good, nil)
	c.from, c.to.Hash = second, first
	if accepted, err := l.acceptor.accepts(t.Context(), c); accepted || err != nil {
		t.Errorf("an old commit: %v, %v", accepted, err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if accepted, err := l.acceptor.accepts(ended, c); accepted || !errors.Is(err, context.Canceled) {
		t.Errorf("before the history is read: %v, %v", accepted, err)
	}
	c.from = strings.Repeat("1", 40)
	if accepted, err := l.acceptor.accepts(t.Context(), c); !accepted || err != nil {
		t.Errorf("where the store's commit is unknown: %v, %v", accepted, err)
	}
}

// A rollback that the release which Git names waits for goes on without a signed commit, too.
func TestRecordedKeepsWhatWaits(t *testing.T) {
	t.Parallel()
	two, three := pointer("app/2"), pointer("app/3")
	for phase, want := range map[deployments.Phase]bool{
		deployments.PhaseRollingBack: true, deployments.PhaseFrozen: false,
	} {
		r := deployments.Record{Target: two, Generation: 2, Rollout: &deployments.Progress{Phase: phase, Next: three}}
		if got := concerns(r, three); got != want {
			t.Errorf("%s: %t", phase, got)
		}
		r.Rollout.Next = deployments.Pointer{}
		if concerns(r, three) {
			t.Errorf("%s: a record that doesn't name the release", phase)
		}
	}
}
