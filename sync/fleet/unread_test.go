package fleet

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/kv"
)

// overfill writes more below a role's pins than is read of them: values that no pin has.
func overfill(t *testing.T, s kv.Store, id deployments.UnitID) {
	t.Helper()
	const size = 360 << 10
	junk := bytes.Repeat([]byte("x"), size)
	for i := range kv.MaxRoleList/size + 1 {
		if err := s.Commit(t.Context(), nil, kv.Put(kv.NodePinKey(id, fmt.Sprintf("junk-%03d", i)), junk)); err != nil {
			t.Fatal(err)
		}
	}
}

// Whoever may write one role's pins must not take the view of the fleet from operators: what can be read is shown,
// with the prefix that can't, and nothing is said to be absent or converged that may stand there.
func TestPartOfAFleetThatHoldsTooMuch(t *testing.T) {
	t.Parallel()
	s := openDir(t)
	db := deployments.UnitID{Stage: "prod", Role: "db", Unit: "main"}
	store(t, s,
		put(kv.DesiredKey(app), deployments.Record{Target: release("app", "1"), Generation: 2}),
		put(kv.DesiredKey(db), deployments.Record{Target: release("db", "1"), Generation: 2}),
		put(kv.PinKey(app), release("app", "1").String()),
		put(kv.PinKey(db), "hold"),
		says("web-1", map[string]deployments.UnitReport{"app": runs("app", "1")}),
	)
	overfill(t, s, app)
	web := Filter{Stage: "prod", Role: "web"}
	const prefix = "pins/prod/web/"

	f, err := Read(t.Context(), s, web)
	if err != nil {
		t.Fatal(err)
	}
	if u := unitOf(t, f, app.String()); u.Record == nil || u.Live != 1 {
		t.Errorf("what can be read is not there: %+v", u)
	}
	if err := f.CheckComplete(); !errors.Is(err, ErrTooMuch) || !strings.Contains(err.Error(), prefix) {
		t.Errorf("unread: %v", err)
	}
	if !strings.Contains(f.Errors[prefix], "more than 32 MiB are stored below "+prefix) {
		t.Errorf("errors: %q", f.Errors)
	}
	var table bytes.Buffer
	if err := WriteTable(&table, f, TableOptions{}); err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(table.String(), prefix+" isn't read"); n != 1 {
		t.Errorf("the table names it %d times:\n%s", n, table.String())
	}
	d, err := Explain(f, app, "web-1")
	if err != nil || len(d.Trace) == 0 || !d.Trace[0].Blocks || !strings.Contains(d.Trace[0].Message, prefix) {
		t.Errorf("explain: %+v, %v", d.Trace, err)
	}

	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	err = Wait(ctx, s, web, WaitOptions{Progress: func(missing string) {
		if strings.Contains(missing, prefix) {
			cancel()
		}
	}})
	if !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), prefix) {
		t.Errorf("wait: %v", err)
	}
	if _, err := Rollback(t.Context(), s, app, RollbackOptions{}); !errors.Is(err, ErrTooMuch) {
		t.Errorf("rollback: %v", err)
	}
	nothing := deployments.UnitID{Stage: "prod", Role: "web", Unit: "nothing"}
	if _, err := Releases(t.Context(), s, nothing); !errors.Is(err, ErrTooMuch) {
		t.Errorf("releases of a unit that may stand there: %v", err)
	}
	if was, err := Unpin(t.Context(), s, nothing, ""); was || err != nil {
		t.Errorf("unpin of nothing: %t, %v", was, err)
	}
	if was, err := Unpin(t.Context(), s, app, ""); !was || err != nil {
		t.Errorf("unpin: %t, %v", was, err)
	}
	if _, err := s.Get(t.Context(), kv.PinKey(app)); !errors.Is(err, kv.ErrNotFound) {
		t.Errorf("the pin is still there: %v", err)
	}
}

// full is a store in which some prefixes hold more than is read.
type full struct {
	kv.Store
	prefixes []string
}

func (s full) List(ctx context.Context, prefix string) ([]kv.Entry, error) {
	for _, p := range s.prefixes {
		if p == prefix {
			return nil, fmt.Errorf("list %s: %w: %w: too much", prefix, kv.ErrUnavailable, kv.ErrTooLarge)
		}
	}
	return s.Store.List(ctx, prefix)
}

// A kind of keys that holds too much as a whole is read role by role.
func TestRolesOfAKindThatHoldsTooMuch(t *testing.T) {
	t.Parallel()
	s := openDir(t)
	db := deployments.UnitID{Stage: "prod", Role: "db", Unit: "main"}
	store(t, s,
		put(kv.DesiredKey(app), release("app", "1").String()),
		put(kv.DesiredKey(db), release("db", "1").String()),
		put(kv.PinKey(app), "hold"),
		put(kv.PinKey(db), "hold"),
		says("web-1", map[string]deployments.UnitReport{"app": runs("app", "1")}),
	)
	f, err := Read(t.Context(), full{s, []string{"pins/", "status/", "pins/prod/web/"}}, Filter{})
	if err != nil {
		t.Fatal(err)
	}
	if u := unitOf(t, f, db.String()); u.Pin == nil {
		t.Error("the pin of a role that can be read isn't there")
	}
	if u := unitOf(t, f, app.String()); u.Pin != nil || u.Live != 1 {
		t.Errorf("%+v", u)
	}
	if got := strings.Join(f.incomplete, " "); got != "pins/ pins/prod/web/ status/" {
		t.Errorf("unread: %s", got)
	}
	nothing := full{s, kinds}
	for _, kind := range kinds {
		nothing.prefixes = append(nothing.prefixes, kv.RolePrefix(kind, "prod", "web"))
	}
	for _, filter := range []Filter{{}, {Stage: "prod", Role: "web"}} {
		_, err := Read(t.Context(), nothing, filter)
		if !errors.Is(err, kv.ErrTooLarge) || !strings.Contains(err.Error(), "list desired/") {
			t.Errorf("a store of which nothing can be read: %v", err)
		}
	}
}

// As many roles as there are kinds may hold too much, and all else is shown. Orders are read by role, too.
func TestManyRolesThatHoldTooMuch(t *testing.T) {
	t.Parallel()
	s := openDir(t)
	store(t, s, put(kv.DesiredKey(app), release("app", "1").String()), put(kv.PinKey(app), "hold"),
		put(kv.ControlKey(app), "retry"), put(kv.MirrorKey, deployments.MirrorState{Head: "4f2c91a"}),
		says("web-1", map[string]deployments.UnitReport{"app": runs("app", "1")}))
	prefixes := []string{"pins/"}
	for i := range len(kinds) - 1 {
		id := deployments.UnitID{Stage: "prod", Role: fmt.Sprintf("db-%d", i), Unit: "main"}
		store(t, s, put(kv.DesiredKey(id), release("db", "1").String()))
		prefixes = append(prefixes, kv.RolePrefix(kv.PinsPrefix, id.Stage, id.Role))
	}
	f, err := Read(t.Context(), full{s, prefixes}, Filter{})
	if err != nil {
		t.Fatal(err)
	}
	if u := unitOf(t, f, app.String()); u.Pin == nil || u.Live != 1 {
		t.Errorf("%+v", u)
	}
	if f, err = Read(t.Context(), full{s, []string{"control/"}}, Filter{}); err != nil {
		t.Fatal(err)
	}
	if u := unitOf(t, f, app.String()); u.Order != "retry" || strings.Join(f.incomplete, " ") != "control/" {
		t.Errorf("order %q, unread: %q", u.Order, f.incomplete)
	}
	// no answer comes in time for one role of a kind that is read by role
	late := full{hanging{s, "pins/prod/web/"}, []string{"pins/"}}
	if f, err = Read(t.Context(), late, Filter{}); err != nil {
		t.Fatal(err)
	}
	if err := f.CheckComplete(); !errors.Is(err, ErrLate) || !strings.Contains(err.Error(), "below pins/prod/web/") {
		t.Errorf("a late role: %v", err)
	}
}

// hanging is a store that doesn't list some prefixes in time.
type hanging struct {
	kv.Store
	prefixes string
}

func (s hanging) List(ctx context.Context, prefix string) ([]kv.Entry, error) {
	if strings.Contains(s.prefixes, prefix) {
		return nil, fmt.Errorf("list %s: %w: Get: %w", prefix, kv.ErrUnavailable, context.DeadlineExceeded)
	}
	return s.Store.List(ctx, prefix)
}

// leaving is a store that goes away while a prefix is listed.
type leaving struct {
	hanging
	gone *atomic.Bool
}

func (s leaving) List(ctx context.Context, prefix string) ([]kv.Entry, error) {
	all, err := s.hanging.List(ctx, prefix)
	s.gone.Store(s.gone.Load() || err != nil)
	return all, err
}

func (s leaving) Get(ctx context.Context, key string) (kv.Entry, error) {
	if s.gone.Load() {
		return kv.Entry{}, fmt.Errorf("get %s: %w: Get: %w", key, kv.ErrUnavailable, context.DeadlineExceeded)
	}
	return s.Store.Get(ctx, key)
}

// Of gigabytes below one prefix Consul makes no answer in time: the rest is shown. If nothing comes, the store is away.
func TestPartOfAFleetThatDoesNotCome(t *testing.T) {
	t.Parallel()
	s := openDir(t)
	store(t, s,
		put(kv.MirrorKey, deployments.MirrorState{Head: "4f2c91ab77d0c0ffee00c0ffee00c0ffee00c0ff"}),
		put(kv.DesiredKey(app), release("app", "1").String()),
		says("web-1", map[string]deployments.UnitReport{"app": runs("app", "1")}),
	)
	f, err := Read(t.Context(), hanging{s, "pins/"}, Filter{})
	if err != nil {
		t.Fatal(err)
	}
	if u := unitOf(t, f, app.String()); u.Live != 1 {
		t.Errorf("%+v", u)
	}
	if err := f.CheckComplete(); !errors.Is(err, ErrLate) || errors.Is(err, ErrTooMuch) ||
		!strings.Contains(err.Error(), "below pins/") || !strings.Contains(f.IncompleteText(), "the keys below pins/") {
		t.Errorf("%v; %s", err, f.IncompleteText())
	}
	if f, err = Read(t.Context(), hanging{s, "control/"}, Filter{}); err != nil || !errors.Is(f.CheckComplete(), ErrLate) {
		t.Errorf("without the first prefix: %v", err)
	}
	both := hanging{full{s, []string{"status/", "status/prod/web/"}}, "pins/"}
	if f, err = Read(t.Context(), both, Filter{}); err != nil {
		t.Fatal(err)
	}
	if err := f.CheckComplete(); !errors.Is(err, ErrLate) || !errors.Is(err, ErrTooMuch) ||
		!strings.Contains(err.Error(), "below status/, status/prod/web/; no answer") {
		t.Errorf("too much of one and none of another: %v", err)
	}
	for _, prefix := range kinds {
		_, err := Read(t.Context(), leaving{hanging{s, prefix}, new(atomic.Bool)}, Filter{})
		if !errors.Is(err, kv.ErrUnavailable) {
			t.Errorf("an outage that begins with %s: %v", prefix, err)
		}
	}
	for _, prefixes := range []string{"pins/ status/", "control/ mirror/ desired/ pins/ status/"} {
		if _, err := Read(t.Context(), hanging{s, prefixes}, Filter{}); !errors.Is(err, kv.ErrUnavailable) {
			t.Errorf("without %s: %v", prefixes, err)
		}
	}
}

// The history of a large fleet is more than is read at once, though no key of it is junk: a commit is found in it, or
// found to be missing, all the same. What can't be read of one unit is told, and isn't taken for absent.
func TestWaitWithMoreHistoryThanIsRead(t *testing.T) {
	t.Parallel()
	const old, head = "4f2c91ab77d0c0ffee00c0ffee00c0ffee00c0ff", "9d1e5c3077d0c0ffee00c0ffee00c0ffee00c0ff"
	s := openDir(t)
	store(t, s, put(kv.MirrorKey, deployments.MirrorState{Head: head}),
		put(kv.DesiredKey(app), deployments.Record{Target: release("app", "1"), Generation: 2}),
		put(kv.HistoryKey(app, 1), deployments.History{Generation: 1, Commit: old}),
		says("web-1", map[string]deployments.UnitReport{"app": runs("app", "1")}))
	wait := func(commit string, prefixes ...string) error {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		return Wait(ctx, full{s, prefixes}, Filter{}, WaitOptions{Commit: commit, Progress: func(missing string) {
			if missing != "reading the history" {
				cancel()
			}
		}})
	}
	if err := wait(old, "history/"); err != nil {
		t.Errorf("with too much history: %v", err)
	}
	if err := wait(old, "history/", "history/prod/web/"); err != nil {
		t.Errorf("with too much history of one role: %v", err)
	}
	if err := wait("fa11ed0", "history/", "history/prod/web/"); err == nil || !strings.Contains(err.Error(), "still at") {
		t.Errorf("a commit that isn't in it: %v", err)
	}
	all := []string{"history/", "history/prod/web/", "history/prod/web/app/"}
	if err := wait(old, all...); err == nil || !strings.Contains(err.Error(), "list history/prod/web/app/") {
		t.Errorf("with too much history of one unit: %v", err)
	}
}

// bare is a store in which a unit has no folder of its own.
type bare struct {
	kv.Store
	prefix string
}

func (s bare) List(ctx context.Context, prefix string) ([]kv.Entry, error) {
	if prefix == s.prefix {
		return nil, fmt.Errorf("list %s: %w", prefix, kv.ErrDenied)
	}
	return s.Store.List(ctx, prefix)
}

func TestNoHistoryBesideMoreThanIsRead(t *testing.T) {
	t.Parallel()
	s := bare{full{openDir(t), []string{"history/prod/web/"}}, kv.HistoryPrefixOf(app)}
	if past, err := History(t.Context(), s, app); err != nil || len(past) > 0 {
		t.Errorf("%v, %v", past, err)
	}
}
