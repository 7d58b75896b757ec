package mirror

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/deployments/wait"
	"kedge/kv"
	"kedge/sync/git/gittest"
)

func TestPushReachesTheStore(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	store := &recorder{Store: dirStore(t)}
	first := o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1"), "prod/web/base.yaml": unitFile("base/1"), "dev/db/db.yaml": unitFile("db/1")})
	m := start(t, Config{Store: store, Repo: o.Bare})
	m.runs("prod/web/app", "app/1")
	m.runs("prod/web/base", "base/1")
	if got := m.runs("dev/db/db", "db/1"); got.Generation != 1 || got.Commit != first {
		t.Errorf("record %+v", got)
	}
	status := m.at(first)
	if status.Holder != "mirror-1" || status.Author != "Ada <ada@example.com>" {
		t.Errorf("status %+v", status)
	}
	store.taken()

	second := o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2"), "README.md": "read me"})
	got := m.runs("prod/web/app", "app/2")
	if got.Generation != 2 || got.Stable != pointer("app/1") || got.Commit != second {
		t.Errorf("record %+v", got)
	}
	m.at(second)
	var keys []string
	for _, ops := range store.taken() {
		for _, op := range ops {
			keys = append(keys, op.Key)
		}
	}
	if got, want := strings.Join(keys, " "), "desired/prod/web/app history/prod/web/app/0000000002 mirror/state"; got != want {
		t.Errorf("the second push wrote %s, want %s", got, want)
	}

	third := o.Push(map[string]string{"README.md": "read me again"})
	if got := m.at(third).Ancestors; got != short(second)+" "+short(first) && got != short(first)+" "+short(second) {
		t.Errorf("the past of %s is %s", third, got)
	}
	if got := store.taken(); len(got) != 1 || len(got[0]) != 1 || got[0][0].Key != kv.MirrorKey {
		t.Errorf("a commit that changes no unit wrote %v", got)
	}
}

func TestBadCommitIsNotTaken(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	store := dirStore(t)
	good := o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1"), "prod/web/base.yaml": unitFile("base/1")})
	m := start(t, Config{Store: store, Repo: o.Bare})
	m.at(good)
	was := desired(t, store)
	for _, c := range []struct {
		name  string
		files map[string]string
		words []string
	}{
		{"an unknown field", map[string]string{"prod/web/app.yaml": unitFile("app/2") + "relaese: x\n"}, []string{"prod/web/app.yaml:2:1", "relaese"}},
		{"a bare URL", map[string]string{"prod/web/app.yaml": "release: s3://acme-releases/app/2\n"}, []string{"prod/web/app.yaml:1:", "@sha256:"}},
		{"a unit in two files", map[string]string{"prod/web/app.yaml": unitFile("app/2"), "prod/web/app.yml": unitFile("app/3")}, []string{"prod/web/app.yml"}},
		{"a circle", map[string]string{"prod/web/app.yml": "", "prod/web/app.yaml": unitFile("app/2") + "after: [base]\n", "prod/web/base.yaml": unitFile("base/2") + "after: [app]\n"},
			[]string{"after", "app", "base"}},
		{"settings that don't parse", map[string]string{"kedge.yaml": "prune: perhaps\n", "prod/web/app.yaml": unitFile("app/2"), "prod/web/base.yaml": unitFile("base/2")}, []string{"kedge.yaml:1:"}},
		{"a name that no key may have", map[string]string{"kedge.yaml": "", "prod/web/x.tmp.yaml": unitFile("x/1")}, []string{"prod/web/x.tmp.yaml", ".tmp"}},
	} {
		head := o.Push(c.files)
		if s := m.refuses(head, c.words...); s.Head != good {
			t.Errorf("%s: head %s, want %s", c.name, s.Head, good)
		}
		sameDesired(t, store, was)
	}
	mended := o.Push(map[string]string{"prod/web/x.tmp.yaml": "", "prod/web/app.yaml": unitFile("app/4"), "prod/web/base.yaml": unitFile("base/1")})
	m.runs("prod/web/app", "app/4")
	if s := m.at(mended); s.Refused != "" {
		t.Errorf("status %+v", s)
	}
}

func TestForcePush(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	store := dirStore(t)
	base := o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	head := o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2")})
	m := start(t, Config{Store: store, Repo: o.Bare})
	m.at(head)
	was := desired(t, store)

	// A rule that allows a push doesn't count if it comes with the same push.
	o.Git(o.Work, "reset", "-q", "--hard", base)
	forced := o.Commit(map[string]string{"prod/web/app.yaml": unitFile("evil/1"), "kedge.yaml": "allow_rewind: true\n"})
	o.Git(o.Work, "push", "-q", "-f", "origin", "HEAD:main")
	m.refuses(forced, "does not descend from "+head[:12])
	sameDesired(t, store, was)

	// Nor does a mirror that restarts forget the commit before.
	m.stop()
	m = start(t, Config{Store: store, Repo: o.Bare, Name: "mirror-2"})
	m.status(func(s deployments.MirrorState) bool {
		return s.Holder == "mirror-2" && s.Refused == forced && s.Head == head
	})
	sameDesired(t, store, was)

	// Going back further is a rewind as well.
	o.Git(o.Work, "push", "-q", "-f", "origin", base+":main")
	m.refuses(base, "does not descend")
	sameDesired(t, store, was)

	o.Git(o.Work, "reset", "-q", "--hard", head)
	allowed := o.Commit(map[string]string{"kedge.yaml": "allow_rewind: true\n"})
	o.Git(o.Work, "push", "-q", "-f", "origin", "HEAD:main")
	m.at(allowed)
	o.Git(o.Work, "push", "-q", "-f", "origin", base+":main")
	m.at(base)
	if got := m.runs("prod/web/app", "app/1"); got.Generation != 2 {
		t.Errorf("going back is a new generation: %+v", got)
	}
}

func TestMassRemoval(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	store := dirStore(t)
	files := map[string]string{"kedge.yaml": "prune: true\n"}
	for i := range 10 {
		files["prod/web/u"+strconv.Itoa(i)+".yaml"] = unitFile("u/1")
	}
	head := o.Push(files)
	m := start(t, Config{Store: store, Repo: o.Bare})
	m.at(head)
	was := desired(t, store)

	o.Git(o.Work, "rm", "-q", "-r", "prod")
	empty := o.Push(map[string]string{"kedge.yaml": "prune: true\nmax_removed: 100\n"})
	m.refuses(empty, "no unit at all")
	sameDesired(t, store, was)

	o.Git(o.Work, "revert", "--no-edit", empty)
	for i := range 4 {
		o.Git(o.Work, "rm", "-q", "prod/web/u"+strconv.Itoa(i)+".yaml")
	}
	many := o.Push(map[string]string{"kedge.yaml": "prune: true\n"})
	m.refuses(many, "removes 4 of 10 units", "max_removed")
	sameDesired(t, store, was)

	few := o.Push(map[string]string{"prod/web/u0.yaml": unitFile("u/1")})
	m.at(few)
	if got := desired(t, store); len(got) != 7 {
		t.Errorf("%d records, want 7", len(got))
	}
}

// A removal takes more room in a transaction than a write.
func TestManyRemovalsNeedManyTransactions(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	store := dirStore(t)
	files := map[string]string{"kedge.yaml": "prune: true\nmax_removed: 100\n"}
	for i := range 80 {
		files["prod/web/u"+strconv.Itoa(i)+".yaml"] = unitFile("u/1")
	}
	m := start(t, Config{Store: store, Repo: o.Bare})
	m.at(o.Push(files))
	o.Git(o.Work, "rm", "-q", "-r", "prod")
	m.at(o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")}))
	if got := desired(t, store); len(got) != 1 {
		t.Errorf("%d records, want 1", len(got))
	}
}

func TestRemovedUnitKeepsItsRecordWithoutPrune(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	store := dirStore(t)
	m := start(t, Config{Store: store, Repo: o.Bare})
	o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1"), "prod/web/base.yaml": unitFile("base/1")})
	m.runs("prod/web/base", "base/1")
	m.at(o.Push(map[string]string{"prod/web/base.yaml": ""}))
	m.record("prod/web/base", func(r deployments.Record) bool { return r.Orphaned && r.Target == pointer("base/1") })
	m.at(o.Push(map[string]string{"prod/web/base.yaml": unitFile("base/1")}))
	if r := m.record("prod/web/base", func(r deployments.Record) bool { return !r.Orphaned }); r.Generation != 1 {
		t.Errorf("back in Git as it was: %+v", r)
	}
	m.at(o.Push(map[string]string{"prod/web/base.yaml": ""}))
	m.record("prod/web/base", func(r deployments.Record) bool { return r.Orphaned })

	m.at(o.Push(map[string]string{"kedge.yaml": "max_removed: 60\nprune: true\n"}))
	m.await("pruning", func() error {
		if _, there := desired(t, store)["prod/web/base"]; there {
			return errors.New("the record is still there")
		}
		return nil
	})
	// The unit's generation continues where its history ended.
	m.at(o.Push(map[string]string{"prod/web/base.yaml": unitFile("base/2")}))
	if got := m.runs("prod/web/base", "base/2"); got.Generation != 2 {
		t.Errorf("record %+v", got)
	}
}

func TestChangeByHandIsPutBack(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	o := gittest.New(t)
	store := dirStore(t)
	// A record made by hand before there was a mirror.
	put(t, store, "desired/prod/web/app", pointer("hand/1").String()+"\n")
	o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	m := start(t, Config{Store: store, Repo: o.Bare})
	first := m.runs("prod/web/app", "app/1")
	if first.Generation != 1 || first.Stable != pointer("hand/1") {
		t.Errorf("record %+v", first)
	}
	for _, byHand := range []string{pointer("hand/2").String(), "nonsense", "", `{"target":"` + pointer("hand/3").String() + `","generation":1}`} {
		put(t, store, "desired/prod/web/app", byHand)
		m.runs("prod/web/app", "app/1")
	}
	if err := store.Commit(ctx, nil, kv.Delete("desired/prod/web/app")); err != nil {
		t.Fatal(err)
	}
	if got := m.runs("prod/web/app", "app/1"); got.Generation != 2 {
		t.Errorf("generation %d: only the change to a record of the same generation needs a new one", got.Generation)
	}
	// The mirror ignores what Git doesn't have.
	put(t, store, "desired/prod/web/other", pointer("hand/4").String())
	m.at(o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2")}))
	m.runs("prod/web/other", "hand/4")
}

func put(t *testing.T, s kv.Store, key, value string) {
	t.Helper()
	if err := s.Commit(t.Context(), nil, kv.Put(key, []byte(value))); err != nil {
		t.Fatal(err)
	}
}

// A change of the mirror's own state by hand is undone too: kedge wait and the next mirror rely on it.
func TestStateIsPutBack(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	store := &recorder{Store: dirStore(t)}
	m := start(t, Config{Store: store, Repo: o.Bare})
	head := o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	was := m.at(head)
	store.taken()
	put(t, store.Store, kv.MirrorKey, `{"head":"`+strings.Repeat("1", 40)+`"}`)
	if got := m.at(head); !got.Equal(was) {
		t.Errorf("state %+v, want %+v", got, was)
	}
	if err := store.Store.Commit(t.Context(), nil, kv.Delete(kv.MirrorKey)); err != nil {
		t.Fatal(err)
	}
	m.at(head)
	if got := store.taken(); len(got) != 2 {
		t.Errorf("it was put back by %d writes, want 2", len(got))
	}
	m.at(o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2")}))
}

func TestOrders(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	store := dirStore(t)
	m := start(t, Config{Store: store, Repo: o.Bare})
	m.at(o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")}))
	gone := func() {
		t.Helper()
		m.await("the order", func() error {
			if _, err := store.Get(t.Context(), "control/prod/web/app"); !errors.Is(err, kv.ErrNotFound) {
				return fmt.Errorf("it is still there: %v", err)
			}
			return nil
		})
	}
	for i, verb := range []string{"retry", "Retry\r\n"} {
		put(t, store, "control/prod/web/app", verb)
		gone()
		if got := m.runs("prod/web/app", "app/1"); got.Retry != int64(i+1) || got.Generation != 1 {
			t.Errorf("after %d orders: %+v", i+1, got)
		}
	}
	put(t, store, "control/prod/web/app", "pause") // there is no rollout to pause
	gone()
	put(t, store, "control/prod/web/app", "rettry")
	put(t, store, "control/prod/web/nowhere", "retry")
	for _, says := range []string{`\"rettry\": want promote`,
		"control/prod/web/nowhere: the mirrored commit has no such unit"} {
		m.await("a log line", func() error {
			if !strings.Contains(m.log.String(), says) {
				return errors.New("nothing is said")
			}
			return nil
		})
	}
	if got := m.runs("prod/web/app", "app/1"); got.Retry != 2 {
		t.Errorf("record %+v", got)
	}
	if e, err := store.Get(t.Context(), "control/prod/web/app"); err != nil || string(e.Value) != "rettry" {
		t.Errorf("an order that can't be obeyed is %q, %v: whoever wrote it should see it", e.Value, err)
	}
}

func TestRestartWritesNothing(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	store := &recorder{Store: dirStore(t)}
	head := o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1") + "after: [base]\n", "prod/web/base.yaml": unitFile("base/1")})
	m := start(t, Config{Store: store, Repo: o.Bare})
	m.at(head)
	m.stop()
	store.taken()
	m = start(t, Config{Store: store, Repo: o.Bare})
	next := o.Push(map[string]string{"prod/web/base.yaml": unitFile("base/2")})
	m.at(next)
	if got := store.taken(); len(got) != 1 || len(got[0]) != 3 {
		t.Errorf("after a restart a push of one unit wrote %v", got)
	}
}

// Pushes can come faster than the store shows the last one's write.
func TestPushAfterPush(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	store := dirStore(t)
	m := start(t, Config{Store: store, Repo: o.Bare})
	var heads []string
	for i := range 20 {
		heads = append(heads, o.Commit(map[string]string{"prod/web/app.yaml": unitFile("app/" + strconv.Itoa(i)), "prod/web/base.yaml": unitFile("base/" + strconv.Itoa(i/5))}))
	}
	for _, head := range heads {
		o.Git(o.Bare, "fetch", "-q", o.Work, head)
		o.Git(o.Bare, "update-ref", "refs/heads/main", head)
	}
	for i, name := range strings.Fields(m.at(heads[19]).Ancestors) { // they have the same time
		if !slices.ContainsFunc(heads[:19], func(h string) bool { return strings.HasPrefix(h, name) }) || i >= 19 {
			t.Errorf("%s is no commit of the past", name)
		}
	}
	app, base := m.runs("prod/web/app", "app/19"), m.runs("prod/web/base", "base/3")
	if app.Generation < 1 || app.Generation > 20 || base.Generation > 4 || app.Commit != heads[19] {
		t.Errorf("app %+v, base %+v", app, base)
	}
	if strings.Contains(m.log.String(), "could not bring the store up to date with Git: trying again") {
		t.Error("there was trouble")
	}
}

func TestHistory(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	store := dirStore(t)
	put(t, store, "history/prod/web/app/0000000007", "an old one")
	// The state after 56 pushes.
	put(t, store, "desired/prod/web/app", `{"target":"`+pointer("app/56").String()+`","generation":56,"commit":"`+strings.Repeat("0", 40)+`"}`)
	head := o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/57")})
	m := start(t, Config{Store: store, Repo: o.Bare})
	m.at(head)
	entries, err := store.List(t.Context(), kv.HistoryPrefixOf(unitID(t, "prod/web/app")))
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) != 1 || entries[0].Key != "history/prod/web/app/0000000057" {
		t.Fatalf("history %v", entries)
	}
	for _, want := range []string{
		`"author":"Ada <ada@example.com>"`, head, pointer("app/57").String(), `"stable":"` + pointer("app/56").String(),
	} {
		if !strings.Contains(string(entries[0].Value), want) {
			t.Errorf("history %s lacks %s", entries[0].Value, want)
		}
	}
}

func TestManyUnitsNeedManyTransactions(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	store := &recorder{Store: dirStore(t)}
	files := map[string]string{}
	for i := range 100 {
		files["prod/r"+strconv.Itoa(i%7)+"/u"+strconv.Itoa(i)+".yaml"] = unitFile("u/" + strconv.Itoa(i))
	}
	head := o.Push(files)
	m := start(t, Config{Store: store, Repo: o.Bare})
	m.at(head)
	if got := len(desired(t, store)); got != 100 {
		t.Errorf("%d records", got)
	}
	commits := store.taken()
	for i, ops := range commits {
		if len(ops) > kv.MaxOps {
			t.Errorf("a transaction of %d operations", len(ops))
		}
		announces, confirms := ops[0].Key == kv.MirrorKey, ops[len(ops)-1].Key == kv.MirrorKey
		if announces != (i == 0) || confirms != (i == len(commits)-1) {
			t.Errorf("transaction %d of %d announces the commit: %v, confirms it: %v", i+1, len(commits), announces, confirms)
		}
	}
}

func TestLocalRepoHoweverItIsKept(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	store := dirStore(t)
	// Neither the branch nor the repository is there at the start.
	moved := o.Bare + ".new"
	if err := os.Rename(o.Bare, moved); err != nil {
		t.Fatal(err)
	}
	m := start(t, Config{Store: store, Repo: "file://" + o.Bare, Branch: "live/fleet"})
	m.status(func(s deployments.MirrorState) bool { return strings.Contains(s.Error, o.Bare) })
	if err := os.Rename(moved, o.Bare); err != nil {
		t.Fatal(err)
	}
	m.status(func(s deployments.MirrorState) bool { return strings.Contains(s.Error, "no such branch") })
	push := func(release string) {
		t.Helper()
		head := o.Commit(map[string]string{"prod/web/app.yaml": unitFile(release)})
		o.Git(o.Work, "push", "-q", "origin", "HEAD:live/fleet")
		m.at(head)
		m.runs("prod/web/app", release)
	}
	push("app/1")
	o.Git(o.Bare, "pack-refs", "--all", "--prune") // takes refs/heads/live away
	push("app/2")
	o.Git(o.Bare, "gc", "-q", "--prune=now")
	push("app/3")
	o.Git(o.Bare, "repack", "-q", "-a", "-d")
	push("app/4")
	m.await("watch", func() error {
		if !strings.Contains(m.log.String(), "watching the repository for pushes") {
			return errors.New("the repository isn't watched any more")
		}
		return nil
	})
	// The branch is removed: nothing changes.
	was := desired(t, store)
	o.Git(o.Bare, "branch", "-q", "-D", "live/fleet")
	m.status(func(s deployments.MirrorState) bool { return strings.Contains(s.Error, "no such branch") })
	sameDesired(t, store, was)
	push("app/5")
}

func TestRepoWithAlternates(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	fork := filepath.Join(t.TempDir(), "fork.git")
	o.Git("", "clone", "-q", "--bare", "--shared", o.Bare, fork)
	head := o.Commit(map[string]string{"prod/web/base.yaml": unitFile("base/1")})
	o.Git(o.Work, "push", "-q", fork, "HEAD:main")
	m := start(t, Config{Store: dirStore(t), Repo: fork})
	m.at(head)
	m.runs("prod/web/app", "app/1")
}

func TestOtherFormatsAreNamed(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "sha256.git")
	gittest.New(t).Git("", "init", "-q", "--bare", "--object-format=sha256", dir)
	m := start(t, Config{Store: dirStore(t), Repo: dir})
	m.status(func(s deployments.MirrorState) bool { return strings.Contains(s.Error, "object format sha256") })
}

func TestStoreOutage(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	store := &recorder{Store: dirStore(t)}
	m := start(t, Config{Store: store, Repo: o.Bare})
	m.at(o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")}))
	store.setFail(kv.ErrUnavailable)
	head := o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2")})
	m.await("a log line", func() error {
		if !strings.Contains(m.log.String(), "could not bring the store up to date with Git: trying again") {
			return errors.New("nothing is said")
		}
		return nil
	})
	store.setFail(nil)
	m.at(head)
	if got := m.runs("prod/web/app", "app/2"); got.Generation != 2 {
		t.Errorf("record %+v", got)
	}
}

// refusing refuses every write to a unit's keys, and counts the tries.
type refusing struct {
	kv.Store
	with  atomic.Pointer[error]
	asked atomic.Int64
}

func (r *refusing) Commit(ctx context.Context, lease kv.Lease, ops ...kv.Op) error {
	if err := r.with.Load(); err != nil && ops[0].Key != kv.MirrorKey {
		r.asked.Add(1)
		return *err
	}
	return r.Store.Commit(ctx, lease, ops...)
}

// What the store refuses is shown in mirror/state, and is not retried at every report of a fleet.
func TestStoreThatRefuses(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	store := &refusing{Store: dirStore(t)}
	m := start(t, Config{Store: store, Repo: o.Bare})
	first := o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	m.at(first)
	refusal := fmt.Errorf("no: %w", kv.ErrDenied)
	store.with.Store(&refusal)
	second := o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2")})
	m.status(func(s deployments.MirrorState) bool {
		return s.Head == first && strings.Contains(s.Error, "no: permission denied")
	})

	asked, began := store.asked.Load(), time.Now()
	for i := range 200 {
		put(t, store.Store, "status/prod/web/web-1", strconv.Itoa(i))
		if err := wait.For(t.Context(), 5*time.Millisecond); err != nil {
			t.Fatal(err)
		}
	}
	took := time.Since(began) // longer on a busy machine
	if asked = store.asked.Load() - asked; asked > 8+2*int64(took/time.Second) {
		t.Errorf("the store was asked %d times in %v while it refuses", asked, took)
	}
	store.with.Store(nil)
	m.at(second)
}
