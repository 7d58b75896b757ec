package kv_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/hashicorp/consul/api"

	"kedge/kv"
	"kedge/kv/kvtest"
)

// benchmarkWake times from a write by hand to the view of a watch that blocked.
func benchmarkWake(b *testing.B, s kv.Store, write func(value string)) {
	if err := s.EnsureFolders(b.Context(), "pins/prod/web/"); err != nil {
		b.Fatal(err)
	}
	seen := make(chan string, 16)
	go func() {
		_ = s.Watch(b.Context(), "pins/prod/web/", func(v kv.View) {
			if v.Settled {
				seen <- valuesOf(v)
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

func BenchmarkWakeConsul(b *testing.B) {
	c := kvtest.StartConsul(b, kvtest.ConsulOptions{})
	kvs := c.Client().KV()
	benchmarkWake(b, c.Open(""), func(value string) {
		if _, err := kvs.Put(&api.KVPair{Key: "kedge/pins/prod/web/app", Value: []byte(value)}, nil); err != nil {
			b.Fatal(err)
		}
	})
}

func BenchmarkWakeDir(b *testing.B) {
	dir := b.TempDir()
	s := open(b, kv.Config{URL: "file://" + dir})
	benchmarkWake(b, s, func(value string) {
		if err := os.WriteFile(filepath.Join(dir, "pins/prod/web/app"), []byte(value), 0o644); err != nil {
			b.Fatal(err)
		}
	})
}

// benchmarkCommit times a commit of ten records, as a mirror makes it.
func benchmarkCommit(b *testing.B, s kv.Store) {
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

func BenchmarkCommitConsul(b *testing.B) {
	benchmarkCommit(b, kvtest.StartConsul(b, kvtest.ConsulOptions{Persistent: true}).Open(""))
}

func BenchmarkCommitDir(b *testing.B) {
	benchmarkCommit(b, open(b, kv.Config{URL: "file://" + b.TempDir()}))
}
