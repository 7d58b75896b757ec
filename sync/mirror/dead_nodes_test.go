package mirror

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/kv"
	"kedge/sync/git/gittest"
)

func TestForgettable(t *testing.T) {
	t.Parallel()
	start := time.Date(2026, 11, 28, 3, 0, 0, 0, time.UTC)
	web1 := kv.Entry{Key: "status/prod/web/web-1", Version: 7}
	back, anew := web1, web1
	back.Session, back.Version = "s", 8
	anew.Version = 9
	absent := map[string]absence{}
	busy := map[deployments.RoleID]bool{{Stage: "prod", Role: "web"}: true}
	for _, step := range []struct {
		name    string
		at      time.Duration
		entries []kv.Entry
		busy    map[deployments.RoleID]bool
		forget  bool
		next    time.Duration // 0: never
	}{
		{"it died", 0, []kv.Entry{web1}, nil, false, 72 * time.Hour},
		{"it is looked at again", time.Hour, []kv.Entry{web1}, nil, false, 72 * time.Hour},
		{"it is back", 2 * time.Hour, []kv.Entry{back}, nil, false, 0},
		{"it died once more", 3 * time.Hour, []kv.Entry{anew}, nil, false, 75 * time.Hour},
		{"it was there in between, as nobody saw", 4 * time.Hour, []kv.Entry{{Key: web1.Key, Version: 11}}, nil, false, 76 * time.Hour},
		{"a rollout is under way", 77 * time.Hour, []kv.Entry{{Key: web1.Key, Version: 11}}, busy, false, 0},
		{"one of another role is", 77 * time.Hour, []kv.Entry{{Key: web1.Key, Version: 11}}, map[deployments.RoleID]bool{{Stage: "prod", Role: "db"}: true}, true, 0},
		{"somebody removed it", 78 * time.Hour, nil, nil, false, 0},
		{"what is no node's stays", 200 * time.Hour, []kv.Entry{{Key: "status/prod/web/a/b", Version: 1}, {Key: "status/prod", Version: 1}}, nil, false, 0},
	} {
		now := start.Add(step.at)
		ops, next := forgettable(step.entries, absent, step.busy, now, 72*time.Hour)
		if step.next == 0 != next.IsZero() || step.next > 0 && !next.Equal(start.Add(step.next)) {
			t.Errorf("%s: next at %v, want %v from the start", step.name, next, step.next)
		}
		if len(ops) > 0 != step.forget || step.forget && (ops[0].Kind != kv.OpDeleteIf || ops[0].Key != web1.Key || ops[0].Version != 11) {
			t.Errorf("%s: %+v", step.name, ops)
		}
	}
	if len(absent) != 0 {
		t.Errorf("it keeps %v", absent)
	}

	var many []kv.Entry
	for i := range 100 {
		many = append(many, kv.Entry{Key: fmt.Sprintf("status/prod/web/web-%d", i), Version: 1})
	}
	forgettable(many, absent, nil, start, time.Hour)
	later := start.Add(time.Hour)
	if ops, next := forgettable(many, absent, nil, later, time.Hour); len(ops) != 30 || !next.Equal(later) {
		t.Errorf("of a hundred, %d at once, and then at %v", len(ops), next)
	}
}

func TestUnderWay(t *testing.T) {
	t.Parallel()
	for phase, want := range map[deployments.Phase]bool{"": false, deployments.PhaseRolledBack: false, deployments.PhaseRolling: true, deployments.PhaseRollingBack: true, deployments.PhasePaused: true} {
		c := cell{present: true}
		if phase != "" {
			c.record.Rollout = &deployments.Progress{Phase: phase}
		}
		id := unitID(t, "prod/web/app")
		if got := underWay(map[deployments.UnitID]cell{id: c})[id.RoleID()]; got != want {
			t.Errorf("in phase %q: %v", phase, got)
		}
	}
}

// keeping is a store in which this process may not remove reports.
type keeping struct {
	kv.Store
	refuse bool
}

func (k keeping) Commit(ctx context.Context, lease kv.Lease, ops ...kv.Op) error {
	if k.refuse && slices.ContainsFunc(ops, func(op kv.Op) bool { return strings.HasPrefix(op.Key, kv.StatusPrefix) }) {
		return fmt.Errorf("status: %w", kv.ErrDenied)
	}
	return k.Store.Commit(ctx, lease, ops...)
}

func TestNodesThatDiedAreForgotten(t *testing.T) {
	t.Parallel()
	for name, refuse := range map[string]bool{"": false, "by a mirror that may not": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o, store := gittest.New(t), dirStore(t)
			o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
			live := newPresence(t, store, "web-1")
			if err := live.Put(t.Context(), "status/prod/web/web-1", []byte(`{"node":"web-1"}`)); err != nil {
				t.Fatal(err)
			}
			if err := store.Commit(t.Context(), nil, kv.Put("status/prod/web/web-2", []byte(`{"node":"web-2"}`)), kv.Put("status/prod/web/web-3", nil)); err != nil {
				t.Fatal(err)
			}
			m := start(t, Config{Store: keeping{store, refuse}, Repo: o.Bare}, func(m *Mirror) { m.forgetAfter = time.Millisecond })
			m.runs("prod/web/app", "app/1")
			if refuse {
				m.logs("may not remove them")
			}
			left := 1
			if refuse {
				left = 3
			}
			m.await("who is left", func() error {
				entries, err := store.List(t.Context(), kv.StatusPrefix)
				if err == nil && (len(entries) != left || entries[0].Session == "") {
					err = fmt.Errorf("they are %v", entries)
				}
				return err
			})
			o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2")})
			m.runs("prod/web/app", "app/2")
			if n := strings.Count(m.log.String(), "may not remove them"); refuse && n != 1 {
				t.Errorf("it was said %d times", n)
			}
		})
	}
}
