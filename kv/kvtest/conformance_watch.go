package kvtest

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"kedge/kv"
)

func testWatch(t *testing.T, b Backend) {
	s := b.Open(t)
	mustFolders(t, s, "pins/prod/web/")
	views := Watch(t, b.Open(t), "pins/prod/web/")
	first := views.Await(t, "the first view", func(v kv.View) bool { return v.Synced })
	if len(first.Entries) != 0 || first.Err != nil || first.Since.IsZero() {
		t.Fatalf("first view: %+v", first)
	}
	expect := func(want string) {
		t.Helper()
		views.Await(t, want, func(v kv.View) bool { return v.Synced && v.Err == nil && keysOf(v.Entries) == want })
	}
	mustCommit(t, s, nil, kv.Put("pins/prod/web/app", []byte("1")))
	expect("pins/prod/web/app=1")
	b.PutByHand(t, "pins/prod/web/app", "by hand\n")
	expect("pins/prod/web/app=by hand\n")
	mustCommit(t, s, nil, kv.Put("pins/prod/web/app/node-1", []byte("2")), kv.Put("pins/prod/web/a", []byte("3")))
	expect("pins/prod/web/a=3 pins/prod/web/app=by hand\n pins/prod/web/app/node-1=2")
	b.DeleteByHand(t, "pins/prod/web/app")
	expect("pins/prod/web/a=3 pins/prod/web/app/node-1=2")
	mustCommit(t, s, nil, kv.Delete("pins/prod/web/a"), kv.Delete("pins/prod/web/app/node-1"))
	expect("")
}

func testWatchExisting(t *testing.T, b Backend) {
	s := b.Open(t)
	mustFolders(t, s, "d/")
	mustCommit(t, s, nil, kv.Put("d/k", []byte("1")))
	views := Watch(t, s, "d/")
	views.Await(t, "the key", func(v kv.View) bool { return v.Synced && keysOf(v.Entries) == "d/k=1" })
	if n := len(views.All()); n != 1 {
		t.Fatalf("it took %d views", n)
	}
	// Several watches are independent of one another.
	Watch(t, s, "d/").Await(t, "the key", func(v kv.View) bool { return v.Synced && keysOf(v.Entries) == "d/k=1" })
}

// testTooMuch tests a role's prefix below which more than kv.MaxRoleList bytes are stored. The watch's
// error names the prefix, its view keeps the entries that it had, and List fails. Other prefixes are
// read. Once the surplus is deleted, the watch recovers.
func testTooMuch(t *testing.T, b Backend) {
	if RaceDetector {
		t.Skip("run it without the race detector, as .ci/test does: 32 MiB take too long to read with it")
	}
	s := b.Open(t)
	const prefix, other = "pins/prod/web/", "pins/prod/db/"
	mustFolders(t, s, prefix, other)
	mustCommit(t, s, nil, kv.Put(prefix+"app", []byte("1")), kv.Put(other+"app", []byte("1")))
	views, others := Watch(t, b.Open(t), prefix), Watch(t, b.Open(t), other)
	views.Await(t, "the key", Healthy("app=1"))
	const size = 500 << 10
	junk := strings.Repeat("x", size)
	key := func(i int) string { return fmt.Sprintf("%sjunk-%03d", prefix, i) }
	for i := range kv.MaxRoleList/size + 2 {
		b.PutByHand(t, key(i), junk)
	}
	bounded := func(v kv.View) bool {
		size := 0
		for _, e := range v.Entries {
			size += e.Size()
		}
		return size <= kv.MaxRoleList
	}
	v := views.Await(t, "the error", func(v kv.View) bool { return errors.Is(v.Err, kv.ErrTooLarge) })
	if !v.Synced || !bounded(v) || len(v.Entries) == 0 || keysOf(v.Entries[:1]) != prefix+"app=1" ||
		!errors.Is(v.Err, kv.ErrUnavailable) || !strings.Contains(v.Err.Error(), "32 MiB are stored below "+prefix) {
		t.Errorf("%d entries, synced %t: %v", len(v.Entries), v.Synced, v.Err)
	}
	if _, err := s.List(t.Context(), prefix); !errors.Is(err, kv.ErrTooLarge) || !errors.Is(err, kv.ErrUnavailable) {
		t.Errorf("it is listed: %v", err)
	}
	if all, err := s.List(t.Context(), "pins/"); err != nil || len(all) != kv.MaxRoleList/size+4 {
		t.Errorf("a prefix that may have more has %d keys: %v", len(all), err)
	}
	mustCommit(t, s, nil, kv.Put(other+"app", []byte("2")))
	others.Await(t, "a change elsewhere", Healthy("app=2"))

	mustCommit(t, s, nil, kv.Put(prefix+"app", []byte("2")))
	for i := range kv.MaxRoleList/size + 2 {
		b.DeleteByHand(t, key(i))
	}
	views.Await(t, "the end of the junk", Healthy("app=2"))
	views.Never(t, "too much was taken", func(v kv.View) bool { return !bounded(v) })
}

func testWatchLateFolder(t *testing.T, b Backend) {
	s := b.Open(t)
	views := Watch(t, s, "late/prod/")
	views.Await(t, "a first view", func(kv.View) bool { return true })
	mustFolders(t, s, "late/prod/")
	mustCommit(t, s, nil, kv.Put("late/prod/k", []byte("1")))
	views.Await(t, "the key",
		func(v kv.View) bool { return v.Synced && v.Err == nil && keysOf(v.Entries) == "late/prod/k=1" })
}

func testSameValue(t *testing.T, b Backend) {
	s := b.Open(t)
	mustFolders(t, s, "d/")
	mustCommit(t, s, nil, kv.Put("d/k", []byte("1")))
	views := Watch(t, b.Open(t), "d/")
	views.Await(t, "the key", func(v kv.View) bool { return len(v.Entries) == 1 })
	before := version(t, s, "d/k")
	for range 5 {
		mustCommit(t, s, nil, kv.Put("d/k", []byte("1")))
	}
	if after := version(t, s, "d/k"); after != before {
		t.Fatalf("the version went from %d to %d", before, after)
	}
	mustCommit(t, s, nil, kv.Put("d/end", nil))
	views.Await(t, "the end", func(v kv.View) bool { return len(v.Entries) == 2 })
	if n := len(views.All()); n != 2 {
		t.Fatalf("%d views, want one for the start and one for the end", n)
	}
}

func testElsewhere(t *testing.T, b Backend) {
	s := b.Open(t)
	mustFolders(t, s, "d/", "elsewhere/")
	views := Watch(t, b.Open(t), "d/")
	views.Await(t, "the start", func(v kv.View) bool { return v.Synced })
	for i := range 20 {
		mustCommit(t, s, nil, kv.Put(fmt.Sprintf("elsewhere/k%d", i), nil))
	}
	mustCommit(t, s, nil, kv.Put("d/end", nil))
	views.Await(t, "the end", func(v kv.View) bool { return len(v.Entries) == 1 })
	if n := len(views.All()); n != 2 {
		t.Fatalf("%d views, want one for the start and one for the end", n)
	}
}

func testOwnViews(t *testing.T, b Backend) {
	s := b.Open(t)
	mustFolders(t, s, "d/")
	mustCommit(t, s, nil, kv.Put("d/a", []byte("1")), kv.Put("d/b", []byte("1")))
	views := Watch(t, s, "d/")
	v := views.Await(t, "the keys", func(v kv.View) bool { return len(v.Entries) == 2 })
	v.Entries[0].Value[0] = 'X'
	v.Entries[1] = kv.Entry{}
	mustCommit(t, s, nil, kv.Put("d/c", []byte("1")))
	views.Await(t, "the keys unspoilt", func(v kv.View) bool { return keysOf(v.Entries) == "d/a=1 d/b=1 d/c=1" })
}

func testLatency(t *testing.T, b Backend) {
	s := b.Open(t)
	mustFolders(t, s, "d/")
	views := Watch(t, b.Open(t), "d/")
	views.Await(t, "the start", func(v kv.View) bool { return v.Synced })
	var took []time.Duration
	for i := range 20 {
		value := fmt.Sprint("v", i)
		start := time.Now()
		b.PutByHand(t, "d/k", value)
		views.Await(t, value, func(v kv.View) bool { return keysOf(v.Entries) == "d/k="+value })
		took = append(took, time.Since(start))
	}
	slices.Sort(took)
	median := took[len(took)/2]
	t.Logf("from a write by hand to the view: median %v, worst %v", median, took[len(took)-1])
	if median > 2*time.Second {
		t.Fatal("changes are polled for, not notified")
	}
}
