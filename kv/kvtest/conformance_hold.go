package kvtest

import (
	"context"
	"errors"
	"testing"
	"time"

	"kedge/kv"
)

func testLeaseExcludes(t *testing.T, b Backend) {
	a, s := b.Open(t), b.Open(t)
	mustFolders(t, a, "mirror/")
	first := mustLease(t, a, "mirror/lease")
	e, err := s.Get(t.Context(), "mirror/lease")
	if err != nil || string(e.Value) != `{"holder":"holder"}` || e.Session == "" {
		t.Fatalf("the lease's key: %+v, %v", e, err)
	}
	second := make(chan kv.Lease, 1)
	go func() {
		l, err := s.Lease(t.Context(), "mirror/lease", "second", 10*time.Second)
		if err != nil {
			t.Error(err)
		}
		second <- l
	}()
	select {
	case <-second:
		t.Fatal("two hold the lease")
	case <-time.After(500 * time.Millisecond):
	}
	if err := first.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := first.Context().Err(); err == nil {
		t.Fatal("the context goes on after the release")
	}
	if cause := context.Cause(first.Context()); errors.Is(cause, kv.ErrLeaseLost) {
		t.Fatalf("a release looks like a loss: %v", cause)
	}
	select {
	case l := <-second:
		if l == nil {
			t.FailNow()
		}
		mustCommit(t, s, l, kv.Put("mirror/state", nil))
		if err := l.Release(t.Context()); err != nil {
			t.Fatal(err)
		}
	case <-time.After(patience):
		t.Fatal("the released lease was not given on")
	}
	if e, err := s.Get(t.Context(), "mirror/lease"); err != nil || e.Session != "" {
		t.Fatalf("the released lease's key: %+v, %v", e, err)
	}
}

func testLeaseFences(t *testing.T, b Backend) {
	a, s := b.Open(t), b.Open(t)
	mustFolders(t, a, "mirror/", "desired/")
	first := mustLease(t, a, "mirror/lease")
	mustCommit(t, a, first, kv.Put("desired/k", []byte("1")))
	if err := a.Commit(t.Context(), first, kv.Create("desired/k", []byte("2"))); !errors.Is(err, kv.ErrConflict) {
		t.Fatalf("a commit whose condition fails, under the lease: %v, want ErrConflict", err)
	}
	if first.Context().Err() != nil {
		t.Fatal("a failed condition ended the lease")
	}
	if err := first.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, op := range []kv.Op{kv.Put("desired/k", []byte("3")), kv.Delete("desired/k"), kv.Create("desired/new", nil)} {
		if err := a.Commit(t.Context(), first, op); !errors.Is(err, kv.ErrLeaseLost) {
			t.Fatalf("a commit of %s under a released lease: %v", op.Key, err)
		}
	}
	second := mustLease(t, s, "mirror/lease")
	if err := a.Commit(t.Context(), first, kv.Put("desired/k", []byte("3"))); !errors.Is(err, kv.ErrLeaseLost) {
		t.Fatalf("a commit under another's lease: %v", err)
	}
	mustCommit(t, s, second, kv.Put("desired/k", []byte("4")))
	if got := list(t, s, "desired/"); got != "desired/k=4" {
		t.Fatalf("in the end: %s", got)
	}
}

func testLeaseTaken(t *testing.T, b Backend) {
	s := b.Open(t)
	mustFolders(t, s, "mirror/", "desired/")
	lease := mustLease(t, s, "mirror/lease")
	b.DeleteByHand(t, "mirror/lease")
	if err := s.Commit(t.Context(), lease, kv.Put("desired/k", nil)); !errors.Is(err, kv.ErrLeaseLost) {
		t.Fatalf("a commit under a lease whose key was deleted: %v, want ErrLeaseLost", err)
	}
	select {
	case <-lease.Context().Done():
	case <-time.After(patience):
		t.Fatal("the context goes on after the loss")
	}
	if cause := context.Cause(lease.Context()); !errors.Is(cause, kv.ErrLeaseLost) {
		t.Fatalf("the context ended because of %v", cause)
	}
	if err := lease.Release(t.Context()); err != nil {
		t.Fatalf("release of a lost lease: %v", err)
	}
	if got := list(t, s, "desired/"); got != "" {
		t.Fatalf("written under a lost lease: %s", got)
	}
	mustLease(t, s, "mirror/lease") // can be acquired again
}

func testLeaseCancelled(t *testing.T, b Backend) {
	s := b.Open(t)
	mustFolders(t, s, "mirror/")
	mustLease(t, s, "mirror/lease")
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := s.Lease(ctx, "mirror/lease", "second", 10*time.Second); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("the wait ended with %v", err)
	}
}

func testLeaseContext(t *testing.T, b Backend) {
	s := b.Open(t)
	mustFolders(t, s, "mirror/")
	ctx, cancel := context.WithCancel(t.Context())
	lease, err := s.Lease(ctx, "mirror/lease", "holder", 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	mustCommit(t, s, lease, kv.Put("mirror/state", nil))
	if err := lease.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func testPresence(t *testing.T, b Backend) {
	s := b.Open(t)
	mustFolders(t, s, "status/prod/web/")
	views := Watch(t, b.Open(t), "status/prod/web/")
	p, err := s.Presence(t.Context(), "node-1")
	if err != nil {
		t.Fatal(err)
	}
	joined, lost, err := p.Join(t.Context(), "status/prod/web/node-1", []byte("joining"))
	if err != nil || joined == 0 {
		t.Fatalf("it joined at %d, %v", joined, err)
	}
	other, err := b.Open(t).Presence(t.Context(), "node-2")
	if err != nil {
		t.Fatal(err)
	}
	if later, _, err := other.Join(t.Context(), "status/prod/db/node-2", nil); err != nil || later <= joined {
		t.Fatalf("another process joined later, at %d, %v, the one before at %d", later, err, joined)
	}
	if err := other.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, value := range []string{"starting", "ready", "ready"} {
		if err := p.Put(t.Context(), "status/prod/web/node-1", []byte(value)); err != nil {
			t.Fatal(err)
		}
	}
	v := views.Await(t, "the report", func(v kv.View) bool { return keysOf(v.Entries) == "status/prod/web/node-1=ready" })
	if v.Entries[0].Session == "" {
		t.Fatal("the entry of a process that lives has no session")
	}
	// After it is removed by hand, it is there again, and the node counts as present all the time.
	if err := s.Commit(t.Context(), nil, kv.Delete("status/prod/web/node-1")); err != nil {
		t.Fatal(err)
	}
	removed := v.Entries[0].Version
	views.Await(t, "its return", func(v kv.View) bool {
		return len(v.Entries) == 1 && v.Entries[0].Session != "" && v.Entries[0].Version != removed
	})
	select {
	case <-lost:
		t.Fatal("it has to join anew, and has not been away")
	default:
	}
	later, err := b.Open(t).Presence(t.Context(), "node-1")
	if err != nil {
		t.Fatal(err)
	}
	then, _, err := later.Join(t.Context(), "status/prod/web/node-1", []byte("later"))
	if err != nil || then <= joined {
		t.Fatalf("the next process joined at %d, %v, the one before at %d", then, err, joined)
	}
	if err := later.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := p.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	views.Await(t, "no report", func(v kv.View) bool { return len(v.Entries) == 0 })
	if err := p.Put(t.Context(), "status/prod/web/node-1", nil); err == nil {
		t.Fatal("a closed presence took a put")
	}
	if err := p.Close(t.Context()); err != nil {
		t.Fatalf("a second close: %v", err)
	}
}

// testPresenceLeaves tests that an entry left behind looks like that of a process that died.
func testPresenceLeaves(t *testing.T, b Backend) {
	s := b.Open(t)
	mustFolders(t, s, "status/prod/web/")
	views := Watch(t, b.Open(t), "status/prod/web/")
	p, err := s.Presence(t.Context(), "node-1")
	for _, key := range []string{"status/prod/web/node-1", "status/prod/web/node-1-other"} {
		if err == nil {
			err = p.Put(t.Context(), key, []byte("switching"))
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	p.KeepAtClose("status/prod/web/node-1")
	if err := p.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	views.Await(t, "what is left", func(v kv.View) bool {
		return keysOf(v.Entries) == "status/prod/web/node-1=switching" && v.Entries[0].Session == ""
	})
}

func testPresenceTakeover(t *testing.T, b Backend) {
	s := b.Open(t)
	mustFolders(t, s, "status/prod/web/")
	put := func(value string) kv.Presence {
		p, err := b.Open(t).Presence(t.Context(), "node-1")
		if err == nil {
			err = p.Put(t.Context(), "status/prod/web/node-1", []byte(value))
		}
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	views := Watch(t, s, "status/prod/web/")
	old := put("before") // its process hangs, and never closes
	views.Await(t, "the earlier process",
		func(v kv.View) bool { return keysOf(v.Entries) == "status/prod/web/node-1=before" })
	now := put("after")
	v := views.Await(t, "the later process",
		func(v kv.View) bool { return keysOf(v.Entries) == "status/prod/web/node-1=after" })
	if v.Entries[0].Session == "" {
		t.Fatal("the entry that was taken over has no session")
	}
	time.Sleep(500 * time.Millisecond) // the earlier process must not take it back meanwhile
	if got := list(t, s, "status/prod/web/"); got != "status/prod/web/node-1=after" {
		t.Fatalf("after the take-over: %s", got)
	}
	if err := old.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := list(t, s, "status/prod/web/"); got != "status/prod/web/node-1=after" {
		t.Fatalf("the earlier process took the later one's entry away: %s", got)
	}
	if err := now.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func testPresenceKeys(t *testing.T, b Backend) {
	s := b.Open(t)
	mustFolders(t, s, "status/")
	p, err := s.Presence(t.Context(), "node-1")
	if err != nil {
		t.Fatal(err)
	}
	for _, role := range []string{"web", "batch", "db"} {
		if err := p.Put(t.Context(), "status/prod/"+role+"/node-1", []byte(role)); err != nil {
			t.Fatal(err)
		}
	}
	entries, err := s.List(t.Context(), "status/")
	if err != nil || len(entries) != 3 || entries[0].Session == "" || entries[0].Session != entries[2].Session {
		t.Fatalf("list: %+v, %v", entries, err)
	}
	if err := p.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := list(t, s, "status/"); got != "" {
		t.Fatalf("left: %s", got)
	}
}
