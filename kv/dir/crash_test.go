package dir_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"kedge/kv"
	"kedge/kv/kvtest"
)

// crashOps is a commit of every kind of change: one of them has to make room first.
func crashOps() []kv.Op {
	return []kv.Op{
		kv.Put("d/a", []byte("new")), kv.Create("d/b", []byte("new")), kv.Delete("d/gone"),
		kv.Put("d/room", []byte("new")), kv.Put("e/deep/er", []byte("new")),
	}
}

const crashBefore = "d/a=old d/gone=old d/room/inside=old"

// crashAfter is what the store holds after the first so many of crashOps.
var crashAfter = map[int]string{
	2: "d/a=new d/b=new d/gone=old d/room/inside=old",
	5: "d/a=new d/b=new d/room=new d/room/inside=old e/deep/er=new",
}

func contents(t *testing.T, s kv.Store) string {
	t.Helper()
	entries, err := s.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	return shown(entries)
}

func shown(entries []kv.Entry) string {
	var all []string
	for _, e := range entries {
		all = append(all, e.Key+"="+string(e.Value))
	}
	return strings.Join(all, " ")
}

// A commit is whole or not at all, wherever its process is killed.
func TestKilledAtEachStep(t *testing.T) {
	t.Parallel()
	for ops := range crashAfter {
		t.Run(fmt.Sprint(ops, " changes"), func(t *testing.T) { testKilledAtEachStep(t, ops) })
	}
}

func testKilledAtEachStep(t *testing.T, ops int) {
	t.Parallel()
	keys := strings.Count(crashAfter[ops], "=")
	before, after := 0, 0
	for die := 0; ; die++ {
		if die > 50 {
			t.Fatal("the commit never gets through")
		}
		path := storePath(t)
		s := open(t, path)
		err := s.Commit(t.Context(), nil, kv.Put("d/a", []byte("old")), kv.Put("d/gone", []byte("old")), kv.Put("d/room/inside", []byte("old")))
		if err != nil {
			t.Fatal(err)
		}
		watching := kvtest.Watch(t, s, "")
		watching.Await(t, "the start", func(v kv.View) bool { return v.Synced })
		child := kvtest.StartChild(t, "crash", path, strconv.Itoa(die), strconv.Itoa(ops))
		err = child.Wait()
		switch got := contents(t, open(t, path)); got {
		case crashBefore:
			before++
		case crashAfter[ops]:
			after++
			watching.Await(t, "the commit", func(v kv.View) bool { return len(v.Entries) == keys })
		default:
			t.Fatalf("killed at step %d: %s", die, got)
		}
		for _, v := range watching.All() {
			if n := len(v.Entries); n != 3 && n != keys {
				t.Fatalf("killed at step %d: a view of %d keys", die, n)
			}
		}
		// And the store goes on working, with nothing left behind.
		if err := s.Commit(t.Context(), nil, crashOps()[0], kv.Put("e/later", nil)); err != nil {
			t.Fatal(err)
		}
		for _, left := range []string{"journal", "tmp/*"} {
			if files, _ := filepath.Glob(filepath.Join(path, ".kedge", left)); len(files) > 0 {
				t.Fatalf("killed at step %d: left behind: %v", die, files)
			}
		}
		if err == nil { // it wasn't killed any more
			t.Logf("%d kills left the old state, %d the new one", before, after-1)
			break
		}
	}
	if before == 0 || after < 2 {
		t.Fatal("the kills missed a side of the commit")
	}
}

// Killed at any moment, not only between the steps.
func TestKilledAtRandom(t *testing.T) {
	t.Parallel()
	path := storePath(t)
	s := open(t, path)
	for range 15 {
		child := kvtest.StartChild(t, "commits", path)
		child.Expect(t, "held")
		time.Sleep(time.Duration(rand.IntN(30)) * time.Millisecond) // a moment, not a wait for something
		child.Signal(t, syscall.SIGKILL)
		_ = child.Wait()
		entries, err := s.List(t.Context(), "d/")
		if err != nil {
			t.Fatal(err)
		}
		switch {
		case len(entries) == 0: // killed before the first
		case len(entries) != 3:
			t.Fatalf("half a commit: %+v", entries)
		default:
			v := string(entries[0].Value)
			n, _ := strconv.Atoi(v)
			if string(entries[1].Value) != v || string(entries[2].Value) != v || entries[2].Key != fmt.Sprint("d/n", n%2) {
				t.Fatalf("half a commit: %+v", entries)
			}
		}
	}
}

func TestPresenceOfKilled(t *testing.T) {
	t.Parallel()
	path := storePath(t)
	s := open(t, path)
	views := kvtest.Watch(t, s, "status/prod/web/")
	child := kvtest.StartChild(t, "presence", path)
	child.Expect(t, "held")
	views.Await(t, "the entry", kvtest.Held("child=ready"))
	start := time.Now()
	child.Signal(t, syscall.SIGKILL)
	views.Await(t, "its end", func(v kv.View) bool { return kvtest.Values(v) == "child=ready" && v.Entries[0].Session == "" })
	t.Logf("the death was seen after %v", time.Since(start))
	again := kvtest.StartChild(t, "presence", path)
	again.Expect(t, "held")
	views.Await(t, "its return", kvtest.Held("child=ready"))
	if files, err := os.ReadDir(filepath.Join(path, ".kedge", "sessions")); err != nil || len(files) != 1 {
		t.Fatalf("sessions left: %v, %v", files, err)
	}
}

func TestLeaseOfKilled(t *testing.T) {
	t.Parallel()
	path := storePath(t)
	s := open(t, path)
	child := kvtest.StartChild(t, "lease", path)
	child.Expect(t, "held")
	kvtest.Await(t, "its first write", func() error { _, err := s.Get(t.Context(), "desired/k"); return err })

	// Asleep it keeps the lease: no clock takes it away, so none could be wrong.
	child.Signal(t, syscall.SIGSTOP)
	got := make(chan kv.Lease, 1)
	go func() {
		l, err := s.Lease(t.Context(), "mirror/lease", "second", time.Second)
		if err != nil {
			t.Error(err)
		}
		got <- l
	}()
	select {
	case <-got:
		t.Fatal("two hold the lease")
	case <-time.After(1500 * time.Millisecond):
	}
	child.Signal(t, syscall.SIGKILL)
	select {
	case l := <-got:
		if l == nil {
			t.FailNow()
		}
		if err := s.Commit(t.Context(), l, kv.Put("desired/k", []byte("second"))); err != nil {
			t.Fatal(err)
		}
		if err := l.Release(t.Context()); err != nil {
			t.Fatal(err)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("the dead process's lease was not given on")
	}
}
