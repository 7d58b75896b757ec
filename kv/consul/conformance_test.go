package consul_test

import (
	"fmt"
	"sync/atomic"
	"testing"

	"github.com/hashicorp/consul/api"

	"kedge/kv"
	"kedge/kv/consul"
	"kedge/kv/kvtest"
)

func TestConformance(t *testing.T) {
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
					return open(tb, consul.Config{Prefix: prefix, Client: c.Servers[0].Config(token)})
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

func BenchmarkWake(b *testing.B) {
	c := kvtest.StartConsul(b, kvtest.ConsulOptions{})
	kvs := c.Client().KV()
	kvtest.BenchmarkWake(b, c.Open(""), func(value string) {
		if _, err := kvs.Put(&api.KVPair{Key: "kedge/pins/prod/web/app", Value: []byte(value)}, nil); err != nil {
			b.Fatal(err)
		}
	})
}

func BenchmarkCommit(b *testing.B) {
	kvtest.BenchmarkCommit(b, kvtest.StartConsul(b, kvtest.ConsulOptions{Persistent: true}).Open(""))
}
