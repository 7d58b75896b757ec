package kvtest

import (
	"fmt"
	"testing"

	"kedge/kv"
)

// BenchmarkWake measures the time from a write by hand to the view of a blocked watch. write must write value to the
// key pins/prod/web/app.
func BenchmarkWake(b *testing.B, s kv.Store, write func(value string)) {
	if err := s.EnsureFolders(b.Context(), "pins/prod/web/"); err != nil {
		b.Fatal(err)
	}
	seen := make(chan string, 16)
	go func() {
		_ = s.Watch(b.Context(), "pins/prod/web/", func(v kv.View) {
			if v.Synced {
				seen <- Values(v)
			}
		})
	}()
	<-seen
	n := 0
	for b.Loop() {
		n++
		value := fmt.Sprint("v", n)
		write(value)
		for got := ""; got != "app="+value; {
			got = <-seen
		}
	}
}

// BenchmarkCommit measures a commit of ten records under a lease, as a mirror makes it.
func BenchmarkCommit(b *testing.B, s kv.Store) {
	lease, err := s.Lease(b.Context(), "mirror/lease", "bench", 15e9)
	if err != nil {
		b.Fatal(err)
	}
	n := 0
	for b.Loop() {
		n++
		var ops []kv.Op
		for i := range 10 {
			ops = append(ops, kv.Put(fmt.Sprintf("desired/prod/web/app%d", i), fmt.Appendf(nil, "%0300d", n)))
		}
		if err := s.Commit(b.Context(), lease, ops...); err != nil {
			b.Fatal(err)
		}
	}
	b.StopTimer()
	if err := lease.Release(b.Context()); err != nil {
		b.Fatal(err)
	}
}
