package kvtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"kedge/kv"
)

// Backend is one store's state, fresh and empty, for one test.
type Backend struct {
	// Open returns another handle on the same state, as another process would have, and closes it when the test ends.
	Open func(tb testing.TB) kv.Store
	// PutByHand and DeleteByHand write as a person would, without kedge.
	PutByHand    func(tb testing.TB, key, value string)
	DeleteByHand func(tb testing.TB, key string)
}

// patience bounds how long a test waits for what should happen at once, on a busy machine.
const patience = 30 * time.Second

// Run tests the contract of kv.Store. fresh returns a new state for each test.
func Run(t *testing.T, fresh func(t *testing.T) Backend) {
	tests := []struct {
		name string
		test func(t *testing.T, b Backend)
	}{
		{"get and list", testGetList},
		{"bad keys", testBadKeys},
		{"folders are no entries", testFolders},
		{"a key with keys below it", testNested},
		{"commit conditions", testConditions},
		{"commit is all or nothing", testAtomic},
		{"commit limits", testLimits},
		{"versions", testVersions},
		{"any history of commits", testModel},
		{"what people put is kept as it is", testVerbatim},
		{"concurrent commits don't lose updates", testConcurrent},
		{"readers see no half commit", testNoHalf},
		{"watch", testWatch},
		{"watch sees what was there", testWatchExisting},
		{"too much", testTooMuch},
		{"watch of a folder that comes later", testWatchLateFolder},
		{"a write of the same value wakes nobody", testSameValue},
		{"a write elsewhere wakes nobody", testElsewhere},
		{"views are the caller's own", testOwnViews},
		{"watch reacts at once", testLatency},
		{"cancelled", testCancelled},
		{"lease excludes", testLeaseExcludes},
		{"lease fences", testLeaseFences},
		{"lease taken away by hand", testLeaseTaken},
		{"lease wait is cancelled", testLeaseCancelled},
		{"lease survives its caller's context", testLeaseContext},
		{"presence", testPresence},
		{"presence leaves an entry behind", testPresenceLeaves},
		{"presence is taken over by a later process", testPresenceTakeover},
		{"presence of several keys", testPresenceKeys},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			tt.test(t, fresh(t))
		})
	}
}

func testGetList(t *testing.T, b Backend) {
	s := b.Open(t)
	ctx := t.Context()
	mustFolders(t, s, "pins/prod/web/", "pins/prod/db/")
	mustCommit(t, s, nil, kv.Put("pins/prod/web/app", []byte("1")), kv.Put("pins/prod/db/pg", []byte("2")),
		kv.Put("pins/prod/web/a-first", nil))
	e, err := s.Get(ctx, "pins/prod/web/app")
	if err != nil || e.Key != "pins/prod/web/app" || string(e.Value) != "1" || e.Version == 0 || e.Session != "" {
		t.Fatalf("get: %+v, %v", e, err)
	}
	if _, err := s.Get(ctx, "pins/prod/web/none"); !errors.Is(err, kv.ErrNotFound) {
		t.Fatalf("get of a missing key: %v", err)
	}
	entries, err := s.List(ctx, "pins/prod/web/")
	if err != nil || keysOf(entries) != "pins/prod/web/a-first= pins/prod/web/app=1" {
		t.Fatalf("list: %s, %v", keysOf(entries), err)
	}
	// Get and List must agree about a key.
	if entries[1].Version != e.Version {
		t.Fatalf("get gives version %d and list %d", e.Version, entries[1].Version)
	}
	mustFolders(t, s, "")
	entries, err = s.List(ctx, "")
	if err != nil || keysOf(entries) != "pins/prod/db/pg=2 pins/prod/web/a-first= pins/prod/web/app=1" {
		t.Fatalf("list of everything: %s, %v", keysOf(entries), err)
	}
	if s.String() == "" {
		t.Fatal("the store has no name for people")
	}
}

func testBadKeys(t *testing.T, b Backend) {
	s := b.Open(t)
	for _, key := range []string{"", "/a", "a/", "a//b", "../a", "a/../b", "a/./b", "a/.hidden", "a b", "a/b@/c", "a\x00b", "a/" + strings.Repeat("x", 64), "a/b~", "a/b.swp"} {
		if _, err := s.Get(t.Context(), key); err == nil || errors.Is(err, kv.ErrNotFound) {
			t.Errorf("get %q: %v", key, err)
		}
		if err := s.Commit(t.Context(), nil, kv.Put(key, nil)); err == nil {
			t.Errorf("commit took the key %q", key)
		}
	}
	for _, prefix := range []string{"a", "/", "../", "a//"} {
		if _, err := s.List(t.Context(), prefix); err == nil {
			t.Errorf("list took the prefix %q", prefix)
		}
		if err := s.Watch(t.Context(), prefix, func(kv.View) {}); err == nil {
			t.Errorf("watch took the prefix %q", prefix)
		}
		if err := s.EnsureFolders(t.Context(), prefix); err == nil {
			t.Errorf("a folder was made of %q", prefix)
		}
	}
}

func testFolders(t *testing.T, b Backend) {
	s := b.Open(t)
	mustFolders(t, s, "pins/prod/web/", "pins/prod/")
	mustFolders(t, s, "pins/prod/web/") // again
	for _, prefix := range []string{"pins/prod/web/", "pins/prod/"} {
		entries, err := s.List(t.Context(), prefix)
		if err != nil || len(entries) != 0 {
			t.Fatalf("list of the empty folder %s: %v, %v", prefix, entries, err)
		}
	}
}

func testNested(t *testing.T, b Backend) {
	s := b.Open(t)
	mustFolders(t, s, "pins/prod/web/", "other/")
	want := "pins/prod/web/app=unit pins/prod/web/app/node-1=one pins/prod/web/app/node-2=two"
	mustCommit(t, s, nil, kv.Put("pins/prod/web/app/node-1", []byte("one")))
	mustCommit(t, s, nil, kv.Put("pins/prod/web/app", []byte("unit")))
	mustCommit(t, s, nil, kv.Put("pins/prod/web/app/node-2", []byte("two")))
	if got := list(t, s, "pins/prod/web/"); got != want {
		t.Fatalf("list: %s", got)
	}
	// The same if the layout doesn't say which keys have keys below them.
	mustCommit(t, s, nil, kv.Put("other/a/b/c", []byte("1")), kv.Put("other/a/b/d", []byte("2")))
	mustCommit(t, s, nil, kv.Put("other/a", []byte("3")), kv.Put("other/a/b", []byte("4")),
		kv.Put("other/a/b/e", []byte("5")))
	if got := list(t, s, "other/"); got != "other/a=3 other/a/b=4 other/a/b/c=1 other/a/b/d=2 other/a/b/e=5" {
		t.Fatalf("list: %s", got)
	}
	mustCommit(t, s, nil, kv.Delete("pins/prod/web/app"))
	if got := list(t, s, "pins/prod/web/"); got != "pins/prod/web/app/node-1=one pins/prod/web/app/node-2=two" {
		t.Fatalf("list after the unit's pin went: %s", got)
	}
	mustCommit(t, s, nil, kv.Put("pins/prod/web/app", []byte("again")))
	if e, err := s.Get(t.Context(), "pins/prod/web/app/node-1"); err != nil || string(e.Value) != "one" {
		t.Fatalf("get a node's pin: %+v, %v", e, err)
	}
}

func testConditions(t *testing.T, b Backend) {
	s := b.Open(t)
	mustFolders(t, s, "d/")
	commit := func(want error, ops ...kv.Op) {
		t.Helper()
		if err := s.Commit(t.Context(), nil, ops...); !errors.Is(err, want) {
			t.Fatalf("commit %v: got %v, want %v", ops, err, want)
		}
	}
	commit(nil)
	commit(nil, kv.Create("d/k", []byte("1")))
	commit(kv.ErrConflict, kv.Create("d/k", []byte("2")))
	first := version(t, s, "d/k")
	commit(nil, kv.Replace("d/k", []byte("2"), first))
	commit(kv.ErrConflict, kv.Replace("d/k", []byte("3"), first))
	commit(kv.ErrConflict, kv.Replace("d/none", []byte("3"), first))
	commit(kv.ErrConflict, kv.Replace("d/none", []byte("3"), 0)) // can't create a key
	commit(kv.ErrConflict, kv.DeleteIf("d/k", first))
	commit(kv.ErrConflict, kv.DeleteIf("d/none", first))
	second := version(t, s, "d/k")
	commit(nil, kv.DeleteIf("d/k", second))
	commit(nil, kv.Delete("d/k")) // already gone
	if got := list(t, s, "d/"); got != "" {
		t.Fatalf("left: %s", got)
	}
}

func testAtomic(t *testing.T, b Backend) {
	s := b.Open(t)
	mustFolders(t, s, "d/", "e/")
	mustCommit(t, s, nil, kv.Put("d/a", []byte("1")), kv.Put("d/gone", []byte("1")))
	v := version(t, s, "d/a")
	mustCommit(t, s, nil, kv.Put("d/a", []byte("2")))
	err := s.Commit(t.Context(), nil, kv.Put("d/new", nil), kv.Delete("d/gone"),
		kv.Replace("d/a", []byte("3"), v), kv.Create("e/x", nil))
	if !errors.Is(err, kv.ErrConflict) {
		t.Fatalf("commit: %v", err)
	}
	if got := list(t, s, "d/"); got != "d/a=2 d/gone=1" {
		t.Fatalf("a refused commit left %s", got)
	}
	mustCommit(t, s, nil, kv.Put("d/new", []byte("n")), kv.Delete("d/gone"),
		kv.Replace("d/a", []byte("3"), version(t, s, "d/a")), kv.Create("e/x", nil))
	if got := list(t, s, "d/") + " " + list(t, s, "e/"); got != "d/a=3 d/new=n e/x=" {
		t.Fatalf("a commit left %s", got)
	}
}

func testLimits(t *testing.T, b Backend) {
	s := b.Open(t)
	mustFolders(t, s, "d/")
	lease := mustLease(t, s, "d/lease")
	var ops []kv.Op
	for i := range kv.MaxOps {
		ops = append(ops, kv.Put(fmt.Sprintf("d/k%d", i), []byte("v")))
	}
	mustCommit(t, s, lease, ops...)
	if err := s.Commit(t.Context(), nil, append(ops, kv.Put("d/one-more", nil))...); !errors.Is(err, kv.ErrTooLarge) {
		t.Fatalf("commit of %d operations: %v", kv.MaxOps+1, err)
	}
	var deletions []kv.Op
	for i := range kv.MaxOps/2 + 1 { // each costs two
		deletions = append(deletions, kv.DeleteIf(fmt.Sprintf("d/k%d", i), 1))
	}
	if err := s.Commit(t.Context(), nil, deletions...); !errors.Is(err, kv.ErrTooLarge) {
		t.Fatalf("commit of %d conditional deletions: %v", len(deletions), err)
	}
	large := bytes.Repeat([]byte("x"), 370<<10)
	mustCommit(t, s, nil, kv.Put("d/large", large))
	if e, err := s.Get(t.Context(), "d/large"); err != nil || !bytes.Equal(e.Value, large) {
		t.Fatalf("of %d bytes there are %d, %v", len(large), len(e.Value), err)
	}
	if err := s.Commit(t.Context(), nil, kv.Put("d/larger", bytes.Repeat([]byte("x"), 400<<10))); !errors.Is(err,
		kv.ErrTooLarge) {
		t.Fatalf("commit of 400 KiB: %v", err)
	}
	if err := s.Commit(t.Context(), nil, kv.Put("d/k1", nil), kv.Delete("d/k1")); err == nil {
		t.Fatal("a commit took the same key twice")
	}
}

func testVersions(t *testing.T, b Backend) {
	s := b.Open(t)
	mustFolders(t, s, "d/")
	seen := map[uint64]bool{}
	for i := range 20 {
		mustCommit(t, s, nil, kv.Put("d/k", []byte{byte('a' + i%2)}))
		v := version(t, s, "d/k")
		if seen[v] {
			t.Fatalf("write %d gave a version that was there before", i)
		}
		seen[v] = true
	}
	old := version(t, s, "d/k")
	b.PutByHand(t, "d/k", "by hand")
	if err := s.Commit(t.Context(), nil, kv.Replace("d/k", []byte("x"), old)); !errors.Is(err, kv.ErrConflict) {
		t.Fatalf("a change by hand went unnoticed: %v", err)
	}
}

// testModel applies the same random commits to the store and a map, with keys below one another.
func testModel(t *testing.T, b Backend) {
	s := b.Open(t)
	mustFolders(t, s, "")
	keys := []string{
		"d/a",
		"d/a/x",
		"d/a/y",
		"d/a/x/deep",
		"d/b/c/d",
		"d/b",
		"pins/p/w/app",
		"pins/p/w/app/n1",
		"pins/p/w/app/n2",
		"pins/p/w/b/n1",
	}
	type value struct {
		text    string
		version uint64
	}
	model := map[string]value{}
	draw := rand.New(rand.NewPCG(1, 2))
	for step := range 150 {
		next := maps.Clone(model)
		var ops []kv.Op
		conflict := false
		for _, i := range draw.Perm(len(keys))[:1+draw.IntN(4)] {
			key := keys[i]
			was, there := model[key]
			text := fmt.Sprint("v", draw.IntN(5))
			claimed := was.version
			if draw.IntN(8) == 0 || claimed == 0 {
				claimed += 1 + draw.Uint64N(1000)
			}
			current := there && claimed == was.version
			switch kind := kv.OpKind(draw.IntN(5)); kind {
			case kv.OpPut:
				ops, next[key] = append(ops, kv.Put(key, []byte(text))), value{text: text}
			case kv.OpCreate:
				ops, next[key] = append(ops, kv.Create(key, []byte(text))), value{text: text}
				conflict = conflict || there
			case kv.OpReplace:
				ops, next[key] = append(ops, kv.Replace(key, []byte(text), claimed)), value{text: text}
				conflict = conflict || !current
			case kv.OpDelete:
				ops = append(ops, kv.Delete(key))
				delete(next, key)
			case kv.OpDeleteIf:
				ops = append(ops, kv.DeleteIf(key, claimed))
				delete(next, key)
				conflict = conflict || !current
			}
		}
		err := s.Commit(t.Context(), nil, ops...)
		if conflict != errors.Is(err, kv.ErrConflict) || !conflict && err != nil {
			t.Fatalf("step %d: commit %v on %v: %v", step, ops, model, err)
		}
		if err == nil {
			model = next
		}
		entries, err := s.List(t.Context(), "")
		if err != nil {
			t.Fatal(err)
		}
		var want []string
		for _, key := range slices.Sorted(maps.Keys(model)) {
			want = append(want, key+"="+model[key].text)
		}
		if got := keysOf(entries); got != strings.Join(want, " ") {
			t.Fatalf("step %d: after %v the store has %s, want %s", step, ops, got, want)
		}
		for _, e := range entries {
			model[e.Key] = value{string(e.Value), e.Version}
			if got, err := s.Get(t.Context(), e.Key); err != nil || got.Version != e.Version ||
				!bytes.Equal(got.Value, e.Value) {
				t.Fatalf("step %d: list says %+v and get %+v, %v", step, e, got, err)
			}
		}
	}
}

func testVerbatim(t *testing.T, b Backend) {
	s := b.Open(t)
	mustFolders(t, s, "d/")
	for _, value := range []string{"x\n", "\ufeffx\r\n", "", "\x00\xff", " "} {
		mustCommit(t, s, nil, kv.Put("d/k", []byte(value)))
		if e, err := s.Get(t.Context(), "d/k"); err != nil || string(e.Value) != value {
			t.Fatalf("put %q, got %q, %v", value, e.Value, err)
		}
		b.PutByHand(t, "d/hand", value)
		if e, err := s.Get(t.Context(), "d/hand"); err != nil || string(e.Value) != value {
			t.Fatalf("put %q by hand, got %q, %v", value, e.Value, err)
		}
	}
}

func testConcurrent(t *testing.T, b Backend) {
	mustFolders(t, b.Open(t), "d/")
	mustCommit(t, b.Open(t), nil, kv.Put("d/n", []byte("0")))
	const workers, each = 4, 10
	var wg sync.WaitGroup
	for range workers {
		s := b.Open(t)
		wg.Go(func() {
			for done := 0; done < each; {
				e, err := s.Get(t.Context(), "d/n")
				if err != nil {
					t.Error(err)
					return
				}
				var n int
				fmt.Sscan(string(e.Value), &n)
				err = s.Commit(t.Context(), nil, kv.Replace("d/n", fmt.Append(nil, n+1), e.Version))
				if err == nil {
					done++
				} else if !errors.Is(err, kv.ErrConflict) {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	if got := list(t, b.Open(t), "d/"); got != fmt.Sprintf("d/n=%d", workers*each) {
		t.Fatalf("after %d increments: %s", workers*each, got)
	}
}

func testNoHalf(t *testing.T, b Backend) {
	w, r := b.Open(t), b.Open(t)
	mustFolders(t, w, "d/")
	write := func(i int) error {
		return w.Commit(t.Context(), nil, kv.Put("d/a", fmt.Append(nil, i)), kv.Put("d/b", fmt.Append(nil, i)),
			kv.Put("d/c", fmt.Append(nil, i)))
	}
	if err := write(0); err != nil {
		t.Fatal(err)
	}
	whole := func(entries []kv.Entry) bool {
		return len(entries) == 3 && bytes.Equal(entries[0].Value, entries[1].Value) &&
			bytes.Equal(entries[1].Value, entries[2].Value)
	}
	views := Watch(t, r, "d/")
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		defer close(done)
		for i := 1; i <= 30; i++ {
			if err := write(i); err != nil {
				t.Error(err)
			}
		}
	})
	for reading := true; reading; {
		select {
		case <-done:
			reading = false
		default:
		}
		entries, err := r.List(t.Context(), "d/")
		if err != nil || !whole(entries) {
			t.Errorf("list saw %s, %v", keysOf(entries), err)
			break
		}
	}
	wg.Wait()
	views.Await(t, "the last commit", func(v kv.View) bool { return keysOf(v.Entries) == "d/a=30 d/b=30 d/c=30" })
	for _, v := range views.All() {
		if !whole(v.Entries) {
			t.Errorf("watch saw %s", keysOf(v.Entries))
		}
	}
}

func testCancelled(t *testing.T, b Backend) {
	s := b.Open(t)
	mustFolders(t, s, "d/")
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.Watch(ctx, "d/", func(kv.View) { cancel() }) }()
	select {
	case err := <-ended:
		if !errors.Is(err, context.Canceled) {
			t.Fatalf("the watch ended with %v", err)
		}
	case <-time.After(patience):
		t.Fatal("the watch goes on after its context ended")
	}
	if _, err := s.List(ctx, "d/"); !errors.Is(err, context.Canceled) {
		t.Fatalf("list with a context that ended: %v", err)
	}
	if err := s.Commit(ctx, nil, kv.Put("d/k", nil)); !errors.Is(err, context.Canceled) {
		t.Fatalf("commit with a context that ended: %v", err)
	}
}
