package kv_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/hashicorp/consul/api"

	"kedge/kv"
	"kedge/kv/kvtest"
)

func TestConsulConformance(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{ACL: true})
	var n atomic.Int64
	t.Run("all", func(t *testing.T) { // which ends before the server does
		kvtest.Run(t, func(t *testing.T) kvtest.Backend {
			prefix := fmt.Sprintf("test-%d/", n.Add(1))
			// What a mirror may do: nothing outside of the prefix.
			token := c.Token(fmt.Sprintf(`key_prefix %q { policy = "write" } session_prefix "" { policy = "write" }`, prefix))
			kvs := c.Client().KV()
			return kvtest.Backend{
				Open: func(tb testing.TB) kv.Store {
					return open(tb, kv.Config{Prefix: prefix, Consul: c.Servers[0].Config(token)})
				},
				PutByHand: func(tb testing.TB, key, value string) {
					if _, err := kvs.Put(&api.KVPair{Key: prefix + key, Value: []byte(value)}, nil); err != nil {
						tb.Fatal(err)
					}
				},
				DeleteByHand: func(tb testing.TB, key string) {
					if _, err := kvs.Delete(prefix+key, nil); err != nil {
						tb.Fatal(err)
					}
				},
			}
		})
	})
}

func TestDirConformance(t *testing.T) {
	t.Parallel()
	kvtest.Run(t, func(t *testing.T) kvtest.Backend {
		dir := filepath.Join(t.TempDir(), "kv")
		return kvtest.Backend{
			Open: func(tb testing.TB) kv.Store { return open(tb, kv.Config{URL: "file://" + dir}) },
			PutByHand: func(tb testing.TB, key, value string) { // as echo does
				if err := os.WriteFile(handPath(dir, key), []byte(value), 0o644); err != nil {
					tb.Fatal(err)
				}
			},
			DeleteByHand: func(tb testing.TB, key string) {
				if err := os.Remove(handPath(dir, key)); err != nil {
					tb.Fatal(err)
				}
			},
		}
	})
}

func handPath(dir, key string) string {
	return filepath.Join(dir, filepath.FromSlash(strings.TrimSuffix(key, "/")))
}

func open(tb testing.TB, c kv.Config) kv.Store {
	tb.Helper()
	s, err := kv.Open(tb.Context(), c)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { s.Close() })
	return s
}
