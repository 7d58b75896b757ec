package mirror

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/kv"
	"kedge/kv/kvtest"
	"kedge/sync/git/gittest"
)

func TestMissingFolders(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 27, 3, 0, 0, 0, time.UTC)
	web := []deployments.RoleID{{Stage: "prod", Role: "web"}}
	all := func(at time.Time) map[string]time.Time {
		made := map[string]time.Time{}
		for _, kind := range roleFolders {
			made[kv.RolePrefix(kind, "prod", "web")] = at
			made[kind] = at
		}
		return made
	}
	whole := map[string]observedFolders{kv.PinsPrefix: {keys: []string{"pins/prod/web/"}}}
	for _, c := range []struct {
		name string
		seen map[string]observedFolders
		made map[string]time.Time
		want int
	}{
		{"a new role", nil, map[string]time.Time{}, 5},
		{"all there", whole, all(now.Add(-time.Hour)), 0},
		{"a store that can't lose them", map[string]observedFolders{kv.PinsPrefix: {}}, all(now.Add(-time.Hour)), 0},
		{"a role's is lost", map[string]observedFolders{kv.PinsPrefix: {keys: []string{}}}, all(now.Add(-time.Hour)), 5},
		{"it has yet to show", map[string]observedFolders{kv.PinsPrefix: {keys: []string{}}}, all(now), 0},
		{"a kind is lost", map[string]observedFolders{kv.DesiredPrefix: {kindMissing: true}}, all(now.Add(-time.Hour)), 11},
	} {
		if got, _ := missingFolders(web, c.seen, c.made, now); len(got) != c.want {
			t.Errorf("%s: %v, want %d keys", c.name, got, c.want)
		}
	}
}

// People delete folder keys with the obvious commands. Without them no write succeeds, and agents don't see a pin's
// end.
func TestFoldersThatAreDeletedComeBack(t *testing.T) {
	t.Parallel()
	consul := kvtest.StartConsul(t, kvtest.ConsulOptions{})
	store := consul.Open("")
	o := gittest.New(t)
	m := start(t, Config{Store: store, Repo: o.Bare})
	m.at(o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")}))
	for i, prefix := range []string{"desired/", "pins/prod/web/", "status/", "control/prod/", "pins/", ""} {
		consul.CLI("", "", "kv", "delete", "-recurse", "kedge/"+prefix)
		release := fmt.Sprintf("app/%d", i+2)
		head := o.Push(map[string]string{"prod/web/app.yaml": unitFile(release)})
		m.at(head)
		m.runs("prod/web/app", release)
		for _, key := range []string{"pins/prod/web/", "status/prod/web/", "control/prod/web/", "desired/prod/web/"} {
			m.await(key+" after the removal of "+prefix, func() error {
				_, err := store.List(t.Context(), key)
				return err
			})
		}
	}
}

// If another writer makes commits conflict again and again, mirror/state and the log say so.
func TestConflictsThatRepeatAreTold(t *testing.T) {
	t.Parallel()
	store := &recorder{Store: dirStore(t)}
	o := gittest.New(t)
	m := start(t, Config{Store: store, Repo: o.Bare})
	m.at(o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")}))
	store.setRefuse(func(ops []kv.Op) error {
		if slices.ContainsFunc(ops, func(op kv.Op) bool { return strings.HasPrefix(op.Key, kv.DesiredPrefix) }) {
			return fmt.Errorf("commit: %w", kv.ErrConflict)
		}
		return nil
	})
	head := o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2")})
	m.status(func(s deployments.MirrorState) bool {
		return strings.Contains(s.Error, "differ from what its watch shows")
	})
	store.setRefuse(nil)
	m.at(head)
}
